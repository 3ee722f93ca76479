// SPDX-License-Identifier: MIT
//
// What fault threads leave to others: pages that they cannot fetch themselves, where faults were lately, and the order of
// faults for a later run. All of it is of a size that is known at the start.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "multifd/postcopy/page_states.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

using FaultClock = std::chrono::steady_clock;

/// A unit that a fault waits for.
struct WaitingFault {
  std::uint64_t unit = 0;
  FaultClock::time_point since{};
};

/// Units that faults wait for and nobody has asked for, oldest first. Each is marked as wanted in the page states, which is
/// what counts: where more of them are waiting than there is room for here, they are found there again.
/// Threads: any.
class DemandQueue {
 public:
  void push(WaitingFault fault) noexcept {
    const std::lock_guard held(mutex_);
    if (count_ == room.size())
      overflowed_ = true;
    else
      room[(first_ + count_++) % room.size()] = fault;
    publish();
  }

  /// The oldest; nothing when there is none.
  std::optional<WaitingFault> pop(const PageStates& states) noexcept {
    if (!pending()) return std::nullopt;
    const std::lock_guard held(mutex_);
    if (count_ == 0 && overflowed_) find_again(states);
    std::optional<WaitingFault> oldest;
    if (count_ > 0) {
      oldest = room[first_];
      first_ = (first_ + 1) % room.size();
      --count_;
    }
    publish();
    return oldest;
  }

  bool pending() const noexcept { return pending_.load(std::memory_order_acquire); }  // meets publish()

 private:
  void find_again(const PageStates& states) noexcept {
    overflowed_ = false;
    for (std::uint64_t unit = 0; (unit = states.next_wanted(unit, states.size())) < states.size(); ++unit) {
      if (count_ == room.size()) {
        overflowed_ = true;
        return;
      }
      room[(first_ + count_++) % room.size()] = {unit, FaultClock::now()};
    }
  }
  void publish() noexcept { pending_.store(count_ > 0 || overflowed_, std::memory_order_release); }  // meets pending()

  std::mutex mutex_;
  std::array<WaitingFault, 1024> room{};
  std::size_t first_ = 0;
  std::size_t count_ = 0;
  bool overflowed_ = false;
  std::atomic<bool> pending_{false};
};

/// Where faults were lately: a hint, so the oldest are overwritten, and two threads may lose one.
/// Threads: any. Wait-free.
class RecentFaults {
 public:
  // Relaxed throughout: a unit's number, which says all.
  void push(std::uint64_t unit) noexcept {
    const std::uint32_t at = next_.fetch_add(1, std::memory_order_relaxed);
    slots_[at % slots_.size()].store(unit + 1, std::memory_order_relaxed);
    any_.store(true, std::memory_order_relaxed);
  }
  /// The latest that nobody has taken yet.
  std::optional<std::uint64_t> pop() noexcept {
    if (!any_.load(std::memory_order_relaxed)) return std::nullopt;
    const std::uint32_t newest = next_.load(std::memory_order_relaxed);
    for (std::uint32_t back = 1; back <= slots_.size(); ++back)
      if (const std::uint64_t unit = slots_[(newest - back) % slots_.size()].exchange(0, std::memory_order_relaxed))
        return unit - 1;
    any_.store(false, std::memory_order_relaxed);
    return std::nullopt;
  }

 private:
  std::array<std::atomic<std::uint64_t>, 16> slots_{};
  std::atomic<std::uint32_t> next_{0};
  std::atomic<bool> any_{false};
};

/// The order of faults, each unit once. Threads: any; add() is wait-free.
class FaultRecord {
 public:
  FaultRecord() = default;
  /// Cost: 8 bytes and a bit for each unit, which become memory as faults come.
  explicit FaultRecord(std::uint64_t units)
      : size_(units),
        order_(new std::atomic<std::uint64_t>[units]),
        seen_(new std::atomic<std::uint64_t>[units / 64 + 1]()) {}

  void add(std::uint64_t unit) noexcept {
    if (size_ == 0) return;
    const std::uint64_t bit = std::uint64_t{1} << unit % 64;
    // Relaxed: who sets the bit publishes nothing by it.
    if ((seen_[unit / 64].fetch_or(bit, std::memory_order_relaxed) & bit) != 0) return;
    // Its place is reserved, then written: a snapshot may find the place empty (0), and stops there.
    const std::uint64_t at = count_.fetch_add(1, std::memory_order_relaxed);
    order_[at].store(unit + 1, std::memory_order_relaxed);
  }

  /// Calls `visit(unit)` in order.
  template <class Visit>
  void for_each(Visit&& visit) const {
    const std::uint64_t count = count_.load(std::memory_order_relaxed);
    for (std::uint64_t i = 0; i < count; ++i)
      if (const std::uint64_t unit = order_[i].load(std::memory_order_relaxed)) visit(unit - 1);
  }

 private:
  std::uint64_t size_ = 0;
  std::unique_ptr<std::atomic<std::uint64_t>[]> order_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> seen_;
  std::atomic<std::uint64_t> count_{0};
};

}  // namespace multifd::postcopy::detail
