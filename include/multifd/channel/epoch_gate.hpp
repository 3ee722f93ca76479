// SPDX-License-Identifier: MIT
//
// For a sender who wants to know that an epoch is out: waits until every channel has written the SYNC that ends it.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace multifd {

/// Threads: written(c) by worker c; wait() by any; stop() by any. Locked once an epoch and channel.
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

  /// Waits until every channel has written the SYNC of `epoch` (epochs count from 0); false when stopped before.
  bool wait(std::uint64_t epoch) noexcept {
    std::unique_lock lock(mutex_);
    const auto done = [&] { return std::ranges::min(written_) > epoch; };
    changed_.wait(lock, [&] { return stopped_ || done(); });
    return done();
  }

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::uint64_t> written_;
  bool stopped_ = false;
};

}  // namespace multifd
