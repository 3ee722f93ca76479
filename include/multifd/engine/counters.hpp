// SPDX-License-Identifier: MIT
//
// A channel's live counters: written by its one worker, read by stats() from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/stats.hpp"

namespace multifd::engine {

/// A number with one writer. Relaxed on both sides: no other data is published through it.
class Counter {
 public:
  void add(std::uint64_t n) noexcept { set(get() + n); }
  void set(std::uint64_t n) noexcept { value_.store(n, std::memory_order_relaxed); }
  std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

struct alignas(cache_line) ChannelCounters {
  Counter packets, syncs, normal_pages, zero_pages, payload_bytes, wire_bytes;
  Counter moved_bytes;  ///< of a sender, as each call of the transport moves them; its wire_bytes count whole packets
  Counter idle_ns, check_ns, codec_ns, capped_ns, io_ns, cpu_ns;

  /// A number that changes while bytes move, be it ever so slowly.
  std::uint64_t progress() const noexcept { return moved_bytes.get() + wire_bytes.get(); }

  ChannelStats snapshot(std::uint32_t id) const noexcept {
    return {.id = id,
            .packets = packets.get(),
            .syncs = syncs.get(),
            .normal_pages = normal_pages.get(),
            .zero_pages = zero_pages.get(),
            .payload_bytes = payload_bytes.get(),
            .wire_bytes = wire_bytes.get(),
            .idle_ns = idle_ns.get(),
            .check_ns = check_ns.get(),
            .codec_ns = codec_ns.get(),
            .capped_ns = capped_ns.get(),
            .io_ns = io_ns.get(),
            .cpu_ns = cpu_ns.get()};
  }
};

/// Splits a worker's time into stages: each lap() adds the time since the last one to a counter.
class StageClock {
 public:
  /// Adds the time since the call before to `stage`, and returns it.
  std::chrono::nanoseconds lap(Counter& stage) noexcept {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::nanoseconds time = now - std::exchange(last_, now);
    stage.add(static_cast<std::uint64_t>(time.count()));
    return time;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace multifd::engine
