// SPDX-License-Identifier: MIT
//
// The hand-off of batches from one producer to N workers, against its rivals: what a batch costs when the workers do
// nothing with it, and what gets through when they work for it.
//
//   handoff/<scheme>/work_us:W/workers:N/slow:S     slow: worker 0's link is ten times slower (it sleeps, as send() does)
//   time: per batch. switches: context switches per batch, all threads. cpu_us: CPU time per batch, all threads, less
//   the work itself. slow_share: worker 0's share of the batches.
//   put_time/...: what put() takes at the producer, as percentiles
#include <benchmark/benchmark.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "handoff/locking.hpp"
#include "handoff/spsc_pairs.hpp"
#include "multifd/engine/batch_handoff.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using multifd::PageBatch;
using multifd::engine::Work;

constexpr unsigned depth = 16;  // as SenderOptions has it
constexpr std::size_t packet_pages = 128;

/// CPU work of a known length, which takes longer when the core is shared: as encoding and copying do.
class Spin {
 public:
  /// One copy for all: inlined, the loop was a tenth slower in one scheme than in another, for where it came to lie.
  [[gnu::noipa]] static void turns(std::uint64_t count) {
    std::uint64_t x = count;
    for (std::uint64_t i = 0; i < count; ++i) benchmark::DoNotOptimize(x = x * 6364136223846793005u + 1);
  }
  static std::uint64_t turns_per_us() {
    static const std::uint64_t calibrated = [] {
      double best = 1e9;
      constexpr std::uint64_t count = 1'000'000;
      for (int i = 0; i < 10; ++i) {
        const auto began = Clock::now();
        turns(count);
        best = std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - began).count());
      }
      return static_cast<std::uint64_t>(static_cast<double>(count) / best);
    }();
    return calibrated;
  }
};

struct Usage {
  long switches;
  double cpu_us;
  static Usage now() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto us = [](timeval t) { return 1e6 * static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec); };
    return {usage.ru_nvcsw + usage.ru_nivcsw, us(usage.ru_utime) + us(usage.ru_stime)};
  }
};

// One face for all: make(workers), and put() with one argument.

struct Shared {
  static constexpr const char* name = "shared_ring";
  explicit Shared(unsigned workers) : handoff(*multifd::engine::BatchHandoff::create(workers, depth, packet_pages)) {}
  std::unique_ptr<multifd::engine::BatchHandoff> handoff;
};
struct Pairs {
  static constexpr const char* name = "spsc_pairs";
  explicit Pairs(unsigned workers) : handoff(*rivals::SpscPairs::create(workers, depth, packet_pages)) {}
  std::unique_ptr<rivals::SpscPairs> handoff;
};
struct Semaphores {
  static constexpr const char* name = "semaphores";
  explicit Semaphores(unsigned workers) : handoff(std::make_unique<rivals::Semaphores>(workers, packet_pages)) {}
  std::unique_ptr<rivals::Semaphores> handoff;
};
struct CondVar {
  static constexpr const char* name = "condvar";
  explicit CondVar(unsigned workers) : handoff(std::make_unique<rivals::CondVar>(workers, depth, packet_pages)) {}
  std::unique_ptr<rivals::CondVar> handoff;
};

template <class H>
PageBatch* put(H& handoff, PageBatch* batch) {
  if constexpr (requires { handoff.put(batch); }) {
    return handoff.put(batch);
  } else {
    return handoff.put(batch, [] {});
  }
}

// A batch of the shared ring belongs to no channel.
template <class H>
void give_back(H& handoff, unsigned channel, PageBatch* batch) {
  if constexpr (requires { handoff.give_back(batch); }) {
    handoff.give_back(batch);
  } else {
    handoff.give_back(channel, batch);
  }
}

struct Result {
  double seconds = 0;
  double switches = 0;
  double cpu_us = 0;
  std::vector<std::uint64_t> taken;
};

/// Puts `batches`, ends, joins. `on_put(began)`: after each put().
template <class Scheme, class OnPut>
Result run(unsigned workers, std::uint64_t work_us, bool slow, std::uint64_t batches, OnPut&& on_put) {
  Scheme scheme(workers);
  auto& handoff = *scheme.handoff;
  Result result;
  result.taken.resize(workers);
  const std::uint64_t turns = work_us * Spin::turns_per_us();
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < workers; ++c) {
    threads.emplace_back([&, c] {
      std::uint64_t taken = 0;
      for (;;) {
        const Work work = handoff.take(c);
        if (work.kind != Work::Kind::batch) break;
        if (turns != 0) Spin::turns(turns);
        if (slow && c == 0) std::this_thread::sleep_for(std::chrono::microseconds(9 * work_us));
        ++taken;
        give_back(handoff, c, work.batch);
      }
      result.taken[c] = taken;
    });
  }
  const Usage before = Usage::now();
  const auto began = Clock::now();
  PageBatch* batch = handoff.first_batch();
  for (std::uint64_t i = 0; i < batches; ++i) {
    batch->push(i);
    on_put([&] { batch = put(handoff, batch); });
  }
  handoff.end();
  threads.clear();
  result.seconds = std::chrono::duration<double>(Clock::now() - began).count();
  const Usage after = Usage::now();
  result.switches = static_cast<double>(after.switches - before.switches);
  result.cpu_us = after.cpu_us - before.cpu_us;
  return result;
}

template <class Scheme>
void throughput(benchmark::State& state) {
  const auto work_us = static_cast<std::uint64_t>(state.range(0));
  const auto workers = static_cast<unsigned>(state.range(1));
  const bool slow = state.range(2) != 0;
  const std::uint64_t batches = work_us == 0 ? 50'000 : 600'000 / work_us;
  double switches = 0;
  double cpu_us = 0;
  std::uint64_t slow_taken = 0;
  std::uint64_t runs = 0;
  for (auto _ : state) {
    const Result result = run<Scheme>(workers, work_us, slow, batches, [](auto&& one) { one(); });
    state.SetIterationTime(result.seconds / static_cast<double>(batches));
    switches += result.switches;
    cpu_us += result.cpu_us - static_cast<double>(batches * work_us);
    slow_taken += result.taken[0];
    ++runs;
  }
  const auto all = static_cast<double>(runs * batches);
  state.counters["switches"] = switches / all;
  state.counters["cpu_us"] = cpu_us / all;
  if (slow) state.counters["slow_share"] = static_cast<double>(slow_taken) / all;
}

template <class Scheme>
void put_time(benchmark::State& state) {
  const auto workers = static_cast<unsigned>(state.range(0));
  constexpr std::uint64_t batches = 50'000;
  std::vector<double> times;
  times.reserve(batches);
  for (auto _ : state) {
    times.clear();
    const Result result = run<Scheme>(workers, 0, false, batches, [&](auto&& one) {
      const auto began = Clock::now();
      one();
      times.push_back(std::chrono::duration<double, std::nano>(Clock::now() - began).count());
    });
    state.SetIterationTime(result.seconds / static_cast<double>(batches));
  }
  std::ranges::sort(times);
  const auto at = [&](double share) {
    return times[static_cast<std::size_t>(share * static_cast<double>(batches - 1))];
  };
  state.counters["p50_ns"] = at(0.5);
  state.counters["p99_ns"] = at(0.99);
  state.counters["p999_ns"] = at(0.999);
}

template <class Scheme>
void add() {
  const std::string name = Scheme::name;
  benchmark::RegisterBenchmark(("handoff/" + name).c_str(), throughput<Scheme>)
      ->ArgNames({"work_us", "workers", "slow"})
      ->ArgsProduct({{0}, {1, 2}, {0}})
      ->ArgsProduct({{20, 100, 300}, {1, 2, 4}, {0}})
      ->ArgsProduct({{20, 100}, {2, 4}, {1}})
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
  benchmark::RegisterBenchmark(("put_time/" + name).c_str(), put_time<Scheme>)
      ->ArgName("workers")
      ->Arg(1)
      ->Arg(2)
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMicrosecond);
}

const bool registered = [] {
  add<Shared>();
  add<Pairs>();
  add<Semaphores>();
  add<CondVar>();
  return true;
}();

}  // namespace
