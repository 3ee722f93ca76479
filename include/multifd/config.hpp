// SPDX-License-Identifier: MIT
//
// Facts about the compiler and the machine that several rooms need, and the library's one assertion.
// Nothing here depends on compiler flags, so that two translation units always agree about layouts.
#pragma once

#include <cstddef>
#include <cstdlib>

/// Ends the program when a rule of the library itself, or a caller's documented contract, is broken.
/// Never used for anything that a peer, a file or a command line can cause: those get an Error.
#ifndef MULTIFD_ASSERT
#define MULTIFD_ASSERT(condition) ((condition) ? static_cast<void>(0) : ::std::abort())
#endif

#if defined(__x86_64__)
#define MULTIFD_X86_64 1
#else
#define MULTIFD_X86_64 0
#endif

#if defined(__aarch64__)
#define MULTIFD_AARCH64 1
#else
#define MULTIFD_AARCH64 0
#endif

namespace multifd {

/// Distance in bytes that keeps two threads' data on different cache lines. Fixed, because
/// std::hardware_destructive_interference_size changes with -mtune and would change layouts with it.
inline constexpr std::size_t cache_line = 64;

}  // namespace multifd
