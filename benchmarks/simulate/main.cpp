// SPDX-License-Identifier: MIT
//
// multifd_simulate: when to stop the guest, tried on traces in virtual time.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/gnuplot.hpp"
#include "common/part_file.hpp"
#include "common/program.hpp"
#include "common/report.hpp"
#include "simulate/compare.hpp"
#include "simulate/generate.hpp"
#include "simulate/output.hpp"
#include "simulate/plot.hpp"
#include "simulate/trace.hpp"

namespace {

using namespace simulate;
using program::Failure;
using program::Usage;

constexpr const char* description =
    R"(Tries rules for the switchover of a live migration on traces, in virtual time.

A trace is a guest and its link: what the guest writes over time, what the link carries, what fetching the dirty bitmap
takes. Every rule is run by the code that a real migration runs. The oracle knows the trace, and takes the round's end at
which a switchover costs least.

  multifd_simulate                                    all kinds, 200 traces
  multifd_simulate --generate phases --traces 5 --trials
  multifd_simulate --trace report.json --rule priced --rule qemu --json -
  multifd_simulate --plot rules.svg)";

constexpr const char* footer = R"(
Kinds: working_set hot_cold phases dips sync vcpus compressible steps. Rules: priced (the default of multifd), qemu,
cloud-hypervisor, ramp, stall (KubeVirt's two), rounds (Cloud Hypervisor up to v51; shown, no baseline). What each is, and
the format of a trace, is in benchmarks/simulate/README.md.
Exit status: 0 done, 1 failed (one line on stderr), 2 wrong usage.)";

struct Settings {
  std::vector<std::string> traces;
  std::vector<std::string> generated;
  std::vector<std::string> rules;
  std::uint64_t seed = tested_seed;
  unsigned count = tested_traces;
  unsigned max_downtime_ms = 300;
  double within = multifd::migrate::DowntimePrice{}.within;
  double above = multifd::migrate::DowntimePrice{}.above;
  double time_limit_s = 0;
  std::string throttle = "off";
  bool trials = false;
  std::string write_trace;
  std::string json_path;
  std::string plot;
  std::string plot_data;
};

std::vector<NamedRule> chosen_rules(const Settings& settings) {
  const auto all = rules();
  if (settings.rules.empty()) return {all.begin(), all.end()};
  // The one that is judged comes first, and baselines are what it is judged by.
  std::vector<NamedRule> chosen;
  for (const std::string& name : settings.rules)
    if (std::ranges::find(chosen, name, &NamedRule::name) == chosen.end())
      chosen.insert(name == all.front().name ? chosen.begin() : chosen.end(),
                    *std::ranges::find(all, name, &NamedRule::name));
  return chosen;
}

std::vector<Trace> chosen_traces(const Settings& settings) {
  std::vector<Trace> traces;
  for (const std::string& path : settings.traces) traces.push_back(read_trace(path));
  std::vector<std::string_view> generated(settings.generated.begin(), settings.generated.end());
  if (traces.empty() && generated.empty()) generated.assign(kinds.begin(), kinds.end());
  for (const std::string_view kind : generated)
    for (unsigned i = 0; i < settings.count; ++i) traces.push_back(generate(kind, settings.seed + i));
  if (settings.time_limit_s > 0)
    for (Trace& trace : traces) trace.time_limit_s = settings.time_limit_s;
  return traces;
}

void check(const Settings& settings) {
  if (!settings.plot.empty() && !settings.plot.ends_with(".svg") && !settings.plot.ends_with(".png"))
    throw Usage(fmt::format("--plot {}: the name has to end in .svg or .png", settings.plot));
  if (settings.above < settings.within) throw Usage("--price-above must not be less than --price-within");
  if (!settings.write_trace.empty() && (settings.generated.size() != 1 || !settings.traces.empty()))
    throw Usage("--write-trace needs one --generate, and writes the trace of --seed");
}

void keep(std::optional<program::PartFile>& file) {
  if (!file) return;
  file->sync();
  file->rename();
  file->release();
}

int simulate_all(const Settings& settings) {
  const program::Stopwatch watch;
  program::JsonFile json_file(settings.json_path);
  try {
    if (!settings.plot.empty()) program::need_gnuplot();
    std::optional<program::PartFile> plot, plot_data, written;
    if (!settings.plot.empty()) plot.emplace(settings.plot).check_writes();
    if (!settings.plot_data.empty()) plot_data.emplace(settings.plot_data).check_writes();
    if (!settings.write_trace.empty()) {
      written.emplace(settings.write_trace);
      const Trace trace = generate(settings.generated.front(), settings.seed);
      program::write_text(written->fd(), program::json_text(to_json(trace)), written->part());
      keep(written);
      return program::exit_done;
    }
    Comparison comparison{.rules = chosen_rules(settings)};
    comparison.judge.price = {.max_downtime = std::chrono::milliseconds(settings.max_downtime_ms),
                              .within = settings.within,
                              .above = settings.above};
    comparison.judge.throttle = settings.throttle != "off";
    for (const Trace& trace : chosen_traces(settings)) try_rules(comparison, trace);
    summarise(comparison);
    if (settings.json_path != "-") print_tables(comparison, settings.trials);
    if (plot_data) write_plot_data(comparison, *plot_data);
    if (plot) draw(comparison, *plot);
    keep(plot_data);
    keep(plot);
    json_file.write(to_json(comparison, watch.seconds()));
    return program::exit_done;
  } catch (const std::exception& error) {
    json_file.write({{"ok", false}, {"error", error.what()}, {"seconds", watch.seconds()}});
    throw;
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app(description, "multifd_simulate");
  app.footer(footer);
  std::vector<std::string> rule_names;
  for (const NamedRule& each : rules()) rule_names.emplace_back(each.name);
  app.add_option(
      "--trace", settings.traces,
      "A recorded guest: the report of live_migration --json, or a trace as --write-trace writes it; repeatable");
  app.add_option("--generate", settings.generated, "A kind of traces to make; repeatable. Default: all, unless --trace")
      ->check(CLI::IsMember(std::vector<std::string>(kinds.begin(), kinds.end())))
      ->delimiter(',');
  app.add_option("--seed", settings.seed, "Of the first generated trace of each kind; the next has the next")
      ->capture_default_str();
  app.add_option("--traces", settings.count, "How many of each kind")
      ->check(CLI::Range(1u, 10'000u))
      ->capture_default_str();
  app.add_option("--rule", settings.rules, "A rule to try; repeatable. Default: all")
      ->check(CLI::IsMember(rule_names))
      ->delimiter(',');
  app.add_option("--max-downtime", settings.max_downtime_ms,
                 "Milliseconds: the limit of the rules that have one, and where the price changes")
      ->check(CLI::Range(1u, 100'000u))
      ->capture_default_str();
  app.add_option("--price-within", settings.within, "What a second of downtime is worth, in seconds, up to the limit")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--price-above", settings.above, "The same, above the limit")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--time-limit", settings.time_limit_s,
                 "Seconds that a migration may take (0: the trace's own, 1200 for generated ones)")
      ->check(CLI::Range(0.0, 1400.0))
      ->capture_default_str();
  app.add_option("--throttle", settings.throttle, "Whether the guest is throttled, under every rule")
      ->check(CLI::IsMember({"off", "auto-converge"}))
      ->capture_default_str();
  app.add_flag("--trials", settings.trials, "Print what every rule did on every trace, and why");
  app.add_option("--write-trace", settings.write_trace, "Write a generated trace to a new file, and do no more");
  app.add_option("--json", settings.json_path, "Write one JSON object to a file, or to stdout for -");
  app.add_option("--plot", settings.plot, "Draw the rules' downtimes and costs to a new .svg or .png (needs gnuplot)");
  app.add_option("--plot-data", settings.plot_data, "Write the picture's table to a new file");
  return program::run(app, argc, argv, [&] {
    check(settings);
    return simulate_all(settings);
  });
}
