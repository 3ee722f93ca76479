// SPDX-License-Identifier: MIT
//
// How many faults were injected, said at the end of the program.
#pragma once

#include <atomic>
#include <cstdint>

namespace test {

/// Faults that took effect, by all tests of this program.
std::atomic<std::uint64_t>& faults_injected() noexcept;

/// Counts one.
inline void count_fault() noexcept { faults_injected().fetch_add(1, std::memory_order_relaxed); }

}  // namespace test
