// SPDX-License-Identifier: MIT
//
// How often a test binary asked for memory: malloc, so operator new and C libraries too. Only differences of these
// numbers mean something. Linked into every test binary.
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

}  // namespace test
