// SPDX-License-Identifier: MIT
//
// Every SwitchRule and ThrottleRule through its contract, the exemplars among them; and some with one fault each, to see that
// the contract notices.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "exemplar/switch_rule.hpp"
#include "exemplar/throttle_rule.hpp"
#include "multifd/migrate/downtime_ramp.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/priced_downtime.hpp"
#include "multifd/migrate/stall_detection.hpp"
#include "multifd/migrate/throttle.hpp"
#include "multifd/testing/switch_rule_contract.hpp"

using namespace multifd;
using namespace multifd::migrate;

namespace {

template <class Rule>
void expect_kept(const Rule& rule) {
  const ContractReport report = check_switch_rule_contract(rule);
  INFO(report.text());
  CHECK(report.ok());
}

template <class Rule>
void expect_throttle_kept(const Rule& rule) {
  const ContractReport report = check_throttle_rule_contract(rule);
  INFO(report.text());
  CHECK(report.ok());
}

struct NeverStops {
  static constexpr std::string_view name = "never";
  Verdict at_round_end(const RoundEnd&) noexcept { return {}; }
};

struct NoFigure : NeverStops {
  Verdict at_round_end(const RoundEnd& end) noexcept {
    const Action action = end.dirty_pages == 0 ? Action::switch_now : Action::go_on;
    return {action, Reason::too_much_left, std::numeric_limits<double>::quiet_NaN()};
  }
};

/// Goes by what is no part of a migration.
struct ByTheWeather : NeverStops {
  Verdict at_round_end(const RoundEnd&) noexcept {
    static int calls = 0;
    return {++calls % 3 == 0 ? Action::switch_now : Action::go_on, Reason::too_much_left, 0};
  }
};

struct HoldsAll {
  static constexpr std::string_view name = "all";
  unsigned percent_at(const RoundEnd&) noexcept { return 100; }
};

}  // namespace

TEST_CASE("Every switch rule of the library keeps the contract") {
  expect_kept(PricedDowntime());
  expect_kept(PricedDowntime({.never_above = std::chrono::milliseconds(100)}));
  expect_kept(FixedDowntime());
  expect_kept(FixedDowntime({.bandwidth = BandwidthOver::round}));
  expect_kept(FixedRounds());
  expect_kept(DowntimeRamp());
  expect_kept(StallDetection());
  expect_kept(exemplar::WhenItStalls());
}

TEST_CASE("Every throttle rule of the library keeps the contract") {
  expect_throttle_kept(ThrottleOff());
  expect_throttle_kept(AutoConverge());
  expect_throttle_kept(exemplar::ByRounds());
}

TEST_CASE("The contract notices a rule that goes on with an empty bitmap, prints nothing, or guesses") {
  CHECK_FALSE(check_switch_rule_contract(NeverStops()).ok());
  CHECK_FALSE(check_switch_rule_contract(NoFigure()).ok());
  CHECK_FALSE(check_switch_rule_contract(ByTheWeather()).ok());
  CHECK_FALSE(check_throttle_rule_contract(HoldsAll()).ok());
}
