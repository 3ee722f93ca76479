// SPDX-License-Identifier: MIT
//
// What fault threads and workers add latencies to, as fault_latency.hpp has them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "multifd/postcopy/fault_latency.hpp"

namespace multifd::postcopy::detail {

/// Threads: any, all methods; wait-free but for the longest, which is lock-free.
class LatencyCounters {
 public:
  void add(std::chrono::nanoseconds waited) noexcept {
    const auto ns = static_cast<std::uint64_t>(std::max<std::chrono::nanoseconds::rep>(waited.count(), 0));
    const std::size_t bucket = std::min<std::size_t>(ns == 0 ? 0 : static_cast<std::size_t>(std::bit_width(ns)) - 1,
                                                     FaultLatency::buckets_of - 1);
    // Relaxed, all: a snapshot is of counters that are some faults apart.
    buckets_[bucket].fetch_add(1, std::memory_order_relaxed);
    total_ns_.fetch_add(ns, std::memory_order_relaxed);
    std::uint64_t most = most_ns_.load(std::memory_order_relaxed);
    while (ns > most && !most_ns_.compare_exchange_weak(most, ns, std::memory_order_relaxed)) {
    }
  }

  /// Cost: some loads.
  FaultLatency snapshot() const noexcept {
    FaultLatency all;
    for (std::size_t i = 0; i < all.buckets.size(); ++i) all.buckets[i] = buckets_[i].load(std::memory_order_relaxed);
    all.total_ns = total_ns_.load(std::memory_order_relaxed);
    all.most_ns = most_ns_.load(std::memory_order_relaxed);
    return all;
  }

 private:
  std::array<std::atomic<std::uint64_t>, FaultLatency::buckets_of> buckets_{};
  std::atomic<std::uint64_t> total_ns_{0};
  std::atomic<std::uint64_t> most_ns_{0};
};

}  // namespace multifd::postcopy::detail
