// SPDX-License-Identifier: MIT
#include "simulate/rules.hpp"

#include <fmt/format.h>

#include <multifd/migrate/downtime_ramp.hpp>
#include <multifd/migrate/fixed_downtime.hpp>
#include <multifd/migrate/stall_detection.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>

#include "common/program.hpp"
#include "simulate/precopy.hpp"

namespace simulate {
namespace {

namespace migrate = multifd::migrate;

constexpr std::array all_rules = {
    NamedRule{"priced", "multifd's default", false, /*sync_first=*/false},
    NamedRule{"priced-sync-first", "the same, sync first", false},
    NamedRule{"qemu", "QEMU 11.1"},
    NamedRule{"cloud-hypervisor", "Cloud Hypervisor v53"},
    NamedRule{"ramp", "KubeVirt VEP 291"},
    NamedRule{"stall", "KubeVirt VEP 248"},
    NamedRule{"rounds", "Cloud Hypervisor to v51", false},
};

std::uint64_t whole(double pages) { return static_cast<std::uint64_t>(pages + 0.5); }

template <class Rule, class Throttle>
Outcome run_with(const Trace& trace, Rule rule, Throttle throttle, bool sync_first) {
  using std::chrono::ceil;
  const migrate::ConvergenceOptions options{
      .time_limit = ceil<std::chrono::milliseconds>(migrate::from_seconds(trace.time_limit_s)),
      .device_state = ceil<std::chrono::microseconds>(migrate::from_seconds(trace.device_state_s)),
      .round_trip = ceil<std::chrono::microseconds>(migrate::from_seconds(trace.round_trip_s)),
      .sync_first = sync_first};
  auto convergence = program::need(migrate::Convergence<Rule, Throttle>::create(options, rule, throttle));
  Precopy precopy(trace);
  unsigned throttle_percent = 0;
  for (;;) {
    const SentRound round = precopy.next(throttle_percent);
    const migrate::Decision decision = convergence.round_ended(
        whole(round.sent_pages), migrate::from_seconds(round.send_s), migrate::from_seconds(round.sync_s),
        whole(round.dirty_pages), migrate::from_seconds(round.now_s));
    throttle_percent = decision.throttle_percent;
    if (decision.action == migrate::Action::go_on) continue;
    Outcome outcome{.done = decision.action == migrate::Action::switch_now,
                    .promised_s = migrate::seconds(decision.downtime.total()),
                    .total_s = round.now_s,
                    .rounds = round.number + 1,
                    .held_s = precopy.held_s(),
                    .reason = decision.reason,
                    .figure = decision.figure};
    if (outcome.done) {
      outcome.downtime_s = precopy.downtime_s(sync_first);
      outcome.total_s += outcome.downtime_s;
    }
    return outcome;
  }
}

template <class Rule>
Outcome run_rule(const Trace& trace, const Judge& judge, Rule rule, bool sync_first) {
  return judge.throttle ? run_with(trace, rule, migrate::AutoConverge(), sync_first)
                        : run_with(trace, rule, migrate::ThrottleOff(), sync_first);
}

}  // namespace

double cost(const Outcome& outcome, const Judge& judge) {
  if (!outcome.done) return std::numeric_limits<double>::infinity();
  return outcome.total_s + judge.price.of(outcome.downtime_s);
}

std::span<const NamedRule> rules() { return all_rules; }

Outcome run(const Trace& trace, std::string_view rule, const Judge& judge) {
  using migrate::BandwidthOver;
  const auto limit = judge.price.max_downtime;
  const auto found = std::ranges::find(all_rules, rule, &NamedRule::name);
  if (found == all_rules.end()) throw program::Failure(fmt::format("{}: no such rule", rule));
  const auto run_it = [&](const auto& chosen) { return run_rule(trace, judge, chosen, found->sync_first); };
  if (rule == "qemu") return run_it(migrate::FixedDowntime({.max_downtime = limit, .bandwidth = BandwidthOver::round}));
  if (rule == "cloud-hypervisor")
    return run_it(migrate::FixedDowntime({.max_downtime = limit, .bandwidth = BandwidthOver::sending}));
  // KubeVirt's limits are multiples of QEMU's default, and grow with it.
  if (rule == "ramp")
    return run_it(migrate::DowntimeRamp({.first_downtime = limit / 2, .max_downtime = limit * 7 / 2}));
  if (rule == "stall") return run_it(migrate::StallDetection({.first_downtime = limit, .max_downtime = limit * 3}));
  if (rule == "rounds") return run_it(migrate::FixedRounds());
  return run_it(migrate::PricedDowntime({.price = judge.price}));
}

Outcome oracle(const Trace& trace, const Judge& judge) {
  Outcome best{.reason = migrate::Reason::too_much_left};
  double least = std::numeric_limits<double>::infinity();
  Precopy precopy(trace);
  // Whatever comes later than the best has cost takes more than that by its time alone.
  for (SentRound round = precopy.next(); round.now_s < std::min(least, trace.time_limit_s) || round.number == 0;
       round = precopy.next()) {
    const double downtime = precopy.downtime_s();
    Outcome outcome{.done = std::isfinite(downtime),
                    .downtime_s = downtime,
                    .promised_s = downtime,
                    .total_s = round.now_s + downtime,
                    .rounds = round.number + 1,
                    .reason = migrate::Reason::nothing_to_gain,
                    .figure = downtime};
    if (const double here = cost(outcome, judge); here < least) least = here, best = outcome;
  }
  return best;
}

}  // namespace simulate
