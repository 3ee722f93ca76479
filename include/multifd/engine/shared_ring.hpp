// SPDX-License-Identifier: MIT
//
// The ring between one producer and many workers. Batches leave in the order they came. Each goes to one worker, and
// never to a worker that is still in an earlier epoch. The ring has a slot for every batch that exists: it is never
// full, and a slot is not written again before its batch was taken.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/memory/page_batch.hpp"
#include "multifd/result.hpp"

namespace multifd::engine {

/// Threads: push() by the producer; take() and backlog() by any. Lock-free; nothing is allocated after allocate().
class SharedRing {
  /// A slot is read before it is known to be still valid. So its fields are atomic.
  struct Slot {
    std::atomic<PageBatch*> batch{nullptr};
    std::atomic<std::uint64_t> epoch{0};
  };

 public:
  /// A ring's memory. There is no ring without.
  class Slots {
    friend SharedRing;
    std::unique_ptr<Slot[]> slots;
    std::uint64_t mask = 0;
  };

  /// Params: `batches`: how many there are in all. Errors: ENOMEM.
  [[nodiscard]] static Result<Slots> allocate(std::size_t batches) noexcept {
    Slots made;
    made.mask = std::bit_ceil(batches) - 1;
    made.slots.reset(new (std::nothrow) Slot[made.mask + 1]);
    if (!made.slots) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    return made;
  }

  explicit SharedRing(Slots memory) noexcept : slots_(std::move(memory.slots)), mask_(memory.mask) {
    static_assert(alignof(SharedRing) == cache_line && sizeof(SharedRing) == 3 * cache_line,
                  "a cache line each for what all read, for what the producer writes, for what the workers write");
  }

  void push(PageBatch* batch, std::uint64_t epoch) noexcept {
    const std::uint64_t tail = tail_.load(std::memory_order_relaxed);
    Slot& slot = slots_[tail & mask_];
    slot.batch.store(batch, std::memory_order_relaxed);
    slot.epoch.store(epoch, std::memory_order_relaxed);
    // The release of the batch's content; seq_cst: before the producer looks who sleeps (see backlog()).
    tail_.store(tail + 1, std::memory_order_seq_cst);
  }

  /// What take() found at the front.
  enum class First : std::uint8_t {
    none,   ///< the ring is empty
    taken,  ///< a batch, which is now the caller's
    later,  ///< a batch of a later epoch, which stays: all batches up to `epoch` have been taken
  };

  /// Takes the first batch, unless it belongs to an epoch after `epoch`.
  std::pair<First, PageBatch*> take(std::uint64_t epoch) noexcept {
    std::uint64_t head = head_.load(std::memory_order_acquire);  // meets another worker's take()
    while (head != tail_.load(std::memory_order_acquire)) {      // meets push()
      const Slot& slot = slots_[head & mask_];
      PageBatch* const batch = slot.batch.load(std::memory_order_relaxed);
      const bool mine = slot.epoch.load(std::memory_order_relaxed) <= epoch;
      // The slot may have been written again since it was read. What was read counts only if head_ is still `head`.
      // The exchange meets another worker's take().
      if (!head_.compare_exchange_weak(head, head + mine, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      return {mine ? First::taken : First::later, batch};
    }
    return {First::none, nullptr};
  }

  /// Batches in the ring.
  std::uint64_t backlog() const noexcept {
    // seq_cst: each caller has just put a batch, or announced that it sleeps or no longer searches; the other side does
    // these in the reverse order. The head is read before the tail, because the tail is never behind the head.
    const std::uint64_t head = head_.load(std::memory_order_seq_cst);
    return tail_.load(std::memory_order_seq_cst) - head;
  }

 private:
  const std::unique_ptr<Slot[]> slots_;
  const std::uint64_t mask_;
  alignas(cache_line) std::atomic<std::uint64_t> tail_{0};  ///< batches put
  alignas(cache_line) std::atomic<std::uint64_t> head_{0};  ///< batches taken
};

}  // namespace multifd::engine
