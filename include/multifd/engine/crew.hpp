// SPDX-License-Identifier: MIT
//
// The channels of one end and their threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "multifd/engine/first_error.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/options.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/thread.hpp"

namespace multifd::engine {

/// A Channel has run(), the body of its thread, and shutdown(), which ends a run() that waits for its peer.
///
/// Order: add() all channels, then start(): afterwards the list never changes, so shutdown() may come from any thread.
/// Threads: shutdown() any; the others the owner's. A crew does not move.
template <class Channel>
class Crew {
 public:
  Crew() = default;
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  void add(std::unique_ptr<Channel> channel) { channels_.push_back(std::move(channel)); }

  /// Starts a thread for each channel. `hook`: must live until join().
  /// Errors: of pthread_create(); then `error` has been raised, so that the threads that have started end.
  [[nodiscard]] Result<void> start(const char* role, const ThreadHook& hook, FirstError& error) {
    threads_.reserve(channels_.size());
    workers_.reserve(channels_.size());
    for (std::uint32_t i = 0; i < channels_.size(); ++i) {
      workers_.push_back({*channels_[i], *this});
      auto thread = Thread::start(workers_.back(), hook, {.role = role, .channel = i});
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

  /// Whether every channel's run() is over, so that join() has nothing to wait for. After start().
  bool over() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return over_ == threads_.size();
  }
  /// Waits for that. False when `watch` has found that `progress()` stood still.
  template <class Progress>
  bool wait_until_over(ProgressWatch& watch, Progress&& progress) noexcept {
    Monitor::Lock held = monitor_.lock();
    return monitor_.wait(
        held, watch.slice(), [this] { return over_ == threads_.size(); }, [&] { return !watch.stalled(progress()); });
  }
  void join() noexcept {
    for (Thread& thread : threads_) thread.join();
  }

  auto begin() const noexcept { return channels_.begin(); }
  auto end() const noexcept { return channels_.end(); }
  std::size_t size() const noexcept { return channels_.size(); }

 private:
  struct Worker {
    Channel& channel;
    Crew& crew;
    void run() noexcept {
      channel.run();
      crew.monitor_.update([this] { ++crew.over_; });
    }
  };

  std::vector<std::unique_ptr<Channel>> channels_;
  Monitor monitor_;
  std::size_t over_ = 0;
  std::vector<Worker> workers_;  ///< one for each thread
  std::vector<Thread> threads_;
};

}  // namespace multifd::engine
