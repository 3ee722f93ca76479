// SPDX-License-Identifier: MIT
//
// A monitor, as the textbooks have it: a mutex, a condition variable, and the end of all waits. For what threads wait
// for once an epoch or more seldom; the hand-off, where a batch counts, has none.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace multifd::engine {

/// Threads: any, all methods.
class Monitor {
 public:
  using Lock = std::unique_lock<std::mutex>;

  /// No wait relies on a notification alone: under load glibc's condition variables can lose one (its bug 25847, in
  /// Debian 12), and a wait without a limit would last for ever.
  static constexpr std::chrono::milliseconds longest_wait{250};

  /// Holds the monitor: for whoever reads or changes what it guards.
  Lock lock() const noexcept { return Lock(mutex_); }

  /// Changes what the monitor guards, and wakes everybody who waits. Returns what `change()` returns.
  template <class Change>
  auto update(Change&& change) noexcept {
    struct Notify {
      ~Notify() { room.notify(); }
      const Monitor& room;
    } const after_unlocking{*this};
    const Lock held = lock();
    return change();
  }

  void notify() const noexcept { changed_.notify_all(); }

  /// Waits until `ready()` or stop(). Called with the monitor held, which `ready()` may take as given.
  template <class Ready>
  void wait(Lock& held, Ready&& ready) const noexcept {
    wait(held, longest_wait, ready, [] { return true; });
  }
  /// The same until a time; false when that has come first.
  template <class Ready, class Clock, class Duration>
  bool wait_until(Lock& held, std::chrono::time_point<Clock, Duration> until, Ready&& ready) const noexcept {
    const auto done = [&] { return stopped_ || ready(); };
    for (;;) {
      const auto next = std::min<std::chrono::time_point<Clock, Duration>>(until, Clock::now() + longest_wait);
      if (changed_.wait_until(held, next, done)) return true;
      if (next == until) return false;
    }
  }
  /// The same, with `go_on()` called every `slice`, not held, so that it may call stop(). False when go_on() returned
  /// false and nothing has changed.
  template <class Ready, class GoOn>
  bool wait(Lock& held, std::chrono::nanoseconds slice, Ready&& ready, GoOn&& go_on) const noexcept {
    const auto done = [&] { return stopped_ || ready(); };
    while (!changed_.wait_for(held, slice, done)) {
      held.unlock();
      const bool on = go_on();
      held.lock();
      if (!on) return done();
    }
    return true;
  }

  /// Ends every wait, now and later.
  void stop() noexcept {
    update([this] { stopped_ = true; });
  }
  bool stopped(const Lock&) const noexcept { return stopped_; }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool stopped_ = false;
};

}  // namespace multifd::engine
