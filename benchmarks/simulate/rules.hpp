// SPDX-License-Identifier: MIT
//
// The rules that are compared, by name, each run by the library's own Convergence; and the oracle.
#pragma once

#include <multifd/migrate/convergence.hpp>

#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "simulate/trace.hpp"

namespace simulate {

/// How a migration ended.
struct Outcome {
  bool done = false;      ///< the guest runs at the destination
  double downtime_s = 0;  ///< as it really was
  double promised_s = 0;  ///< as the rule saw it
  double total_s = 0;     ///< to the guest's first step at the destination
  std::uint64_t rounds = 0;
  double held_s = 0;  ///< that the guest was throttled for
  multifd::migrate::Reason reason{};
  double figure = 0;
};

/// What a rule is told beside the trace.
struct Judge {
  multifd::migrate::DowntimePrice price{};
  bool throttle = false;  ///< auto-converge on
};

/// Seconds that a migration has cost: its time, and its downtime at the price. Infinite when it did not come to an end.
double cost(const Outcome& outcome, const Judge& judge);

struct NamedRule {
  std::string_view name;
  std::string_view whose;
  bool baseline = true;  ///< one of those that the default rule is measured by
  /// Its switchover fetches the last bitmap before it sends the first page, as the VMM does whose rule it is. multifd's
  /// driver sends what is known to be dirty meanwhile.
  bool sync_first = true;
};

/// All of them; the first is the default rule.
std::span<const NamedRule> rules();

/// Runs one. `rule`: a name of rules().
Outcome run(const Trace& trace, std::string_view rule, const Judge& judge);

/// Knows the trace, and switches over as multifd does: the round's end at which that costs least (README.md says why that is
/// the bound).
Outcome oracle(const Trace& trace, const Judge& judge);

}  // namespace simulate
