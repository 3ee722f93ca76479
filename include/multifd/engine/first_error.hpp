// SPDX-License-Identifier: MIT
//
// The first error of a migration: the first raise() keeps its error, and every later call returns that one. Raising it
// stops all channels, so the "broken pipe" that the stop causes elsewhere always comes second and is dropped.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <utility>

#include "multifd/options.hpp"

namespace multifd::engine {

/// Threads: any, all methods. raise() and failed() are wait-free but for the stop action; get() may wait for the few
///   instructions of another thread's raise().
class FirstError {
 public:
  /// `stop`: unblocks every thread of the migration; called once, by the thread that raises the first error, which
  /// calls `hook` (may be empty) behind it.
  explicit FirstError(std::function<void()> stop, ErrorHook hook = {})
      : stop_(std::move(stop)), hook_(std::move(hook)) {}

  /// Keeps `error` if it is the first, stops everything, and tells the hook.
  void raise(const Error& error) noexcept { raise(error, true); }

  /// The same for the owner's destructor, which does not call the hook: what the hook would use may be gone.
  void abandon(const char* op) noexcept { raise({.code = Errc::cancelled, .op = op}, false); }

  /// Waits until no thread is inside `stop` any more; called before the objects that `stop` touches are destroyed. A
  /// thread that stop() wakes may get here before stop() has returned to the thread that raised.
  void wait_stopped() const noexcept {
    if (!failed()) return;
    // No notification: the thread that would send it could touch this object after its end. The load meets raise().
    while (state_.load(std::memory_order_acquire) != State::stopped) std::this_thread::yield();
  }

  /// Whether there is an error. Cheap enough for the producer's per-page path.
  bool failed() const noexcept {
    return state_.load(std::memory_order_acquire) != State::none;  // meets raise()
  }

  /// The error; only after failed().
  Error get() const noexcept {
    // The only state in which the error is not readable. The wait meets raise().
    state_.wait(State::writing, std::memory_order_acquire);
    return error_;
  }

 private:
  void raise(const Error& error, bool tell) noexcept {
    State expected = State::none;
    // Relaxed: winning the exchange publishes nothing yet.
    if (!state_.compare_exchange_strong(expected, State::writing, std::memory_order_relaxed)) return;
    error_ = error;
    state_.store(State::ready, std::memory_order_release);  // meets the acquire in failed() and get()
    state_.notify_all();
    stop_();
    if (tell && hook_) hook_(error);
    state_.store(State::stopped, std::memory_order_release);  // meets the acquire in wait_stopped()
  }

  enum class State : int { none, writing, ready, stopped };
  std::atomic<State> state_{State::none};
  Error error_;
  std::function<void()> stop_;
  ErrorHook hook_;
};

}  // namespace multifd::engine
