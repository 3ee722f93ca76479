// SPDX-License-Identifier: MIT
//
// One step of a loop that polls memory.
#pragma once

#include "multifd/config.hpp"

namespace multifd::engine {

/// Tells the CPU that the loop polls: the other hardware thread of the core gets its share, and less power is used.
inline void spin_pause() noexcept {
#if MULTIFD_X86_64
  __builtin_ia32_pause();
#elif MULTIFD_AARCH64
  asm volatile("yield");
#endif
}

}  // namespace multifd::engine
