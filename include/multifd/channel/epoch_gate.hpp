// SPDX-License-Identifier: MIT
//
// For a sender who wants to know that an epoch is out, or everything: waits until every channel has written the SYNC
// that ends it, or has ended.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace multifd {

/// Threads: written(c) and left() by the workers; the rest by any. Locked once an epoch and channel.
class EpochGate {
 public:
  explicit EpochGate(unsigned channels) : written_(channels, 0) {}

  /// Channel `channel` has written one more SYNC.
  void written(unsigned channel) noexcept {
    {
      const std::lock_guard lock(mutex_);
      ++written_[channel];
    }
    changed_.notify_all();
  }

  /// A channel's worker has ended.
  void left() noexcept {
    {
      const std::lock_guard lock(mutex_);
      ++left_;
    }
    changed_.notify_all();
  }

  /// Waits until every channel has written the SYNC of `epoch` (epochs count from 0); false when stopped before.
  /// `look()` is called every `slice` meanwhile, and may stop it.
  template <class Look>
  bool wait(std::uint64_t epoch, std::chrono::nanoseconds slice, Look&& look) noexcept {
    return wait_until([&] { return std::ranges::min(written_) > epoch; }, slice, look);
  }

  /// The same until every channel has left.
  template <class Look>
  bool wait_for_ends(std::chrono::nanoseconds slice, Look&& look) noexcept {
    return wait_until([&] { return left_ == written_.size(); }, slice, look);
  }

  /// The receiver has answered.
  void answered() noexcept {
    {
      const std::lock_guard lock(mutex_);
      answered_ = true;
    }
    changed_.notify_all();
  }

  /// The same until answered().
  template <class Look>
  bool wait_for_answer(std::chrono::nanoseconds slice, Look&& look) noexcept {
    return wait_until([&] { return answered_; }, slice, look);
  }

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
  }

 private:
  template <class Done, class Look>
  bool wait_until(Done&& done, std::chrono::nanoseconds slice, Look&& look) noexcept {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, slice, [&] { return stopped_ || done(); })) {
      lock.unlock();  // look() may call stop()
      look();
      lock.lock();
    }
    return done();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::uint64_t> written_;
  std::size_t left_ = 0;
  bool answered_ = false;
  bool stopped_ = false;
};

}  // namespace multifd
