// SPDX-License-Identifier: MIT
//
// To be included before any header of the library: from here on what it calls std::atomic, std::mutex,
// std::condition_variable, steady_clock, yield() and syscall() are the model's. The system's headers come first, with
// their own.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <semaphore>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "model/scheduler.hpp"

namespace model {

inline void point() {
  if (Run::current_run != nullptr) Run::current_run->point();
}

}  // namespace model

// In namespace std, because that is how the library names them.
namespace std {

template <class T>
class modeled_atomic {
 public:
  static constexpr bool is_always_lock_free = true;
  constexpr modeled_atomic() noexcept = default;
  constexpr modeled_atomic(T value) noexcept : value_(value) {}
  modeled_atomic(const modeled_atomic&) = delete;
  modeled_atomic& operator=(const modeled_atomic&) = delete;

  T load(memory_order = memory_order_seq_cst) const noexcept {
    model::point();
    return value_;
  }
  void store(T value, memory_order = memory_order_seq_cst) noexcept {
    model::point();
    value_ = value;
  }
  T exchange(T value, memory_order = memory_order_seq_cst) noexcept {
    model::point();
    return std::exchange(value_, value);
  }
  bool compare_exchange_strong(T& expected, T desired, memory_order = memory_order_seq_cst,
                               memory_order = memory_order_seq_cst) noexcept {
    model::point();
    if (value_ == expected) {
      value_ = desired;
      return true;
    }
    expected = value_;
    return false;
  }
  bool compare_exchange_weak(T& expected, T desired, memory_order = memory_order_seq_cst,
                             memory_order = memory_order_seq_cst) noexcept {
    return compare_exchange_strong(expected, desired);
  }
  T fetch_add(T by, memory_order = memory_order_seq_cst) noexcept {
    return exchange_with([&](T v) { return v + by; });
  }
  T fetch_sub(T by, memory_order = memory_order_seq_cst) noexcept {
    return exchange_with([&](T v) { return v - by; });
  }
  T fetch_or(T by, memory_order = memory_order_seq_cst) noexcept {
    return exchange_with([&](T v) { return v | by; });
  }
  T fetch_and(T by, memory_order = memory_order_seq_cst) noexcept {
    return exchange_with([&](T v) { return v & by; });
  }

  void wait(T old, memory_order = memory_order_seq_cst) const noexcept {
    while (load() == old) model::Run::current_run->block(this);
  }
  void notify_one() noexcept { notify(false); }
  void notify_all() noexcept { notify(true); }

 private:
  template <class Change>
  T exchange_with(Change&& change) noexcept {
    model::point();
    return std::exchange(value_, static_cast<T>(change(value_)));
  }
  void notify(bool all) noexcept {
    model::point();
    if (model::Run::current_run != nullptr) model::Run::current_run->wake(this, all);
  }

  T value_{};
};

class modeled_mutex {
 public:
  void lock() noexcept {
    model::point();
    while (locked_) model::Run::current_run->block(this);
    locked_ = true;
  }
  void unlock() noexcept {
    locked_ = false;
    if (model::Run::current_run != nullptr) model::Run::current_run->wake(this, false);
  }

 private:
  bool locked_ = false;
};

class modeled_condition_variable {
 public:
  template <class Lock, class Ready>
  void wait(Lock& lock, Ready ready) {
    while (!ready()) {
      lock.unlock();
      model::Run::current_run->block(this);
      lock.lock();
    }
  }
  template <class Lock, class Duration, class Ready>
  bool wait_for(Lock& lock, Duration, Ready ready) {
    wait(lock, ready);
    return true;
  }
  template <class Lock, class Time, class Ready>
  bool wait_until(Lock& lock, Time, Ready ready) {
    wait(lock, ready);
    return true;
  }
  void notify_one() noexcept { notify(false); }
  void notify_all() noexcept { notify(true); }

 private:
  void notify(bool all) noexcept {
    model::point();
    if (model::Run::current_run != nullptr) model::Run::current_run->wake(this, all);
  }
};

namespace chrono {

/// Every reading of this clock takes longer than any thread spins.
struct modeled_steady_clock {
  using duration = nanoseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = chrono::time_point<modeled_steady_clock>;
  static constexpr bool is_steady = true;
  static inline rep ticks = 0;
  static time_point now() noexcept { return time_point(duration(ticks += 20'000)); }
};

}  // namespace chrono

namespace this_thread {

inline void modeled_yield() noexcept {
  if (model::Run::current_run != nullptr) model::Run::current_run->yield();
}

}  // namespace this_thread
}  // namespace std

/// FUTEX_WAIT and FUTEX_WAKE of one waiter. A time limit never passes.
inline long modeled_syscall(long, std::modeled_atomic<std::uint32_t>* word, int operation, std::uint32_t value,
                            const timespec*) noexcept {
  model::Run* const run = model::Run::current_run;
  if (run == nullptr) return 0;
  if (operation == FUTEX_WAKE_PRIVATE) {
    run->point();
    run->wake(word, false);
  } else if (word->load() == value) {
    run->block(word);
  }
  return 0;
}

#define atomic modeled_atomic
#define mutex modeled_mutex
#define condition_variable modeled_condition_variable
#define steady_clock modeled_steady_clock
#define yield modeled_yield
#define syscall modeled_syscall
