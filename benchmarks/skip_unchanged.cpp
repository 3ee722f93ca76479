// SPDX-License-Identifier: MIT
//
// What SourceOptions::skip_unchanged saves and costs: whole migrations over loopback of a guest that goes on writing, values that are
// equal to what is there or not, with the filter and without it in turn.
#include <fmt/format.h>

#include <multifd/migrate/fixed_downtime.hpp>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <ctime>
#include <vector>

#include "writing_guest.hpp"

using namespace bench;

namespace {

struct Outcome {
  double bulk_bytes = 0;   ///< of the first round
  double later_bytes = 0;  ///< of all others
  double seconds = 0;      ///< of all rounds
  double cpu_seconds = 0;  ///< of the process: both sides and the guest
};

double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

Outcome measure(std::size_t bytes, std::size_t working_set, bool equal, bool filter, std::uint64_t rounds,
                std::uint64_t bandwidth) {
  const WritingGuest::Options options{.bytes = bytes, .working_set = working_set, .equal = equal};
  WritingGuest here(options);
  WritingGuest there(options);
  const double cpu = cpu_seconds();
  const MigrationReport moved = move_guest(
      here, there,
      {.channels = 2, .bandwidth = bandwidth, .converge = {.rule = FixedRounds(rounds)}, .skip_unchanged = filter});
  Outcome outcome{.cpu_seconds = cpu_seconds() - cpu};
  for (const Round& round : moved.rounds) {
    (round.number == 0 ? outcome.bulk_bytes : outcome.later_bytes) += static_cast<double>(round.wire_bytes);
    outcome.seconds += seconds(round.send);
  }
  return outcome;
}

}  // namespace

int main(int argc, char** argv) {
  std::size_t memory_mib = 512;
  std::size_t working_set_mib = 128;
  std::uint64_t rounds = 8;
  double bandwidth_mb = 0;
  unsigned repetitions = 7;
  CLI::App app("Measures what SourceOptions::skip_unchanged saves and costs.", "skip_unchanged");
  app.add_option("--memory", memory_mib, "MiB of the guest")->capture_default_str();
  app.add_option("--working-set", working_set_mib, "MiB of them that it goes on writing")->capture_default_str();
  app.add_option("--rounds", rounds, "Rounds behind the first one")->capture_default_str();
  app.add_option("--bandwidth", bandwidth_mb, "Cap in MB/s over both channels; 0: none")->capture_default_str();
  app.add_option("--repetitions", repetitions, "Of each kind, in turn")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  fmt::print("{} MiB, {} of them written to, {} rounds behind the first, {}; medians of {} and ratios run by run\n",
             memory_mib, working_set_mib, rounds,
             bandwidth_mb > 0 ? fmt::format("cap {} MB/s", bandwidth_mb) : "no cap", repetitions);
  fmt::print("{:<18} {:>7} {:>10} {:>12} {:>9} {:>7}\n", "guest", "filter", "first MB", "later MB", "seconds", "CPU s");
  for (const bool equal : {true, false}) {
    std::vector<double> bulk[2], later[2], time[2], cpu[2], less, slower;
    for (unsigned i = 0; i < repetitions; ++i) {
      for (const bool filter : {i % 2 == 0, i % 2 != 0}) {
        const Outcome each = measure(memory_mib << 20, working_set_mib << 20, equal, filter, rounds,
                                     static_cast<std::uint64_t>(bandwidth_mb * 1e6));
        bulk[filter].push_back(each.bulk_bytes / 1e6);
        later[filter].push_back(each.later_bytes / 1e6);
        time[filter].push_back(each.seconds);
        cpu[filter].push_back(each.cpu_seconds);
      }
      less.push_back(1 - later[1].back() / later[0].back());
      slower.push_back(time[1].back() / time[0].back());
    }
    for (const bool filter : {false, true})
      fmt::print("{:<18} {:>7} {:>10.1f} {:>12.1f} {:>9.3f} {:>7.2f}\n", equal ? "equal values" : "other values",
                 filter ? "on" : "off", median(bulk[filter]), median(later[filter]), median(time[filter]),
                 median(cpu[filter]));
    fmt::print("{:<18} sends {:.1f} % less behind the first round, takes {:.3f} of the time\n", "", 100 * median(less),
               median(slower));
  }
}
