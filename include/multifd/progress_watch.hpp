// SPDX-License-Identifier: MIT
//
// A time limit on standing still: as long as bytes move, however slowly, the limit does not pass.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "multifd/time_limit.hpp"

namespace multifd {

/// Watches a sum of bytes, or of anything that grows as long as the work goes on: what Sender and Receiver wait by, for a
/// main connection beside them.
///
/// Threads: one, which calls stalled() at least every slice() while it waits.
class ProgressWatch {
 public:
  using Clock = std::chrono::steady_clock;

  /// A limit (time_limit.hpp) that can be added to the clock: "no limit" would overflow, and becomes a year.
  static constexpr std::chrono::milliseconds bounded(std::chrono::milliseconds limit) noexcept {
    constexpr std::chrono::milliseconds year = std::chrono::hours(24 * 365);
    return std::min(as_timeout(limit), year);
  }

  /// Begins to watch. `limit`: how long a sum may stay the same; `sum`: what it is now.
  ProgressWatch(std::chrono::milliseconds limit, std::uint64_t sum) noexcept
      : limit_(bounded(limit)), sum_(sum), since_(Clock::now()) {}

  /// How long to wait until the next call of stalled().
  std::chrono::nanoseconds slice() const noexcept {
    using namespace std::chrono_literals;
    return std::clamp<std::chrono::nanoseconds>(limit_ / 8, 1ms, 250ms);
  }

  /// Whether the sum has stayed the same for `limit`. `sum`: what it is now. `excused`: that this side itself holds
  /// everything back now, and the limit begins anew.
  bool stalled(std::uint64_t sum, bool excused = false) noexcept {
    const auto now = Clock::now();
    if (sum != sum_ || excused) {
      sum_ = sum;
      since_ = now;
    }
    return now - since_ >= limit_;
  }

 private:
  std::chrono::nanoseconds limit_;
  std::uint64_t sum_;
  Clock::time_point since_;
};

}  // namespace multifd
