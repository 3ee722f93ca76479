// SPDX-License-Identifier: MIT
//
// Many traces, all rules: medians, and where the default rule loses.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "simulate/rules.hpp"

namespace simulate {

/// What became of one trace.
struct Trial {
  std::string name;
  std::string kind;
  Outcome oracle{};
  std::vector<Outcome> outcomes{};  ///< of each rule, in the order of Comparison::rules
};

/// How much worse than the best baseline a rule may be in a trial before that counts.
inline constexpr double loss_limit = 1.2;

/// One rule over all trials. A migration that did not come to an end counts as infinitely long, in both figures.
struct Summary {
  double downtime_s = 0;  ///< median
  double total_s = 0;     ///< median
  double cost_s = 0;      ///< median
  std::size_t failed = 0;
  double over_oracle = 0;   ///< median of the trials' cost, times the oracle's
  double most_over = 0;     ///< so many times the oracle's in nine trials of ten
  double promise_kept = 0;  ///< share of the switchovers that took at most 1.1 times what was promised
  /// Trials that cost more than loss_limit times as much as under the best baseline, which is another one each time.
  std::size_t lost = 0;
};

/// A trial in which a baseline had a lower cost than the rule that is judged.
struct Loss {
  const Trial* trial = nullptr;
  const Outcome* mine = nullptr;
  const Outcome* best = nullptr;
  std::string_view best_rule{};
  double factor = 1;    ///< of the costs
  bool waited = false;  ///< the baseline took longer: it went on when the judged rule gave up waiting, and was lucky
};

struct Comparison {
  std::vector<NamedRule> rules{};
  Judge judge{};
  std::vector<Trial> trials{};
  Summary oracle{};
  std::vector<Summary> summaries{};  ///< of each rule
  std::vector<Loss> losses{};        ///< of the first rule, worst first
};

/// Runs `rules` on a trace; `comparison` holds what is run with.
void try_rules(Comparison& comparison, const Trace& trace);

/// Fills in summaries and losses, when all traces have been tried.
void summarise(Comparison& comparison);

/// The median; infinite values are the largest.
double median(std::vector<double> values);

}  // namespace simulate
