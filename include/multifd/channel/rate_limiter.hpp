// SPDX-License-Identifier: MIT
//
// The bandwidth cap: one token bucket for all channels of a sender, changeable while it runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace multifd {

/// Threads: any. acquire() may block on the cap; without a cap it is one relaxed load.
///
/// A mutex is right here: it is taken once a packet, only under a cap, by threads that are about to wait anyway.
class RateLimiter {
 public:
  using Clock = std::chrono::steady_clock;

  explicit RateLimiter(std::uint64_t bytes_per_s) noexcept : rate_(bytes_per_s) {}

  /// Sets the cap; 0 lifts it. Waiting threads go by the new cap at once.
  void set_rate(std::uint64_t bytes_per_s) noexcept {
    {
      const std::lock_guard lock(mutex_);
      rate_.store(bytes_per_s, std::memory_order_relaxed);
      next_ = Clock::time_point{};
      ++generation_;
    }
    changed_.notify_all();
  }

  std::uint64_t rate() const noexcept { return rate_.load(std::memory_order_relaxed); }

  /// Waits until `bytes` more may go out; false when stopped while it waits. Without a cap always true.
  bool acquire(std::uint64_t bytes) noexcept {
    if (rate_.load(std::memory_order_relaxed) == 0) return true;
    std::unique_lock lock(mutex_);
    while (!stopped_) {
      const std::uint64_t rate = rate_.load(std::memory_order_relaxed);
      if (rate == 0) return true;
      // What was not used in the last moments may be sent at once, no more: that is the bucket's depth.
      const auto start = std::max(next_, Clock::now() - burst);
      next_ = start + std::chrono::nanoseconds(
                          static_cast<std::int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(rate)));
      const std::uint64_t mine = generation_;
      changed_.wait_until(lock, start, [&] { return stopped_ || generation_ != mine; });
      if (!stopped_ && generation_ == mine) return true;
    }
    return false;
  }

  /// Ends every wait, now and later.
  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
  }

 private:
  static constexpr std::chrono::milliseconds burst{20};

  std::atomic<std::uint64_t> rate_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Clock::time_point next_{};  ///< when the bytes granted so far are used up
  std::uint64_t generation_ = 0;
  bool stopped_ = false;
};

}  // namespace multifd
