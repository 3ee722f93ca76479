// SPDX-License-Identifier: MIT
//
// What SourceOptions::skip_unchanged saves and costs: whole migrations over loopback of a guest that goes on writing, values that are
// equal to what is there or not, with the filter and without it in turn.
#include <fmt/format.h>

#include <multifd/migrate/destination.hpp>
#include <multifd/migrate/dirty/dirty_pages.hpp>
#include <multifd/migrate/fixed_downtime.hpp>
#include <multifd/migrate/source.hpp>
#include <multifd/multifd.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stop_token>
#include <thread>
#include <vector>

using namespace multifd;
using namespace multifd::migrate;

namespace {

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

[[noreturn]] void give_up(const Error& error) {
  fmt::print(stderr, "skip_unchanged: {}\n", describe(error));
  std::exit(1);
}

template <class T>
T need(Result<T> result) {
  if (!result) give_up(result.error());
  return std::move(*result);
}

class Guest {
 public:
  Guest(std::size_t bytes, std::size_t working_set, bool equal)
      : memory_(bytes), pages_(working_set / page), equal_(equal) {
    std::mt19937_64 random(1);
    for (std::size_t at = 0; at < bytes; at += 8) {
      const std::uint64_t word = random();
      std::memcpy(&memory_[at], &word, 8);
    }
  }

  Result<RamMap> ram() { return ram_; }
  DirtyPages& dirty_source() { return dirty_; }
  Result<void> pause() {
    vcpu_ = {};
    return {};
  }
  Result<void> resume() {
    vcpu_ = std::jthread([this](const std::stop_token& stop) { write(stop); });
    return {};
  }
  Result<void> save(StateWriter& to) { return to.device({.idstr = "vcpu"}, {}); }
  Result<RamMap> prepare(const Announcement&) { return ram_; }
  Result<void> load(StateReader& from) {
    while (true) {
      MULTIFD_TRY_ASSIGN(const auto device, from.next());
      if (!device) return {};
    }
  }

 private:
  static constexpr std::size_t page = 4096;

  /// Goes over the working set, a page in each 2 us, which leaves the cores to the migration.
  void write(const std::stop_token& stop) {
    auto due = std::chrono::steady_clock::now();
    for (std::uint64_t number = 0; !stop.stop_requested(); ++number) {
      if (number % 512 == 0) std::this_thread::sleep_until(due += std::chrono::milliseconds(1));
      const std::size_t at = number % pages_ * page;
      std::atomic_ref word(*reinterpret_cast<std::uint64_t*>(&memory_[at]));
      word.store(equal_ ? word.load(std::memory_order_relaxed) : number, std::memory_order_relaxed);
      dirty_.mark(BlockId{0}, at, 8);
    }
  }

  std::vector<std::byte> memory_;
  RamMap ram_{page};
  BlockId block_ = need(ram_.add("pc.ram", memory_));
  DirtyPages dirty_ = need(DirtyPages::create(ram_));
  std::size_t pages_;
  bool equal_;
  std::jthread vcpu_;
};

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
  Guest here(bytes, working_set, equal);
  Guest there(bytes, working_set, equal);
  Listener listener = need(Listener::listen({.host = "127.0.0.1"}));
  Result<ArrivalReport> taken = fail(Errc::cancelled, Stage::none);
  static_cast<void>(here.resume());
  const double cpu = cpu_seconds();
  const auto moved = [&] {
    std::jthread destination([&] { taken = migrate_from<Stacks>(there, listener); });
    return need(migrate_to<Stacks>(
        here, listener.local_address(),
        {.channels = 2, .bandwidth = bandwidth, .converge = {.rule = FixedRounds(rounds)}, .skip_unchanged = filter}));
  }();
  if (!taken) give_up(taken.error());
  static_cast<void>(there.pause());
  Outcome outcome{.cpu_seconds = cpu_seconds() - cpu};
  for (const Round& round : moved.rounds) {
    (round.number == 0 ? outcome.bulk_bytes : outcome.later_bytes) += static_cast<double>(round.wire_bytes);
    outcome.seconds += seconds(round.send);
  }
  return outcome;
}

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
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
