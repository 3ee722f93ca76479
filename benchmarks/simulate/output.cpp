// SPDX-License-Identifier: MIT
#include "simulate/output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

namespace simulate {
namespace {

using nlohmann::json;
namespace migrate = multifd::migrate;

/// Three digits that count.
std::string format_seconds(double seconds) {
  if (!std::isfinite(seconds)) return "-";
  if (seconds >= 100) return fmt::format("{:.0f} s", seconds);
  if (seconds >= 10) return fmt::format("{:.1f} s", seconds);
  if (seconds >= 1) return fmt::format("{:.2f} s", seconds);
  return fmt::format("{:.0f} ms", seconds * 1e3);
}

std::string format_times(double factor) { return std::isfinite(factor) ? fmt::format("{:.2f}x", factor) : "-"; }

json number(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

void print_row(const Comparison& comparison, std::string_view name, std::string_view whose, const Summary& row) {
  const Summary& best = comparison.oracle;
  fmt::print("{:<17} {:<24} {:>8} {:>6} {:>8} {:>6} {:>8} {:>6} {:>5} {:>5} {:>7}\n", name, whose,
             format_seconds(row.downtime_s), format_times(row.downtime_s / best.downtime_s),
             format_seconds(row.total_s), format_times(row.total_s / best.total_s), format_seconds(row.cost_s),
             format_times(row.most_over), row.lost, row.failed, fmt::format("{:.0f} %", 100 * row.promise_kept));
}

void print_losses(const Comparison& comparison) {
  const NamedRule& mine = comparison.rules[0];
  const auto large = static_cast<std::size_t>(
      std::ranges::count_if(comparison.losses, [](const Loss& loss) { return loss.factor > loss_limit; }));
  const auto quicker = static_cast<std::size_t>(std::ranges::count_if(
      comparison.losses, [](const Loss& loss) { return loss.factor > loss_limit && !loss.waited; }));
  fmt::print("\n{} traces of {} in which {} costs more than the best baseline; {} of them by more than {:.0f} %",
             comparison.losses.size(), comparison.trials.size(), mine.name, large, 100 * (loss_limit - 1));
  if (large > 0)
    fmt::print(": {} because the baseline waited longer and the guest or its link changed, {} otherwise",
               large - quicker, quicker);
  fmt::print("\n");
  if (comparison.losses.empty()) return;
  fmt::print("{:<18} {:>6}  {:<18} {:>10} {:>10} {:>12} {:>12}\n", "trace", "cost", "best baseline", "downtime", "its",
             "total", "its");
  for (const Loss& loss : comparison.losses)
    fmt::print("{:<18} {:>6}  {:<18} {:>10} {:>10} {:>12} {:>12}\n", loss.trial->name, format_times(loss.factor),
               loss.best_rule, format_seconds(loss.mine->downtime_s), format_seconds(loss.best->downtime_s),
               format_seconds(loss.mine->total_s), format_seconds(loss.best->total_s));
}

void print_trial(const Comparison& comparison, const Trial& trial) {
  const auto line = [&](std::string_view name, const Outcome& outcome) {
    fmt::print("{:<18} {:<17} {:>10} {:>10} {:>10} {:>7}  {}", trial.name, name,
               outcome.done ? format_seconds(outcome.downtime_s) : "-",
               outcome.done ? format_seconds(outcome.promised_s) : "-", format_seconds(outcome.total_s), outcome.rounds,
               to_string(outcome.reason));
    if (outcome.held_s > 0) fmt::print(", held {}", format_seconds(outcome.held_s));
    fmt::print("{}\n", outcome.done ? "" : ": not done");
  };
  line("oracle", trial.oracle);
  for (std::size_t i = 0; i < comparison.rules.size(); ++i) line(comparison.rules[i].name, trial.outcomes[i]);
}

json to_json(const Outcome& outcome) {
  return {{"done", outcome.done},
          {"downtime_s", outcome.done ? number(outcome.downtime_s) : json(nullptr)},
          {"promised_downtime_s", outcome.done ? number(outcome.promised_s) : json(nullptr)},
          {"total_s", number(outcome.total_s)},
          {"rounds", outcome.rounds},
          {"held_s", number(outcome.held_s)},
          {"reason", to_string(outcome.reason)},
          {"figure", number(outcome.figure)}};
}

json to_json(std::string_view name, std::string_view whose, const Summary& row) {
  return {{"rule", name},
          {"whose", whose},
          {"median_downtime_s", number(row.downtime_s)},
          {"median_total_s", number(row.total_s)},
          {"median_cost_s", number(row.cost_s)},
          {"median_over_oracle", number(row.over_oracle)},
          {"p90_over_oracle", number(row.most_over)},
          {"lost", row.lost},
          {"not_done", row.failed},
          {"promise_kept", number(row.promise_kept)}};
}

}  // namespace

void print_tables(const Comparison& comparison, bool every_trial) {
  if (every_trial) {
    fmt::print("{:<18} {:<17} {:>10} {:>10} {:>10} {:>7}  {}\n", "trace", "rule", "downtime", "promised", "total",
               "rounds", "because");
    for (const Trial& trial : comparison.trials) print_trial(comparison, trial);
    fmt::print("\n");
  }
  const auto& price = comparison.judge.price;
  fmt::print(
      "{} traces; medians, and times the oracle's. Cost: the time, and each second of downtime as {:.3g} s up to {}, "
      "as "
      "{:.3g} s above.\nLost: costs over {:.0f} % more than the best baseline, which is another one on each trace\n\n",
      comparison.trials.size(), price.within, format_seconds(migrate::seconds(price.max_downtime)), price.above,
      100 * (loss_limit - 1));
  fmt::print("{:<17} {:<24} {:>15} {:>15} {:>8} {:>6} {:>5} {:>5} {:>7}\n", "rule", "whose", "downtime", "total time",
             "cost", "p90", "lost", "not", "promise");
  fmt::print("{:<17} {:<24} {:>15} {:>15} {:>8} {:>6} {:>5} {:>5} {:>7}\n", "", "", "", "", "", "", "", "done", "kept");
  print_row(comparison, "oracle", "knows the trace", comparison.oracle);
  for (std::size_t i = 0; i < comparison.rules.size(); ++i)
    print_row(comparison, comparison.rules[i].name, comparison.rules[i].whose, comparison.summaries[i]);
  if (std::ranges::any_of(comparison.rules, [](const NamedRule& rule) { return rule.baseline; }) &&
      !comparison.rules[0].baseline)
    print_losses(comparison);
}

json to_json(const Comparison& comparison, double seconds) {
  json object = {{"ok", true},
                 {"error", nullptr},
                 {"seconds", seconds},
                 {"traces", comparison.trials.size()},
                 {"price",
                  {{"max_downtime_s", migrate::seconds(comparison.judge.price.max_downtime)},
                   {"within", comparison.judge.price.within},
                   {"above", comparison.judge.price.above}}},
                 {"throttle", comparison.judge.throttle},
                 {"rules", json::array({to_json("oracle", "knows the trace", comparison.oracle)})},
                 {"losses", json::array()},
                 {"trials", json::array()}};
  for (std::size_t i = 0; i < comparison.rules.size(); ++i)
    object["rules"].push_back(to_json(comparison.rules[i].name, comparison.rules[i].whose, comparison.summaries[i]));
  for (const Loss& loss : comparison.losses)
    object["losses"].push_back({{"trace", loss.trial->name},
                                {"factor", number(loss.factor)},
                                {"best_rule", loss.best_rule},
                                {"baseline_waited_longer", loss.waited}});
  for (const Trial& trial : comparison.trials) {
    json one = {{"trace", trial.name}, {"kind", trial.kind}, {"oracle", to_json(trial.oracle)}};
    for (std::size_t i = 0; i < comparison.rules.size(); ++i)
      one["rules"][std::string(comparison.rules[i].name)] = to_json(trial.outcomes[i]);
    object["trials"].push_back(std::move(one));
  }
  return object;
}

}  // namespace simulate
