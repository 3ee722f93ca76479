// SPDX-License-Identifier: MIT
//
// The first error of a migration: kept once, from whoever comes first, then the answer to everything. Raising it
// stops all channels, so the "broken pipe" that the stop causes elsewhere always comes second and is dropped.
#pragma once

#include <atomic>
#include <functional>
#include <utility>

#include "multifd/error.hpp"

namespace multifd {

/// Called once, with the first error, by the thread that met it (also cancel()'s): to wake a caller that waits for
/// something else, its main stream for instance. Must return soon, must not throw, and must not call the object back.
using ErrorHook = std::function<void(const Error&)>;

/// Threads: any, all methods. raise() and failed() are wait-free but for the stop action; get() may wait for the few
///   instructions of another thread's raise().
class FirstError {
 public:
  /// `stop`: unblocks every thread of the migration; called once, by the thread that raises the first error.
  explicit FirstError(std::function<void()> stop) : stop_(std::move(stop)) {}

  /// Keeps `error` if it is the first, and stops everything.
  void raise(const Error& error) noexcept {
    State expected = State::none;
    // Relaxed: winning the exchange publishes nothing yet.
    if (!state_.compare_exchange_strong(expected, State::writing, std::memory_order_relaxed)) return;
    error_ = error;
    state_.store(State::ready, std::memory_order_release);  // meets the acquire in failed() and get()
    state_.notify_all();
    stop_();
  }

  /// Whether there is an error. Cheap enough for the producer's per-page path.
  bool failed() const noexcept { return state_.load(std::memory_order_acquire) != State::none; }

  /// The error; only after failed().
  Error get() const noexcept {
    for (State now = state_.load(std::memory_order_acquire); now != State::ready;
         now = state_.load(std::memory_order_acquire))
      state_.wait(now, std::memory_order_acquire);
    return error_;
  }

 private:
  enum class State : int { none, writing, ready };
  std::atomic<State> state_{State::none};
  Error error_;
  std::function<void()> stop_;
};

}  // namespace multifd
