// SPDX-License-Identifier: MIT
//
// The bandwidth cap: one token bucket for all channels of a sender, changeable while it runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

#include "multifd/engine/monitor.hpp"

namespace multifd::engine {

/// Threads: any. acquire() may block on the cap; without a cap it is one relaxed load.
///
/// A monitor is right here: it is entered once a packet, only under a cap, by threads that are about to wait anyway.
class RateLimiter {
 public:
  using Clock = std::chrono::steady_clock;

  explicit RateLimiter(std::uint64_t bytes_per_s) noexcept : rate_(bytes_per_s) {}

  /// Sets the cap; 0 lifts it. Waiting threads go by the new cap at once.
  void set_rate(std::uint64_t bytes_per_s) noexcept {
    monitor_.update([&] {
      rate_.store(bytes_per_s, std::memory_order_relaxed);
      next_ = Clock::time_point{};
      ++generation_;
    });
  }

  std::uint64_t rate() const noexcept { return rate_.load(std::memory_order_relaxed); }

  /// Waits until `bytes` more may go out; false when stopped while it waits. Without a cap always true.
  bool acquire(std::uint64_t bytes) noexcept {
    if (rate_.load(std::memory_order_relaxed) == 0) return true;
    Monitor::Lock held = monitor_.lock();
    while (!monitor_.stopped(held)) {
      const std::uint64_t rate = rate_.load(std::memory_order_relaxed);
      if (rate == 0) return true;
      // The bucket's depth: what the cap allowed in the last 20 ms and was not used may leave at once, and no more.
      const auto start = std::max(next_, Clock::now() - burst);
      next_ = start + std::chrono::nanoseconds(
                          static_cast<std::int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(rate)));
      const std::uint64_t mine = generation_;
      waiting_.fetch_add(1, std::memory_order_relaxed);
      monitor_.wait_until(held, start, [&] { return generation_ != mine; });
      waiting_.fetch_sub(1, std::memory_order_relaxed);
      if (!monitor_.stopped(held) && generation_ == mine) return true;
    }
    return false;
  }

  /// Whether a thread waits for the cap just now. Relaxed: whoever asks looks again soon.
  bool holds_back() const noexcept { return waiting_.load(std::memory_order_relaxed) != 0; }

  /// Ends every wait, now and later.
  void stop() noexcept { monitor_.stop(); }

 private:
  static constexpr std::chrono::milliseconds burst{20};

  std::atomic<std::uint64_t> rate_;
  std::atomic<unsigned> waiting_{0};  ///< threads in acquire()
  Monitor monitor_;
  Clock::time_point next_{};  ///< when the bytes granted so far are used up
  std::uint64_t generation_ = 0;
};

}  // namespace multifd::engine
