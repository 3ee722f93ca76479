// SPDX-License-Identifier: MIT
//
// With real threads, since it is the kernel that says what they wanted.
#include "multifd/engine/core_demand.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <thread>
#include <vector>

#include "support/basics.hpp"

using multifd::engine::CoreDemand;
using namespace std::chrono_literals;

namespace {

void burn(std::chrono::microseconds time) {
  for (const auto end = std::chrono::steady_clock::now() + time; std::chrono::steady_clock::now() < end;) {
  }
}

/// Runs `workers` threads that do `work()` and sample(), until the limit is `wanted`.
template <class Work>
void run_until(CoreDemand& demand, unsigned workers, unsigned wanted, Work&& work) {
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < workers; ++i) {
    threads.emplace_back([&] {
      CoreDemand::Probe probe;
      while (demand.limit() != wanted) {
        work();
        demand.sample(probe);
      }
    });
  }
}

/// The same for so long.
template <class Work>
void run_for(std::chrono::milliseconds time, CoreDemand& demand, unsigned workers, Work&& work) {
  const auto end = std::chrono::steady_clock::now() + time;
  std::vector<std::jthread> threads;
  for (unsigned i = 0; i < workers; ++i) {
    threads.emplace_back([&] {
      CoreDemand::Probe probe;
      while (std::chrono::steady_clock::now() < end) {
        work();
        demand.sample(probe);
      }
    });
  }
}

bool kernel_tells() {
  if (std::filesystem::exists("/proc/thread-self/schedstat")) return true;
  MESSAGE("skipped: no /proc/thread-self/schedstat here");
  return false;
}

}  // namespace

TEST_CASE("As many as there are cores at first, and always all where they are no more") {
  CHECK(CoreDemand(5, 2).limit() == 2);
  CHECK(CoreDemand(5, 0).limit() == 1);  // the number of cores is not known
  CHECK(CoreDemand(3, 8).limit() == 3);
  CoreDemand demand(2, 2);
  run_for(50ms, demand, 2, [] { burn(50us); });
  CHECK(demand.limit() == 2);
}

TEST_CASE(
    "Workers that want more cores than there are: the limit falls to the cores; once they wait, it rises to all") {
  if (!kernel_tells()) return;
  const test::Watchdog limit("finding the limit", 120s);
  constexpr unsigned workers = 6;
  CoreDemand demand(workers, 1);
  run_until(demand, workers, workers, [] { std::this_thread::sleep_for(1ms); });
  CHECK(demand.limit() == workers);
  run_until(demand, workers, 1, [] { burn(50us); });
  CHECK(demand.limit() == 1);
  run_until(demand, workers, workers, [] { std::this_thread::sleep_for(1ms); });
  CHECK(demand.limit() == workers);
}

TEST_CASE("A worker that comes back after a while brings the limit up by itself") {
  if (!kernel_tells()) return;
  const test::Watchdog limit("finding the limit", 120s);
  constexpr unsigned workers = 6;
  CoreDemand demand(workers, 1);
  CoreDemand::Probe probe;
  for (unsigned before = demand.limit(); before < workers; before = demand.limit()) {
    for (unsigned looks = 0; demand.limit() == before; ++looks) {
      REQUIRE(looks < 5);
      std::this_thread::sleep_for(20ms);  // longer than the time it looks at
      demand.sample(probe);
    }
  }
}
