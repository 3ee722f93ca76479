// SPDX-License-Identifier: MIT
//
// BandwidthEstimate: pages per second while pages are sent. The time that a round spends on fetching the dirty bitmap is
// not in it: a bitmap that takes 250 ms would otherwise make a fast link look slow, and the guest would never be stopped.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "multifd/migrate/round.hpp"

namespace multifd::migrate {

/// The bandwidth of the last rounds, in pages because a page that is zero, compresses well or has not changed costs less
/// than another one: the next pages are taken to be like the last.
///
/// Threads: one at a time. Cost: a few operations per round, no allocation.
class BandwidthEstimate {
 public:
  /// A round was sent. Params: `pages`: all that were to be sent, zero and unchanged ones included; `send`: from the
  /// first page to the last, without sync; `now`: when the last page was sent. A round without pages or time says nothing.
  void sent(std::uint64_t pages, Time send, Time now) noexcept {
    if (pages == 0 || send <= Time::zero()) return;
    rounds_[next_] = {static_cast<double>(pages), seconds(send)};
    next_ = (next_ + 1) % most;
    count_ = std::min(count_ + 1, most);
    double sum_pages = 0, sum_seconds = 0;
    for (std::size_t i = 0; i < count_ && sum_seconds < least_seconds; ++i) {
      const Sent& each = rounds_[(next_ + most - 1 - i) % most];
      sum_pages += each.pages;
      sum_seconds += each.seconds;
    }
    now_ = sum_pages / sum_seconds;
    usual_ = usual_ == 0 ? now_ : usual_ + (1 - std::exp(-seconds(now - last_) / memory_seconds)) * (now_ - usual_);
    last_ = now;
  }

  /// Pages per second over the last rounds: as many as make 200 ms, so that one short round does not decide, and a link that
  /// has become slow is noticed at once. 0 before the first round.
  double pages_per_s() const noexcept { return now_; }

  /// What the link has carried over the last 20 seconds: above pages_per_s() while the link is in a dip.
  double usual_pages_per_s() const noexcept { return usual_; }

 private:
  static constexpr std::size_t most = 16;
  static constexpr double least_seconds = 0.2;
  static constexpr double memory_seconds = 20;

  struct Sent {
    double pages = 0;
    double seconds = 0;
  };

  std::array<Sent, most> rounds_{};
  std::size_t next_ = 0;
  std::size_t count_ = 0;
  double now_ = 0;
  double usual_ = 0;
  Time last_{};
};

}  // namespace multifd::migrate
