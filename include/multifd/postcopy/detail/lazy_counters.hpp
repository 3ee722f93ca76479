// SPDX-License-Identifier: MIT
//
// The counters of a LazyMemory while it runs.
#pragma once

#include <atomic>
#include <cstdint>

#include "multifd/config.hpp"
#include "multifd/postcopy/lazy_memory_options.hpp"

namespace multifd::postcopy::detail {

/// Threads: any. Wait-free. Relaxed throughout: a snapshot's counters may be some pages apart.
struct LazyCounters {
  class Counter {
   public:
    void add(std::uint64_t by = 1) noexcept { value_.fetch_add(by, std::memory_order_relaxed); }
    std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

   private:
    std::atomic<std::uint64_t> value_{0};
  };

  // Of fault threads.
  alignas(cache_line) Counter faults;
  Counter faults_fetched;
  Counter faults_zero;
  Counter faults_there;
  Counter urgent_pages;
  Counter removed_pages;
  // Of workers.
  alignas(cache_line) Counter background_pages;
  Counter zero_pages;
  Counter twice;
  Counter lost_fetchers;
  Counter gate_waits;
  Counter gate_wait_ns;

  LazyMemoryStats snapshot(std::uint64_t remaining) const noexcept {
    return {.faults = faults.get(),
            .faults_fetched = faults_fetched.get(),
            .faults_zero = faults_zero.get(),
            .faults_there = faults_there.get(),
            .urgent_pages = urgent_pages.get(),
            .background_pages = background_pages.get(),
            .zero_pages = zero_pages.get(),
            .removed_pages = removed_pages.get(),
            .twice = twice.get(),
            .remaining_pages = remaining,
            .lost_fetchers = lost_fetchers.get(),
            .gate_waits = gate_waits.get(),
            .gate_wait_ns = gate_wait_ns.get()};
  }
};

}  // namespace multifd::postcopy::detail
