// SPDX-License-Identifier: MIT
//
// What a checking build (MULTIFD_CHECKED, see config.hpp) checks in the calls of a Sender and a Receiver. In every
// other build these classes are empty.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include "multifd/config.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd::engine {

/// Finds two threads at once in calls that only one may be in. `misuse`: the message, static text.
class OneCaller {
 public:
  explicit OneCaller(const char* misuse) noexcept : misuse_(misuse) {}

  /// Held during a call; calls of the same thread may nest.
  class Turn {
   public:
    Turn(std::atomic<const void*>& owner, [[maybe_unused]] const char* misuse) noexcept : owner_(owner) {
      static thread_local const char self = 0;
      const void* nobody = nullptr;
      // Acquire: sees what the thread before did; meets ~Turn().
      outermost_ = owner_.compare_exchange_strong(nobody, &self, std::memory_order_acquire);
      if (!outermost_ && nobody != &self) MULTIFD_MISUSE(misuse, {}, 0);
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
      if (outermost_) owner_.store(nullptr, std::memory_order_release);  // meets Turn()
    }

   private:
    std::atomic<const void*>& owner_;
    bool outermost_ = false;
  };

  Turn enter() noexcept { return Turn(owner_, misuse_); }
  bool entered() const noexcept { return owner_.load(std::memory_order_relaxed) != nullptr; }

 private:
  const char* misuse_;
  std::atomic<const void*> owner_{nullptr};
};

/// Counts the threads that are in an object's calls, of which any number may be.
class Visitors {
 public:
  class Visit {
   public:
    explicit Visit(std::atomic<unsigned>& inside) noexcept : inside_(inside) {
      inside_.fetch_add(1, std::memory_order_relaxed);
    }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;
    ~Visit() { inside_.fetch_sub(1, std::memory_order_relaxed); }

   private:
    std::atomic<unsigned>& inside_;
  };

  Visit enter() noexcept { return Visit(inside_); }
  bool entered() const noexcept { return inside_.load(std::memory_order_relaxed) != 0; }

 private:
  std::atomic<unsigned> inside_{0};
};

/// Finds pages that are queued twice in an epoch, and two threads in the producer's calls at once.
class ProducerChecks : public OneCaller {
 public:
  explicit ProducerChecks(const RamMap& map) : OneCaller("two threads are in a Sender's producer calls at once") {
    for (const RamBlock& block : map.blocks()) queued_.emplace_back((block.bytes / map.page_bytes() + 63) / 64);
  }

  /// Notes the pages whose bits are set: bit 0 stands for the page at `offset`.
  void note_bits(const RamMap& map, BlockId block, std::uint64_t offset, std::uint64_t bits) noexcept {
    for (; bits != 0; bits &= bits - 1) {
      const std::uint64_t at = offset + static_cast<std::uint64_t>(std::countr_zero(bits)) * map.page_bytes();
      const std::uint64_t page = at / map.page_bytes();
      std::uint64_t& word = queued_[index(block)][page / 64];
      const std::uint64_t bit = std::uint64_t{1} << (page % 64);
      if ((word & bit) != 0) MULTIFD_MISUSE("a page is queued twice in an epoch", map.block(block).idstr, at);
      word |= bit;
    }
  }

  void note_run(const RamMap& map, BlockId block, std::uint64_t offset, std::uint64_t pages) noexcept {
    for (std::uint64_t i = 0; i < pages; ++i) note_bits(map, block, offset + i * map.page_bytes(), 1);
  }

  void new_epoch() noexcept {
    for (auto& words : queued_) words.assign(words.size(), 0);
  }

 private:
  std::vector<std::vector<std::uint64_t>> queued_;
};

/// The same classes in a build that does not check.
struct AnyCaller {
  struct Turn {};
  explicit AnyCaller(const char*) noexcept {}
  Turn enter() const noexcept { return {}; }
  bool entered() const noexcept { return false; }
};
struct AnyVisitors {
  struct Visit {};
  Visit enter() const noexcept { return {}; }
  bool entered() const noexcept { return false; }
};
struct NoProducerChecks : AnyCaller {
  explicit NoProducerChecks(const RamMap&) noexcept : AnyCaller("") {}
  void note_bits(const RamMap&, BlockId, std::uint64_t, std::uint64_t) const noexcept {}
  void note_run(const RamMap&, BlockId, std::uint64_t, std::uint64_t) const noexcept {}
  void new_epoch() const noexcept {}
};

using OneCallerOfBuild = std::conditional_t<MULTIFD_CHECKED != 0, OneCaller, AnyCaller>;
using VisitorsOfBuild = std::conditional_t<MULTIFD_CHECKED != 0, Visitors, AnyVisitors>;
using ProducerChecksOfBuild = std::conditional_t<MULTIFD_CHECKED != 0, ProducerChecks, NoProducerChecks>;

/// An object, and a visit to it for as long as one expression takes: `visit()->call()`. The object has `visitors`.
template <class Object>
class Visited {
 public:
  explicit Visited(Object& object) noexcept : object_(object), visit_(object.visitors.enter()) {}
  Object* operator->() const noexcept { return &object_; }

 private:
  Object& object_;
  [[no_unique_address]] [[maybe_unused]] const VisitorsOfBuild::Visit visit_;
};

}  // namespace multifd::engine
