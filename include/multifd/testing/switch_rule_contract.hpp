// SPDX-License-Identifier: MIT
//
// Checks the rules of the SwitchRule and ThrottleRule concepts that types cannot express, on scripted migrations. Run it on
// your own rule, in any test framework:
//
//   auto report = multifd::check_switch_rule_contract(MyRule{...});
//   assert(report.ok());  // else print report.text()
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/switch_rule.hpp"
#include "multifd/migrate/throttle.hpp"
#include "multifd/testing/contract_report.hpp"

namespace multifd {
namespace detail {

/// A migration as its driver sees it: so many pages are dirty after each round, at a link of 100,000 pages per second.
class ScriptedMigration {
 public:
  explicit ScriptedMigration(std::uint64_t ram_pages) : pages_(ram_pages) {}

  /// Sends what is dirty and fetches a bitmap with so many pages.
  template <class Convergence>
  migrate::Decision round(Convergence& convergence, std::uint64_t dirty_pages,
                          migrate::Time sync = std::chrono::milliseconds(5)) {
    const migrate::Time send = migrate::from_seconds(static_cast<double>(pages_) / 1e5);
    now_ += send + sync;
    const std::uint64_t sent = pages_;
    pages_ = dirty_pages;
    return convergence.round_ended(sent, send, sync, dirty_pages, now_);
  }

  std::uint64_t pages() const { return pages_; }

 private:
  std::uint64_t pages_;
  migrate::Time now_{};
};

/// How many pages the guests of the contract have dirtied behind round `n`, when `before` were sent in it.
struct ScriptedGuest {
  const char* name;
  std::uint64_t (*dirty)(std::uint64_t n, std::uint64_t before);
};

inline constexpr ScriptedGuest scripted_guests[] = {
    {"idle guest", [](std::uint64_t, std::uint64_t) -> std::uint64_t { return 0; }},
    {"guest that converges", [](std::uint64_t, std::uint64_t before) { return before / 3; }},
    {"working set of a second", [](std::uint64_t, std::uint64_t) -> std::uint64_t { return 100'000; }},
    {"guest with phases", [](std::uint64_t n, std::uint64_t) -> std::uint64_t { return n / 5 % 2 == 0 ? 200'000 : 3; }},
    {"guest that dirties all", [](std::uint64_t, std::uint64_t before) { return before; }},
};

/// Asks a rule, and a copy of it, through some hundred rounds of each guest.
template <class Rule, class Throttle>
void run_scripted(const Rule& rule, const Throttle& throttle, ContractReport& report) {
  for (const ScriptedGuest& guest : scripted_guests) {
    const std::string where = std::string(", ") + guest.name;
    auto convergence = migrate::Convergence<Rule, Throttle>::create({}, rule, throttle);
    auto again = migrate::Convergence<Rule, Throttle>::create({}, rule, throttle);
    if (!report.expect(convergence.has_value() && again.has_value(), "check: refuses the rule's own options" + where))
      return;
    ScriptedMigration migration(1'000'000), repeated(1'000'000);
    bool ended = false, emptied = false;
    for (std::uint64_t n = 0; n < 500 && !ended; ++n) {
      const std::uint64_t dirty = guest.dirty(n, migration.pages());
      const migrate::Decision decision = migration.round(*convergence, dirty);
      const migrate::Decision other = repeated.round(*again, dirty);
      emptied = emptied || dirty == 0;
      ended = decision.action != migrate::Action::go_on;
      report.expect(std::isfinite(decision.figure), "at_round_end: figure is no number" + where);
      report.expect(decision.action == other.action && decision.reason == other.reason,
                    "at_round_end: answers otherwise in a second migration of the same guest" + where);
      report.expect(decision.throttle_percent <= 99, "percent_at: more than 99" + where);
      report.expect(decision.throttle_percent == other.throttle_percent,
                    "percent_at: answers otherwise in a second migration of the same guest" + where);
      if (dirty == 0) break;
    }
    report.expect(ended || !emptied, "at_round_end: goes on with an empty bitmap" + where);
    if (!ended) report.note("never stops" + where);
  }
}

}  // namespace detail

/// Checks that a rule ends a migration whose bitmap is empty, that its figures can be printed, and that it answers by what it
/// is told alone: the same guest gets the same answers. `notes` say which guests it never stops.
///
/// Params: `rule`: copied, not changed. Threads: the caller's.
template <class Rule>
ContractReport check_switch_rule_contract(const Rule& rule) {
  static_assert(migrate::check_switch_rule<Rule>());
  ContractReport report;
  report.expect(!std::string_view(Rule::name).empty(), "name: is empty");
  detail::run_scripted(rule, migrate::ThrottleOff(), report);
  return report;
}

/// Checks that a ThrottleRule's answers are 0 to 99 and follow from what it is told alone.
///
/// Params: `rule`: copied, not changed. Threads: the caller's.
template <class Rule>
ContractReport check_throttle_rule_contract(const Rule& rule) {
  static_assert(migrate::check_throttle_rule<Rule>());
  ContractReport report;
  report.expect(!std::string_view(Rule::name).empty(), "name: is empty");
  detail::run_scripted(migrate::FixedDowntime(), rule, report);
  return report;
}

}  // namespace multifd
