// SPDX-License-Identifier: MIT
//
// Facts about the compiler and the machine that several folders need, and the library's one assertion.
// Nothing here depends on compiler flags, so that two translation units always agree about layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

/// Ends the program when a rule of the library itself, or a caller's documented contract, is broken.
/// Never used for anything that a peer, a file or a command line can cause: those get an Error.
#ifndef MULTIFD_ASSERT
#define MULTIFD_ASSERT(condition) ((condition) ? static_cast<void>(0) : ::std::abort())
#endif

/// 1: a checking build, for the whole program (-DMULTIFD_CHECKED=1, the same in every file that includes multifd). It
/// ends the program, through MULTIFD_MISUSE, at the call that
///   queues a page twice in an epoch (not queue_copies(), whose pages are another sender's);
///   is in a Sender's producer calls, or in a Receiver's release_epoch(), finish() and end_epochs(), beside another thread;
///   uses a Sender or Receiver that was moved from;
///   destroys one while another thread is in one of its calls.
/// It costs one bit of memory for each page, and one test of that bit when the page is queued. Other builds check nothing
/// and pay nothing.
#ifndef MULTIFD_CHECKED
#define MULTIFD_CHECKED 0
#endif

/// MULTIFD_MISUSE(what, block, offset): says on stderr what the caller did, to which RAM block (may be empty), and ends
/// the program. Define it to do something else first; it must not return.
#ifndef MULTIFD_MISUSE
#define MULTIFD_MISUSE(what, block, offset) ::multifd::detail::end_of_misuse(what, block, offset)
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

namespace detail {

[[noreturn]] inline void end_of_misuse(const char* what, std::string_view block, std::uint64_t offset) noexcept {
  if (block.empty())
    std::fprintf(stderr, "multifd: misuse: %s\n", what);
  else
    std::fprintf(stderr, "multifd: misuse: %s: RAM block %.*s, offset %llu\n", what, static_cast<int>(block.size()),
                 block.data(), static_cast<unsigned long long>(offset));
  std::abort();
}

}  // namespace detail

}  // namespace multifd
