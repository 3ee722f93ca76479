// SPDX-License-Identifier: MIT
#include "simulate/compare.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

namespace simulate {
namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();

using Pick = std::function<const Outcome&(const Trial&)>;

Summary summary_of(const Comparison& comparison, const Pick& pick) {
  Summary summary;
  std::vector<double> downtimes, totals, costs, over;
  std::size_t done = 0, kept = 0;
  for (const Trial& trial : comparison.trials) {
    const Outcome& outcome = pick(trial);
    downtimes.push_back(outcome.done ? outcome.downtime_s : infinite);
    totals.push_back(outcome.done ? outcome.total_s : infinite);
    costs.push_back(cost(outcome, comparison.judge));
    over.push_back(costs.back() / cost(trial.oracle, comparison.judge));
    if (!outcome.done) continue;
    ++done;
    if (outcome.downtime_s <= 1.1 * outcome.promised_s) ++kept;
  }
  summary.failed = comparison.trials.size() - done;
  summary.promise_kept = done > 0 ? static_cast<double>(kept) / static_cast<double>(done) : 0;
  std::ranges::sort(over);
  if (!over.empty()) summary.most_over = over[(over.size() - 1) * 9 / 10];
  summary.downtime_s = median(std::move(downtimes));
  summary.total_s = median(std::move(totals));
  summary.cost_s = median(std::move(costs));
  summary.over_oracle = median(std::move(over));
  return summary;
}

}  // namespace

double median(std::vector<double> values) {
  if (values.empty()) return std::nan("");
  std::ranges::sort(values);
  const double low = values[(values.size() - 1) / 2], high = values[values.size() / 2];
  return low == high ? low : (low + high) / 2;
}

void try_rules(Comparison& comparison, const Trace& trace) {
  Trial trial{.name = trace.name, .kind = trace.kind, .oracle = oracle(trace, comparison.judge)};
  for (const NamedRule& each : comparison.rules) trial.outcomes.push_back(run(trace, each.name, comparison.judge));
  comparison.trials.push_back(std::move(trial));
}

void summarise(Comparison& comparison) {
  const Judge& judge = comparison.judge;
  comparison.oracle = summary_of(comparison, [](const Trial& trial) -> const Outcome& { return trial.oracle; });
  for (std::size_t i = 0; i < comparison.rules.size(); ++i)
    comparison.summaries.push_back(
        summary_of(comparison, [i](const Trial& trial) -> const Outcome& { return trial.outcomes[i]; }));
  for (const Trial& trial : comparison.trials) {
    Loss loss{.trial = &trial, .mine = &trial.outcomes[0]};
    double least = infinite;
    for (std::size_t i = 0; i < comparison.rules.size(); ++i) {
      const double here = cost(trial.outcomes[i], judge);
      if (!comparison.rules[i].baseline || !(here < least)) continue;
      least = here;
      loss.best = &trial.outcomes[i];
      loss.best_rule = comparison.rules[i].name;
    }
    if (loss.best == nullptr) continue;
    for (std::size_t i = 0; i < comparison.rules.size(); ++i)
      if (cost(trial.outcomes[i], judge) > loss_limit * least) ++comparison.summaries[i].lost;
    if (cost(trial.oracle, judge) > loss_limit * least) ++comparison.oracle.lost;
    loss.factor = cost(*loss.mine, judge) / least;
    loss.waited = loss.best->total_s > loss.mine->total_s;
    if (loss.factor > 1) comparison.losses.push_back(loss);
  }
  std::ranges::sort(comparison.losses, std::greater(), &Loss::factor);
}

}  // namespace simulate
