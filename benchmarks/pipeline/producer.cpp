// SPDX-License-Identifier: MIT
//
// What a page costs the producer, the thread that a VMM lends: queueing runs, a dirty bitmap, single pages. The links
// take everything at once and send nothing, and there is no zero check, so nothing but the library is measured.
//
// Pages are queued in bursts for which the hand-off has room: waiting for workers is not the producer's cost, waking
// them is.
//
//   producer/<call>/workers:N   cpu_ns: CPU time of the producer's thread per page. wall_ns: time per page.
//   producer/plain_loop         the offsets of the same runs written to an array of 128: what no hand-off at all costs
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <chrono>
#include <ctime>
#include <vector>

#include "corpus.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/sender.hpp"
#include "null_transport.hpp"

namespace {

using namespace multifd;

using NullSender = Sender<NullTransport, NoComp, ZeroPagesNone>;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t guest_bytes = std::uint64_t{16} << 30;  // address space that is never read or written
constexpr std::uint64_t guest_pages = guest_bytes / page;
constexpr unsigned depth = 16;  // batches per channel: the default for up to four channels

std::span<std::byte> guest() {
  static void* const memory =
      ::mmap(nullptr, guest_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return {static_cast<std::byte*>(memory), guest_bytes};
}

double thread_cpu_ns() { return static_cast<double>(multifd::thread_cpu_ns()); }

void check(const auto& result) {
  if (!result) throw std::runtime_error(describe(result.error()));
}

/// Queues all pages in bursts that the hand-off has room for, so that the producer never waits: `queue(sender, block,
/// page, pages)` queues what is dirty among that many pages of guest memory, and returns how many those were. Not
/// timed: waiting between bursts until all is written.
template <class Queue>
void measure(benchmark::State& state, std::uint64_t pages_for_one, Queue&& queue) {
  RamMap ram;
  const BlockId block = ram.add_read_only("ram", guest()).value();
  const auto workers = static_cast<unsigned>(state.range(0));
  const std::uint64_t burst = workers * depth * ram.batch_pages() / 2;
  double cpu = 0;
  double wall = 0;
  double pages = 0;
  for (auto _ : state) {
    auto sender = NullSender::open(ram, std::vector<NullTransport>(workers), {.depth = depth}).value();
    double seconds = 0;
    std::uint64_t queued = 0;
    const std::uint64_t step = burst * pages_for_one / 64 * 64;
    for (std::uint64_t first = 0; first + step <= guest_pages; first += step) {
      const double cpu_before = thread_cpu_ns();
      const auto began = std::chrono::steady_clock::now();
      queued += queue(sender, block, first, step);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
      cpu += thread_cpu_ns() - cpu_before;
      check(sender.close_epoch_and_wait());
    }
    if (sender.stats().producer_waits != 0) throw std::runtime_error("the producer has waited");
    check(sender.close_channels());
    wall += 1e9 * seconds;
    pages += static_cast<double>(queued);
    state.SetIterationTime(seconds / static_cast<double>(queued));
  }
  state.counters["cpu_ns"] = cpu / pages;
  state.counters["wall_ns"] = wall / pages;
}

void runs(benchmark::State& state) {
  measure(state, 1, [](NullSender& sender, BlockId block, std::uint64_t first, std::uint64_t count) {
    check(sender.queue_range(block, first * page, count * page));
    return count;
  });
}

/// Every page dirty with the given chance in a thousand, independent of its neighbours: the shortest runs.
template <unsigned PerMille>
void bitmap(benchmark::State& state) {
  corpus::Random random(PerMille);
  std::vector<std::uint64_t> dirty(guest_pages / 64);
  for (std::uint64_t i = 0; i < guest_pages; ++i)
    if (random.below(1000) < PerMille) dirty[i / 64] |= std::uint64_t{1} << i % 64;
  measure(state, 1000 / PerMille, [&](NullSender& sender, BlockId block, std::uint64_t first, std::uint64_t count) {
    const auto queued = sender.queue_dirty(block, std::span(dirty).subspan(first / 64, count / 64), first);
    check(queued);
    return queued->queued;
  });
}

void single(benchmark::State& state) {
  measure(state, 1, [](NullSender& sender, BlockId block, std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t i = first; i < first + count; ++i)
      if (!sender.queue_page(block, i * page)) throw std::runtime_error("queue_page");
    return count;
  });
}

void plain_loop(benchmark::State& state) {
  std::vector<std::uint64_t> slots(128);
  for (auto _ : state) {
    const auto began = std::chrono::steady_clock::now();
    for (std::uint64_t i = 0; i < guest_pages; ++i) {
      slots[i % 128] = i * page;
      benchmark::ClobberMemory();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    benchmark::DoNotOptimize(slots.data());
    state.SetIterationTime(seconds / static_cast<double>(guest_pages));
    state.counters["wall_ns"] = 1e9 * seconds / static_cast<double>(guest_pages);
  }
}

void settings(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("workers")->Arg(2)->Arg(4)->UseManualTime()->Iterations(1)->Unit(benchmark::kNanosecond);
}

BENCHMARK(runs)->Name("producer/runs")->Apply(settings);
BENCHMARK(bitmap<500>)->Name("producer/bitmap_half")->Apply(settings);
BENCHMARK(bitmap<20>)->Name("producer/bitmap_2_percent")->Apply(settings);
BENCHMARK(single)->Name("producer/single_pages")->Apply(settings);
BENCHMARK(plain_loop)->Name("producer/plain_loop")->UseManualTime()->Iterations(1)->Unit(benchmark::kNanosecond);

}  // namespace
