// SPDX-License-Identifier: MIT
//
// How far the channels of a sender are: which epochs each has closed, which channels have ended, whether the receiver
// has confirmed. Threads that wait for one of these wait here.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "multifd/engine/monitor.hpp"

namespace multifd::engine {

/// Threads: closed(), channel_ended(), confirmed() by the workers; the waits and stop() by any.
///
/// Every wait calls `check()` once in each `slice`; `check()` may call stop(). A wait returns whether its condition
/// came true.
class ClosedEpochs {
 public:
  explicit ClosedEpochs(unsigned channels) : closed_(channels, 0) {}

  /// Channel `channel` has closed one more epoch.
  void closed(unsigned channel) noexcept {
    monitor_.update([&] { ++closed_[channel]; });
  }
  /// A channel's worker has ended.
  void channel_ended() noexcept {
    monitor_.update([&] { ++ended_channels_; });
  }
  /// The receiver has confirmed that everything has arrived.
  void confirmed() noexcept {
    monitor_.update([&] { confirmed_ = true; });
  }

  /// Waits until every channel has closed `epoch`, counted from 0.
  template <class Check>
  bool wait(std::uint64_t epoch, std::chrono::nanoseconds slice, Check&& check) noexcept {
    return wait_for([&] { return std::ranges::min(closed_) > epoch; }, slice, check);
  }
  /// Waits until every channel has ended.
  template <class Check>
  bool wait_for_channels(std::chrono::nanoseconds slice, Check&& check) noexcept {
    return wait_for([&] { return ended_channels_ == closed_.size(); }, slice, check);
  }
  /// Waits for confirmed().
  template <class Check>
  bool wait_for_confirmation(std::chrono::nanoseconds slice, Check&& check) noexcept {
    return wait_for([&] { return confirmed_; }, slice, check);
  }

  void stop() noexcept { monitor_.stop(); }

 private:
  template <class Done, class Check>
  bool wait_for(Done&& done, std::chrono::nanoseconds slice, Check&& check) noexcept {
    Monitor::Lock held = monitor_.lock();
    monitor_.wait(held, slice, done, [&] {
      check();
      return true;
    });
    return done();
  }

  Monitor monitor_;
  std::vector<std::uint64_t> closed_;
  std::size_t ended_channels_ = 0;
  bool confirmed_ = false;
};

}  // namespace multifd::engine
