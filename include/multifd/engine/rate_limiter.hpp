// SPDX-License-Identifier: MIT
//
// The bandwidth cap: one token bucket for all channels of a sender, or of a path, changeable while it runs.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "multifd/engine/monitor.hpp"

namespace multifd::engine {

/// How a wait for the cap has ended.
enum class Grant : std::uint8_t { granted, timed_out, ended };

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

  /// How much of `bytes` to ask for at once: without a cap all. The larger a piece, the further what leaves in a moment is
  /// from the cap, and the longer a channel stands still while all others have their turn.
  std::size_t piece(std::size_t bytes) const noexcept {
    const std::uint64_t rate = this->rate();
    return rate == 0 ? bytes
                     : std::min<std::size_t>(bytes, std::clamp<std::uint64_t>(rate / 100, least_piece, most_piece));
  }

  /// Waits until `bytes` more may go out; false when stopped while it waits. Without a cap always true.
  bool acquire(std::uint64_t bytes) noexcept {
    return acquire(bytes, Clock::time_point::max(), [] { return false; }) == Grant::granted;
  }
  /// The same with a deadline, and with an end that is this caller's alone: `ended()`, which is asked at once after wake(),
  /// and every `slice`. It is called with the monitor held, so it must not call this object. What is not granted does not
  /// count; nothing is granted once `ended()`.
  template <class Ended>
  Grant acquire(std::uint64_t bytes, Clock::time_point deadline, Ended&& ended,
                std::chrono::milliseconds slice = Monitor::longest_wait) noexcept {
    if (rate_.load(std::memory_order_relaxed) == 0) return Grant::granted;
    Monitor::Lock held = monitor_.lock();
    for (;;) {
      if (monitor_.stopped(held) || ended()) return Grant::ended;
      const std::uint64_t rate = rate_.load(std::memory_order_relaxed);
      if (rate == 0) return Grant::granted;
      // The bucket's depth: what the cap allowed in the last 20 ms and was not used may leave at once, and no more.
      const auto start = std::max(next_, Clock::now() - burst);
      const bool in_time = start <= deadline;
      if (in_time) next_ = start + time_of(bytes, rate);
      const std::uint64_t mine = generation_;
      waiting_.fetch_add(1, std::memory_order_relaxed);
      const auto until = std::min(start, deadline);
      const auto changed = [&] { return generation_ != mine || ended(); };
      for (auto now = Clock::now(); now < until; now = Clock::now())
        if (monitor_.wait_until(held, std::min(until, now + slice), changed)) break;
      waiting_.fetch_sub(1, std::memory_order_relaxed);
      if (generation_ != mine) continue;
      if (monitor_.stopped(held) || ended()) {
        if (in_time) next_ -= time_of(bytes, rate);
        return Grant::ended;
      }
      return in_time ? Grant::granted : Grant::timed_out;
    }
  }

  /// Gives back what was granted and has not gone out.
  void give_back(std::uint64_t bytes) noexcept {
    const Monitor::Lock held = monitor_.lock();
    if (const std::uint64_t rate = this->rate(); rate != 0) next_ -= time_of(bytes, rate);
  }

  /// Counts bytes that have gone out without a grant: what comes behind waits for them.
  void charge(std::uint64_t bytes) noexcept {
    if (rate() == 0) return;
    const Monitor::Lock held = monitor_.lock();
    if (const std::uint64_t rate = this->rate(); rate != 0)
      next_ = std::max(next_, Clock::now() - burst) + time_of(bytes, rate);
  }

  /// Makes every wait ask its `ended()`.
  void wake() noexcept {
    monitor_.update([] {});
  }

  /// Whether a thread waits for the cap just now. Relaxed: whoever asks looks again soon.
  bool holds_back() const noexcept { return waiting_.load(std::memory_order_relaxed) != 0; }

  /// Ends every wait, now and later.
  void stop() noexcept { monitor_.stop(); }

 private:
  static constexpr std::chrono::milliseconds burst{20};
  static constexpr std::uint64_t least_piece = 512;
  static constexpr std::uint64_t most_piece = 64 * 1024;

  static std::chrono::nanoseconds time_of(std::uint64_t bytes, std::uint64_t rate) noexcept {
    return std::chrono::nanoseconds(
        static_cast<std::int64_t>(static_cast<double>(bytes) * 1e9 / static_cast<double>(rate)));
  }

  std::atomic<std::uint64_t> rate_;
  std::atomic<unsigned> waiting_{0};  ///< threads in acquire()
  Monitor monitor_;
  Clock::time_point next_{};  ///< when the bytes granted so far are used up
  std::uint64_t generation_ = 0;
};

}  // namespace multifd::engine
