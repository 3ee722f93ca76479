// SPDX-License-Identifier: MIT
//
// Which workers sleep, and how they are woken: a bit and a futex for each. std::atomic::wait() has no
// time limit.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/limits.hpp"
#include "multifd/result.hpp"

namespace multifd::engine {

/// One thread sleeps on it, other threads send signals. A signal that comes before the sleep is not lost.
class alignas(cache_line) Signal {
 public:
  /// To be read before the last check of the condition that the thread waits for.
  std::uint32_t ticket() const noexcept { return count_.load(std::memory_order_acquire); }  // meets send()

  /// Sleeps until a signal comes after `ticket` was read, at most for `limit`. False: no signal came.
  bool wait(std::uint32_t ticket, std::chrono::nanoseconds limit = forever) noexcept {
    const auto end = limit == forever ? Clock::time_point::max() : Clock::now() + limit;
    while (count_.load(std::memory_order_acquire) == ticket) {  // meets send()
      timespec left{};
      if (limit != forever) {
        const std::chrono::nanoseconds rest = end - Clock::now();
        if (rest <= rest.zero()) return false;
        left = {.tv_sec = static_cast<time_t>(rest.count() / 1'000'000'000), .tv_nsec = rest.count() % 1'000'000'000};
      }
      futex(FUTEX_WAIT_PRIVATE, ticket, limit != forever ? &left : nullptr);
    }
    return true;
  }

  void send() noexcept {
    count_.fetch_add(1, std::memory_order_release);  // meets the acquire in ticket() and wait()
    futex(FUTEX_WAKE_PRIVATE, 1, nullptr);
  }

  static constexpr std::chrono::nanoseconds forever = std::chrono::nanoseconds::max();

 private:
  using Clock = std::chrono::steady_clock;

  // The kernel compares the count again before it sleeps. After EAGAIN, EINTR and ETIMEDOUT the caller checks again.
  void futex(int operation, std::uint32_t value, const timespec* limit) noexcept {
    static_assert(sizeof count_ == sizeof(std::uint32_t) && decltype(count_)::is_always_lock_free);
    ::syscall(SYS_futex, &count_, operation, value, limit);
  }

  std::atomic<std::uint32_t> count_{0};
};

/// Workers that sleep. A thread that clears another worker's bit has to wake that worker.
///
/// Everything is seq_cst: a worker sets its bit and then checks for work once more; a thread that makes work checks the
/// bits afterwards.
class Sleepers {
 public:
  /// What `workers` workers, max_channels at most, sleep on. Errors: ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<Signal[]>> allocate(unsigned workers) noexcept {
    std::unique_ptr<Signal[]> signals(new (std::nothrow) Signal[workers]);
    if (!signals) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    return signals;
  }

  /// `signals`: of allocate(), for as many workers.
  Sleepers(unsigned workers, std::unique_ptr<Signal[]> signals) noexcept
      : workers_(workers), signals_(std::move(signals)) {}

  /// How many workers are awake.
  unsigned awake() const noexcept {
    unsigned asleep = 0;
    for (const auto& word : std::span(words_).first(used_words()))
      asleep += static_cast<unsigned>(std::popcount(word.load(std::memory_order_seq_cst)));
    return workers_ - away_.load(std::memory_order_seq_cst) - asleep;
  }

  /// A worker that is awake can do no work for a while, and counts as asleep; nobody wakes it.
  void leave() noexcept { away_.fetch_add(1, std::memory_order_seq_cst); }
  void come_back() noexcept { away_.fetch_sub(1, std::memory_order_seq_cst); }

  /// Sets the bit of worker `w`, then sleeps until the worker is woken, at most for `limit`. True: it was woken.
  ///
  /// `stay_up()` is called when the bit is set already; if it returns true, the worker does not sleep.
  template <class StayUp>
  bool sleep(unsigned w, std::chrono::nanoseconds limit, StayUp&& stay_up) noexcept {
    const std::uint32_t ticket = signals_[w].ticket();
    word(w).fetch_or(bit(w), std::memory_order_seq_cst);
    if (stay_up() && get_up(w)) return false;
    if (signals_[w].wait(ticket, limit)) return true;
    if (get_up(w)) return false;
    signals_[w].wait(ticket);  // another thread has just cleared the bit and is about to signal
    return true;
  }

  /// Clears the bit of one sleeper and returns that worker, which the caller has to wake. No sleeper: no_worker.
  unsigned take_one() noexcept {
    for (unsigned w = 0; w < workers_; w += word_bits) {
      std::uint64_t asleep = word(w).load(std::memory_order_seq_cst);
      while (asleep != 0) {
        const std::uint64_t lowest = asleep & (~asleep + 1);
        asleep = word(w).fetch_and(~lowest, std::memory_order_seq_cst);
        if ((asleep & lowest) != 0) return w + static_cast<unsigned>(std::countr_zero(lowest));
      }
    }
    return no_worker;
  }

  /// Clears all bits and calls `wake(worker)` for each: once, even if the worker is through and sleeps again.
  template <class Wake>
  void take_all(Wake&& wake) noexcept {
    for (unsigned w = 0; w < workers_; w += word_bits)
      for (std::uint64_t asleep = word(w).exchange(0, std::memory_order_seq_cst); asleep != 0; asleep &= asleep - 1)
        wake(w + static_cast<unsigned>(std::countr_zero(asleep)));
  }

  /// Wakes a worker whose bit the caller has cleared.
  void wake(unsigned w) noexcept { signals_[w].send(); }

  static constexpr unsigned no_worker = ~0u;

 private:
  static constexpr unsigned word_bits = 64;
  static constexpr std::uint64_t bit(unsigned w) noexcept { return std::uint64_t{1} << w % word_bits; }

  std::atomic<std::uint64_t>& word(unsigned w) noexcept { return words_[w / word_bits]; }
  unsigned used_words() const noexcept { return (workers_ + word_bits - 1) / word_bits; }
  /// Clears the worker's own bit. True: it was still set, so that no other thread has cleared it.
  bool get_up(unsigned w) noexcept { return (word(w).fetch_and(~bit(w), std::memory_order_seq_cst) & bit(w)) != 0; }

  const unsigned workers_;
  std::atomic<unsigned> away_{0};
  const std::unique_ptr<Signal[]> signals_;
  alignas(cache_line) std::array<std::atomic<std::uint64_t>, max_channels / word_bits + 1> words_{};
};

}  // namespace multifd::engine
