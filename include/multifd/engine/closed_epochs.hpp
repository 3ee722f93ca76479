// SPDX-License-Identifier: MIT
//
// How far the channels of a sender are: which epochs each has closed, which channels have ended or are away, whether the
// receiver has confirmed. Threads that wait for one of these wait here.
//
// A channel is away while its connection is lost. Nobody waits for it; but an epoch is closed only when one channel at least
// has closed it: as long as none has, its batches may still lie in the ring.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "multifd/engine/monitor.hpp"

namespace multifd::engine {

/// Threads: closing(), closed(), leave(), rejoin(), channel_ended(), confirmed() by the workers; the others by any.
///
/// Every wait calls `check()` once in each `slice`; `check()` may call stop(). A wait returns whether its condition
/// came true.
class ClosedEpochs {
 public:
  explicit ClosedEpochs(unsigned channels) : channels_(channels) {}

  /// Channel `channel` is about to close one more epoch: all batches of it have been taken. A receiver may hear of that before
  /// closed() is called, and a channel that comes back then must not begin with that epoch.
  void closing(unsigned channel) noexcept {
    const Monitor::Lock held = monitor_.lock();
    most_ = std::max(most_, channels_[channel].closed + 1);
  }
  /// Channel `channel` has closed one more epoch.
  void closed(unsigned channel) noexcept {
    monitor_.update([&] { most_ = std::max(most_, ++channels_[channel].closed); });
  }
  /// The channel's connection is lost.
  void leave(unsigned channel) noexcept {
    monitor_.update([&] { channels_[channel].away = true; });
  }
  /// The channel has a new connection. Returns its first epoch: the first that no channel has begun to close.
  std::uint64_t rejoin(unsigned channel) noexcept {
    return monitor_.update([&] {
      channels_[channel] = {.closed = most_, .joined = most_};
      return most_;
    });
  }
  /// Whether the channel is there, and has been since before that epoch was closed.
  bool took_part(unsigned channel, std::uint64_t epoch) const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return !channels_[channel].away && channels_[channel].joined <= epoch;
  }
  /// How many channels are away.
  unsigned away() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return static_cast<unsigned>(std::ranges::count_if(channels_, &Channel::away));
  }
  /// A channel's worker has ended.
  void channel_ended() noexcept {
    monitor_.update([&] { ++ended_channels_; });
  }
  /// The receiver has confirmed that everything has arrived.
  void confirmed() noexcept {
    monitor_.update([&] { confirmed_ = true; });
  }

  /// Waits until every channel that is not away has closed `epoch`, counted from 0, and one has.
  template <class Check>
  bool wait(std::uint64_t epoch, std::chrono::nanoseconds slice, Check&& check) noexcept {
    const auto done = [&] {
      return most_ > epoch &&
             std::ranges::all_of(channels_, [&](const Channel& each) { return each.away || each.closed > epoch; });
    };
    return wait_for(done, slice, check);
  }
  /// Waits until every channel has ended.
  template <class Check>
  bool wait_for_channels(std::chrono::nanoseconds slice, Check&& check) noexcept {
    return wait_for([&] { return ended_channels_ == channels_.size(); }, slice, check);
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

  struct Channel {
    std::uint64_t closed = 0;  ///< so many epochs, those before it joined among them
    std::uint64_t joined = 0;  ///< its first epoch
    bool away = false;
  };

  Monitor monitor_;  ///< of all below
  std::vector<Channel> channels_;
  std::uint64_t most_ = 0;  ///< epochs that a channel has closed, or is about to
  std::size_t ended_channels_ = 0;
  bool confirmed_ = false;
};

}  // namespace multifd::engine
