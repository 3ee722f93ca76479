// SPDX-License-Identifier: MIT
//
// What a dirty bitmap that takes long to fetch does to the promised downtime: whole migrations over loopback of a guest that
// goes on writing, with a quick fetch and with a slow one in turn.
#include <fmt/format.h>

#include <multifd/migrate/fixed_downtime.hpp>

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstdint>
#include <vector>

#include "writing_guest.hpp"

using namespace bench;

namespace {

struct Outcome {
  Downtime promised;
  Downtime measured;
};

Outcome measure(const WritingGuest::Options& guest, std::uint64_t rounds, std::uint64_t bandwidth) {
  WritingGuest here(guest);
  WritingGuest there(guest);
  const MigrationReport moved =
      move_guest(here, there, {.channels = 2, .bandwidth = bandwidth, .converge = {.rule = FixedRounds(rounds)}});
  return {.promised = moved.switchover.downtime, .measured = moved.downtime};
}

double milliseconds(Time time) { return 1e3 * seconds(time); }

}  // namespace

int main(int argc, char** argv) {
  std::size_t memory_mib = 256;
  std::size_t working_set_mib = 96;
  std::uint64_t rounds = 5;
  double bandwidth_mb = 200;
  unsigned fetch_ms = 250;
  unsigned repetitions = 5;
  CLI::App app("Measures what a slow dirty bitmap does to the promised downtime.", "slow_sync");
  app.add_option("--memory", memory_mib, "MiB of the guest")->capture_default_str();
  app.add_option("--working-set", working_set_mib, "MiB of them that it goes on writing")->capture_default_str();
  app.add_option("--rounds", rounds, "Rounds behind the first one")->capture_default_str();
  app.add_option("--bandwidth", bandwidth_mb, "Cap in MB/s over both channels")->capture_default_str();
  app.add_option("--fetch", fetch_ms, "ms that the slow fetch takes")->capture_default_str();
  app.add_option("--repetitions", repetitions, "Of each kind, in turn")->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  fmt::print("{} MiB, {} of them written to, {} rounds behind the first, cap {} MB/s; medians of {}\n", memory_mib,
             working_set_mib, rounds, bandwidth_mb, repetitions);
  fmt::print("{:<10} {:>12} {:>12}\n", "fetch ms", "promised ms", "measured ms");
  std::vector<double> promised[2], measured[2], ratios;
  for (unsigned i = 0; i < repetitions; ++i) {
    for (const bool slow : {i % 2 == 0, i % 2 != 0}) {
      const Outcome each = measure({.bytes = memory_mib << 20,
                                    .working_set = working_set_mib << 20,
                                    .fetch = std::chrono::milliseconds(slow ? fetch_ms : 0)},
                                   rounds, static_cast<std::uint64_t>(bandwidth_mb * 1e6));
      promised[slow].push_back(milliseconds(each.promised.total()));
      measured[slow].push_back(milliseconds(each.measured.total()));
    }
    ratios.push_back(promised[1].back() / promised[0].back());
  }
  for (const bool slow : {false, true})
    fmt::print("{:<10} {:>12.1f} {:>12.1f}\n", slow ? fetch_ms : 0, median(promised[slow]), median(measured[slow]));
  fmt::print("the slow one promises {:.3f} of the quick one's downtime\n", median(ratios));
}
