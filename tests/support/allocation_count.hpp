// SPDX-License-Identifier: MIT
//
// How often a test binary asked for memory: malloc, so operator new and C libraries too. Only differences of these
// numbers mean something. And memory that cannot be had, on demand. Linked into every test binary.
#pragma once

#include <cstdint>

namespace test {

/// By any thread.
std::uint64_t allocations() noexcept;
/// By the calling thread.
std::uint64_t allocations_of_this_thread() noexcept;
/// By the threads that are being watched.
std::uint64_t allocations_of_watched_threads() noexcept;
void watch_this_thread(bool on) noexcept;

/// Bytes that were allocated and not freed, by any thread; 0 under a sanitizer, which has its own way to find leaks.
std::int64_t live_bytes() noexcept;
/// The most that there have been since the last call of restart_peak().
std::int64_t peak_bytes() noexcept;
void restart_peak() noexcept;

/// What happens after the allocation that fails.
enum class Shortage { once, from_then_on };

/// Lets an allocation of the calling thread fail while it lives: the one that comes after `good` others.
/// Under a sanitizer, whose malloc cannot be replaced, only where operator new asks (failing_new.cpp).
class FailAllocation {
 public:
  explicit FailAllocation(std::uint64_t good, Shortage shortage = Shortage::once) noexcept;
  FailAllocation(const FailAllocation&) = delete;
  FailAllocation& operator=(const FailAllocation&) = delete;
  ~FailAllocation();
  /// Whether it has failed.
  bool happened() const noexcept;
};

/// Called by every allocation: counts it. Returns whether it is to fail.
bool allocation_fails() noexcept;

}  // namespace test
