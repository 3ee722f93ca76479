// SPDX-License-Identifier: MIT
//
// The first error of a migration: kept once, from whoever comes first, then the answer to everything. Raising it
// stops all channels, so the "broken pipe" that the stop causes elsewhere always comes second and is dropped.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <utility>

#include "multifd/error_value.hpp"

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
    state_.store(State::stopped, std::memory_order_release);  // meets the acquire in wait_stopped()
  }

  /// Before the owner of what `stop` touches is destroyed: waits until no thread is in it any more. A thread that
  /// stop() wakes may get here before stop() has returned to the thread that raised.
  void wait_stopped() const noexcept {
    if (!failed()) return;
    // No notification: the thread that would send it could touch this object after its end.
    while (state_.load(std::memory_order_acquire) != State::stopped) std::this_thread::yield();
  }

  /// Whether there is an error. Cheap enough for the producer's per-page path.
  bool failed() const noexcept { return state_.load(std::memory_order_acquire) != State::none; }

  /// The error; only after failed().
  Error get() const noexcept {
    state_.wait(State::writing, std::memory_order_acquire);  // the only state in which the error is not readable
    return error_;
  }

 private:
  enum class State : int { none, writing, ready, stopped };
  std::atomic<State> state_{State::none};
  Error error_;
  std::function<void()> stop_;
};

}  // namespace multifd
