// SPDX-License-Identifier: MIT
//
// The zero check: every kernel, and zero_page_mask() as the channels call it, against the loops that one would write
// and against what memory can do.
//
//   cold/<content>/<order>/<check>   2 GiB that no cache holds (MULTIFD_BENCH_MIB), 4 KiB pages; also with two threads
//   hot/<content>/<level>/<check>    the same few pages again and again
//   untouched/<check>                memory that was never touched: each page faults once
//
// Checks: plain_loop, avx2_loop (the baseline of the issue), kernel_<name>, zero_page_mask; beside them, as limits,
// read_in_order, read_<n>_streams, memcpy, and touch, which reads one word of each page. One thread is measured in
// processor time, so that what else runs on the machine takes less part; two threads by the clock.
//
// rows.py runs them in a fair order and prints the figures of the issue.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "arena.hpp"
#include "baselines.hpp"
#include "corpus.hpp"
#include "multifd/zero/policy.hpp"

namespace {

using kernels::Arena;
using kernels::page_bytes;

/// A way to find the zero pages among pages at `offsets`; returns how many there are.
struct Check {
  std::string name;
  std::function<std::size_t(const std::byte*, std::span<const std::uint64_t>)> count_zero;
};

Check page_by_page(std::string name, bool (*is_zero)(const void*, std::size_t) noexcept) {
  return {std::move(name), [is_zero](const std::byte* host, std::span<const std::uint64_t> offsets) {
            std::size_t zero = 0;
            for (const std::uint64_t offset : offsets) zero += is_zero(host + offset, page_bytes);
            return zero;
          }};
}

/// What a channel's worker does.
std::size_t count_by_policy(const std::byte* host, std::span<const std::uint64_t> offsets) {
  const multifd::ZeroPagesMultifd policy;
  std::size_t zero = 0;
  for (std::size_t first = 0; first < offsets.size(); first += multifd::zero_mask_pages) {
    const auto group = offsets.subspan(first, std::min(multifd::zero_mask_pages, offsets.size() - first));
    std::array<const std::byte*, multifd::zero_mask_pages> pages;
    for (std::size_t i = 0; i < group.size(); ++i) pages[i] = host + group[i];
    zero += static_cast<std::size_t>(std::popcount(policy.zero_mask({{}, page_bytes, group, pages.data()})));
  }
  return zero;
}

/// One word of each page: the least that finding a non-zero first word can cost.
[[gnu::noinline]] std::size_t touch(const std::byte* host, std::span<const std::uint64_t> offsets) {
  std::uint64_t any = 0;
  for (const std::uint64_t offset : offsets) {
    std::uint64_t word;
    std::memcpy(&word, host + offset, sizeof word);
    any |= word;
  }
  return static_cast<std::size_t>(any);
}

std::vector<Check> checks() {
  std::vector<Check> all{page_by_page("plain_loop", kernels::plain_loop)};
#if MULTIFD_X86_64
  if (__builtin_cpu_supports("avx2")) all.push_back(page_by_page("avx2_loop", kernels::avx2_loop));
#endif
  for (const multifd::ZeroKernel& kernel : multifd::zero_kernels())
    if (kernel.supported) all.push_back(page_by_page("kernel_" + std::string(kernel.name), kernel.is_zero));
  all.push_back({"zero_page_mask", count_by_policy});
  all.push_back({"touch", touch});
  return all;
}

/// What the pages hold.
enum class Content { zero, first_word, last_byte, random_byte, mixed, guest };
constexpr std::array content_names{"zero", "first_word", "last_byte", "random_byte", "mixed", "guest"};

/// Makes zero memory hold something. A corpus is made once for 64 MiB and repeated.
void fill(std::span<std::byte> memory, Content content) {
  if (content == Content::mixed || content == Content::guest) {
    const std::size_t part = std::min(memory.size(), std::size_t{64} << 20);
    corpus::fill(memory.first(part), content_names[static_cast<std::size_t>(content)], 1);
    for (std::size_t at = part; at < memory.size(); at += part)
      std::memcpy(memory.data() + at, memory.data(), std::min(part, memory.size() - at));
    return;
  }
  corpus::Random random(1);
  for (std::size_t at = 0; at < memory.size(); at += page_bytes) {
    if (content == Content::first_word) memory[at] = std::byte{1};
    if (content == Content::last_byte) memory[at + page_bytes - 1] = std::byte{1};
    if (content == Content::random_byte) memory[at + random.below(page_bytes)] = std::byte{1};
  }
}

/// The cold memory with this content: kept until another content is asked for.
std::span<std::byte> cold_memory(Content content) {
  static std::unique_ptr<Arena> arena;
  static Content holds{};
  if (arena == nullptr || holds != content) {
    arena = nullptr;
    arena = std::make_unique<Arena>(kernels::cold_bytes());
    arena->populate();
    fill(arena->bytes(), content);
    holds = content;
  }
  return arena->bytes();
}

std::vector<std::uint64_t> offsets_of(std::size_t pages, bool shuffled) {
  std::vector<std::uint64_t> offsets(pages);
  for (std::size_t i = 0; i < pages; ++i) offsets[i] = i * page_bytes;
  if (shuffled) {
    corpus::Random random(7);
    for (std::size_t i = pages; i > 1; --i) std::swap(offsets[i - 1], offsets[random.below(i)]);
  }
  return offsets;
}

/// `state.iterations()` times `pages` pages were looked at by each of its threads.
void count_pages(benchmark::State& state, std::size_t pages) {
  const auto all = static_cast<double>(pages) * static_cast<double>(state.iterations());
  state.counters["ns_per_page"] = benchmark::Counter(
      all / 1e9, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);  // seconds / (all / 1e9)
  state.counters["bytes_per_second"] =
      benchmark::Counter(all * static_cast<double>(page_bytes), benchmark::Counter::kIsRate);
}

void run_cold(benchmark::State& state, const Check& check, Content content, bool shuffled) {
  static std::span<std::byte> memory;
  static std::vector<std::uint64_t> offsets;
  if (state.thread_index() == 0) {
    memory = cold_memory(content);
    offsets = offsets_of(memory.size() / page_bytes, shuffled);
  }
  std::size_t share = 0;
  for (auto _ : state) {  // its first step waits for all threads
    share = offsets.size() / static_cast<std::size_t>(state.threads());
    const std::size_t first = share * static_cast<std::size_t>(state.thread_index());
    benchmark::DoNotOptimize(check.count_zero(memory.data(), std::span(offsets).subspan(first, share)));
  }
  count_pages(state, share);
}

void run_hot(benchmark::State& state, const Check& check, Content content, std::size_t pages) {
  const Arena arena(pages * page_bytes);
  arena.populate();
  fill(arena.bytes(), content);
  const std::vector<std::uint64_t> offsets = offsets_of(pages, false);
  for (auto _ : state) benchmark::DoNotOptimize(check.count_zero(arena.bytes().data(), offsets));
  count_pages(state, pages);
}

void run_untouched(benchmark::State& state, const Check& check) {
  const Arena arena(std::min(kernels::cold_bytes(), std::size_t{256} << 20));
  const std::vector<std::uint64_t> offsets = offsets_of(arena.pages(), false);
  for (auto _ : state) {
    state.PauseTiming();
    arena.forget();
    state.ResumeTiming();
    benchmark::DoNotOptimize(check.count_zero(arena.bytes().data(), offsets));
  }
  count_pages(state, arena.pages());
}

#if MULTIFD_X86_64
void run_read(benchmark::State& state, std::uint64_t (*read)(const std::byte*, std::size_t) noexcept) {
  static std::span<std::byte> memory;
  if (state.thread_index() == 0) memory = cold_memory(Content::zero);
  std::size_t share = 0;
  for (auto _ : state) {
    share = memory.size() / static_cast<std::size_t>(state.threads());
    const std::byte* const from = memory.data() + share * static_cast<std::size_t>(state.thread_index());
    benchmark::DoNotOptimize(read(from, share));
  }
  count_pages(state, share / page_bytes);
}

/// Once over the same pages as a whole, without a branch for each.
void run_hot_read(benchmark::State& state, std::size_t pages) {
  const Arena arena(pages * page_bytes);
  arena.populate();
  for (auto _ : state) benchmark::DoNotOptimize(kernels::read_in_order(arena.bytes().data(), arena.bytes().size()));
  count_pages(state, pages);
}
#endif

/// Copies one half over the other; counts the bytes copied.
void run_memcpy(benchmark::State& state) {
  static std::span<std::byte> memory;
  if (state.thread_index() == 0) memory = cold_memory(Content::zero);
  std::size_t share = 0;
  for (auto _ : state) {
    share = memory.size() / 2 / static_cast<std::size_t>(state.threads());
    std::byte* const to = memory.data() + share * static_cast<std::size_t>(state.thread_index());
    std::memcpy(to, to + memory.size() / 2, share);
    benchmark::ClobberMemory();
  }
  count_pages(state, share / page_bytes);
}

template <class Body>
void add_cold(const std::string& name, int threads, Body body) {
  auto* const added = benchmark::RegisterBenchmark((name + "/threads" + std::to_string(threads)).c_str(), body)
                          ->Iterations(1)
                          ->Threads(threads)
                          ->Unit(benchmark::kMillisecond);
  if (threads > 1) added->UseRealTime();
}

template <class Body>
void add_hot(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(), body)->MinTime(0.02);
}

const bool registered = [] {
  static const std::vector<Check> all = checks();
  for (std::size_t c = 0; c < content_names.size(); ++c) {
    const auto content = static_cast<Content>(c);
    for (const bool shuffled : {false, true}) {
      const std::string name = std::string("cold/") + content_names[c] + (shuffled ? "/random/" : "/in_order/");
      for (const Check& check : all) {
        for (const int threads : {1, 2})
          add_cold(name + check.name, threads,
                   [=, &check](benchmark::State& state) { run_cold(state, check, content, shuffled); });
      }
    }
    if (content != Content::zero) continue;
    for (const int threads : {1, 2}) {
#if MULTIFD_X86_64
      if (__builtin_cpu_supports("avx2")) {
        for (const auto& [name, read] : {std::pair{"read_in_order", &kernels::read_in_order},
                                         {"read_4_streams", &kernels::read_streams<4>},
                                         {"read_8_streams", &kernels::read_streams<8>}})
          add_cold(std::string("cold/zero/in_order/") + name, threads,
                   [read = read](benchmark::State& state) { run_read(state, read); });
      }
#endif
      add_cold("cold/zero/in_order/memcpy", threads, run_memcpy);
    }
  }
  for (const Content content : {Content::zero, Content::first_word, Content::last_byte, Content::random_byte}) {
    for (const auto& [level, pages] : {std::pair{"L1", std::size_t{4}}, std::pair{"L2", std::size_t{64}}}) {
      const std::string name =
          std::string("hot/") + content_names[static_cast<std::size_t>(content)] + "/" + level + "/";
      for (const Check& check : all)
        add_hot(name + check.name, [=, &check](benchmark::State& state) { run_hot(state, check, content, pages); });
#if MULTIFD_X86_64
      if (content == Content::zero && __builtin_cpu_supports("avx2"))
        add_hot(name + "read_in_order", [=](benchmark::State& state) { run_hot_read(state, pages); });
#endif
    }
  }
  for (const Check& check : all)
    benchmark::RegisterBenchmark(("untouched/" + check.name).c_str(),
                                 [&check](benchmark::State& state) { run_untouched(state, check); })
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
  return true;
}();

}  // namespace
