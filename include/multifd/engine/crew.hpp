// SPDX-License-Identifier: MIT
//
// The channels of one end and their threads.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "multifd/engine/first_error.hpp"
#include "multifd/options.hpp"
#include "multifd/thread.hpp"

namespace multifd::engine {

/// A Channel has run(), the body of its thread, and shutdown(), which ends a run() that waits for its peer.
///
/// Order: add() all channels, then start(): afterwards the list never changes, so shutdown() may come from any thread.
/// Threads: shutdown() any; the others the owner's.
template <class Channel>
class Crew {
 public:
  void add(std::unique_ptr<Channel> channel) { channels_.push_back(std::move(channel)); }

  /// Starts a thread for each channel. `hook`: must live until join().
  /// Errors: of pthread_create(); then `error` has been raised, so that the threads that have started end.
  [[nodiscard]] Result<void> start(const char* role, const ThreadHook& hook, FirstError& error) {
    threads_.reserve(channels_.size());
    for (std::uint32_t i = 0; i < channels_.size(); ++i) {
      auto thread = Thread::start(*channels_[i], hook, {.role = role, .channel = i});
      if (!thread) {
        error.raise(thread.error());
        return std::unexpected(error.get());  // a channel's error may have come before
      }
      threads_.push_back(std::move(*thread));
    }
    return {};
  }
  bool started() const noexcept { return !threads_.empty(); }

  void shutdown() noexcept {
    for (const auto& channel : channels_) channel->shutdown();
  }
  void join() noexcept {
    for (Thread& thread : threads_) thread.join();
  }

  auto begin() const noexcept { return channels_.begin(); }
  auto end() const noexcept { return channels_.end(); }
  std::size_t size() const noexcept { return channels_.size(); }

 private:
  std::vector<std::unique_ptr<Channel>> channels_;
  std::vector<Thread> threads_;
};

}  // namespace multifd::engine
