// SPDX-License-Identifier: MIT
//
// Two gates: of a LazyMemory, whose threads read events of the guest's memory while nobody places pages; and of both ends of
// page connections, whose background waits while pages are urgent.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

#include "multifd/config.hpp"

namespace multifd::postcopy {

/// Keeps the reading of removals and the placing of pages apart.
///
/// As soon as a REMOVE event has been read, the kernel takes the pages away, and who touches them then is to find zeros.
/// Bytes that a thread was about to place there would come back from the dead. So nobody places while removals are read and
/// noted; the kernel itself refuses to place (EAGAIN) from the event on until it has been read.
///
/// Threads: any. A reader goes before threads that want to place.
class PlacementGate {
 public:
  /// Between these two, pages are placed. May wait for removals, whose reader waits for nothing but those who place.
  void begin_place() noexcept {
    for (std::uint32_t now = state_.load(std::memory_order_relaxed);;) {
      if ((now & removing) != 0) {
        state_.wait(now, std::memory_order_relaxed);
        now = state_.load(std::memory_order_relaxed);
        // Meets end_remove(): what a reader has noted is seen.
      } else if (state_.compare_exchange_weak(now, now + 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        return;
      }
    }
  }
  void end_place() noexcept {
    // Meets begin_remove(): what was placed comes before what is noted.
    if (state_.fetch_sub(1, std::memory_order_release) == (removing | 1)) state_.notify_all();
  }

  /// Between these two, removals are read and noted. By one thread at a time.
  void begin_remove() noexcept {
    std::uint32_t now = state_.fetch_or(removing, std::memory_order_acquire) | removing;  // meets end_place()
    while (now != removing) {
      state_.wait(now, std::memory_order_relaxed);
      now = state_.load(std::memory_order_acquire);  // meets end_place()
    }
  }
  void end_remove() noexcept {
    state_.store(0, std::memory_order_release);  // meets begin_place(): nobody else changes it meanwhile
    state_.notify_all();
  }

 private:
  static constexpr std::uint32_t removing = std::uint32_t{1} << 31;
  std::atomic<std::uint32_t> state_{0};  ///< how many place, and `removing`
};

/// Holds the background while urgent requests have no answer.
/// Threads: any.
class UrgentGate {
 public:
  /// So many requests begin; as many have to leave().
  void enter() noexcept { urgent_.fetch_add(1, std::memory_order_seq_cst); }
  void leave(std::uint32_t requests = 1) noexcept {
    last_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    // seq_cst, and in wait(): either the one that waits is seen here, or there it is seen that nothing is urgent any more.
    if (urgent_.fetch_sub(requests, std::memory_order_seq_cst) == requests &&
        waiting_.load(std::memory_order_seq_cst) != 0)
      futex(FUTEX_WAKE_PRIVATE, most_waiters, nullptr);
  }
  bool closed() const noexcept { return urgent_.load(std::memory_order_relaxed) != 0; }

  /// What the background calls between two pieces of its work, of some ten microseconds each. Faults come in crowds, and each
  /// wakes three threads, of which this knows nothing before they run. The scheduler may leave a thread that wakes waiting
  /// until the running one's slice ends: milliseconds, also where that one is nicer. So for a moment after a request the
  /// background gives its processor to whoever waits for it, after each piece.
  /// Cost: a reading of the clock; for a moment after a request, a system call.
  void yield_if_recent() const noexcept {
    const Clock::duration last{last_.load(std::memory_order_relaxed)};
    if (Clock::now().time_since_epoch() - last < recent) ::sched_yield();
  }

  /// Waits until nothing is urgent, at most so long: under a flood of faults the background goes on all the same, slowly.
  void wait(std::chrono::nanoseconds limit) noexcept {
    const auto end = Clock::now() + limit;
    waiting_.fetch_add(1, std::memory_order_seq_cst);
    while (const std::uint32_t now = urgent_.load(std::memory_order_seq_cst)) {
      const std::chrono::nanoseconds rest = end - Clock::now();
      if (rest <= rest.zero()) break;
      const timespec left{.tv_sec = static_cast<time_t>(rest.count() / 1'000'000'000),
                          .tv_nsec = rest.count() % 1'000'000'000};
      futex(FUTEX_WAIT_PRIVATE, now, &left);
    }
    waiting_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::uint32_t most_waiters = 1024;
  static constexpr std::chrono::milliseconds recent{1};

  // After EAGAIN (it has changed already), EINTR and ETIMEDOUT the caller looks again.
  void futex(int operation, std::uint32_t value, const timespec* limit) noexcept {
    ::syscall(SYS_futex, &urgent_, operation, value, limit);
  }

  alignas(cache_line) std::atomic<std::uint32_t> urgent_{0};
  std::atomic<std::uint32_t> waiting_{0};
  std::atomic<Clock::rep> last_{Clock::duration::min().count() / 2};  ///< when a request had its answer
};

}  // namespace multifd::postcopy
