// SPDX-License-Identifier: MIT
//
// Is this memory all zero? One entry for a buffer, one for a set of pages, and the list of kernels behind
// them, which can be named, listed and forced. The best kernel that this CPU and operating system run is
// chosen at the first use. What a zero page means for the wire is policy.hpp's matter.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/zero/detail/scalar.hpp"
#if MULTIFD_X86_64
#include "multifd/zero/detail/x86.hpp"
#elif MULTIFD_AARCH64
#include "multifd/zero/detail/neon.hpp"
#endif

namespace multifd {

/// One way to look for a non-zero byte. Its functions may be called only when it is `supported`.
struct ZeroKernel {
  std::string_view name;                               ///< scalar, sse2, avx2, avx512, neon
  bool (*is_zero)(const void*, std::size_t) noexcept;  ///< as buffer_is_zero()
  bool supported;                                      ///< this CPU and this operating system run it
  /// Scans four pages in lock-step; null where the kernel does not. Takes their addresses and their size, a
  /// multiple of 256, and returns how many bytes at the start of all four are known to be zero: the size if
  /// all are.
  std::size_t (*zero_prefix4)(const std::byte* const*, std::size_t) noexcept = nullptr;
};

/// Lists every kernel that is compiled in, slowest first; `supported` tells which of them run here.
///
/// Threads: any thread.
inline std::span<const ZeroKernel> zero_kernels() noexcept {
#if MULTIFD_X86_64
  // __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the wide registers.
  static const std::array kernels = [] {
    __builtin_cpu_init();
    return std::array{
        ZeroKernel{"scalar", detail::is_zero_scalar, true},
        ZeroKernel{"sse2", detail::is_zero_sse2, true},
        ZeroKernel{"avx2", detail::is_zero_avx2, __builtin_cpu_supports("avx2") != 0, detail::zero_prefix4_avx2},
        ZeroKernel{"avx512", detail::is_zero_avx512, __builtin_cpu_supports("avx512f") != 0,
                   detail::zero_prefix4_avx512},
    };
  }();
#elif MULTIFD_AARCH64
  static constexpr std::array kernels{
      ZeroKernel{"scalar", detail::is_zero_scalar, true},
      ZeroKernel{"neon", detail::is_zero_neon, true},
  };
#else
  static constexpr std::array kernels{ZeroKernel{"scalar", detail::is_zero_scalar, true}};
#endif
  return kernels;
}

namespace detail {

/// The kernel in use; null until the first use.
inline constinit std::atomic<const ZeroKernel*> active_zero_kernel{nullptr};

inline const ZeroKernel& best_zero_kernel() noexcept {
  const std::span<const ZeroKernel> kernels = zero_kernels();
  std::size_t best = kernels.size() - 1;
  while (!kernels[best].supported) --best;  // scalar, the first, always is
  return kernels[best];
}

/// Chooses, unless another thread was faster.
inline const ZeroKernel& choose_zero_kernel() noexcept {
  const ZeroKernel* active = nullptr;
  const ZeroKernel& best = best_zero_kernel();
  // Release: whoever loads the pointer with acquire sees the list it points into. Acquire: so do we, on
  // failure.
  if (active_zero_kernel.compare_exchange_strong(active, &best, std::memory_order_acq_rel, std::memory_order_acquire))
    return best;
  return *active;
}

}  // namespace detail

/// Returns the kernel in use: the forced one, else the best that runs here.
///
/// Threads: any thread.
inline const ZeroKernel& chosen_zero_kernel() noexcept {
  // Acquire: meets the release in choose_zero_kernel() or force_zero_kernel().
  const ZeroKernel* active = detail::active_zero_kernel.load(std::memory_order_acquire);
  return active != nullptr ? *active : detail::choose_zero_kernel();
}

/// Makes every later check use the named kernel, for tests and benchmarks. "" and "auto" go back to the best
/// one.
///
/// Errors: unknown_policy (no such kernel is compiled in), not_supported (it does not run on this machine).
/// Threads: any thread; checks under way in others end with the kernel they began with.
inline Result<void> force_zero_kernel(std::string_view name) noexcept {
  const ZeroKernel* wanted = nullptr;
  if (name.empty() || name == "auto") wanted = &detail::best_zero_kernel();
  for (const ZeroKernel& kernel : zero_kernels()) {
    if (kernel.name == name) wanted = &kernel;
  }
  if (wanted == nullptr) return fail(Errc::unknown_policy, Stage::setup, "force_zero_kernel");
  if (!wanted->supported) return fail(Errc::not_supported, Stage::setup, "force_zero_kernel");
  // Release: meets the acquire in chosen_zero_kernel().
  detail::active_zero_kernel.store(wanted, std::memory_order_release);
  return {};
}

/// Tells whether `size` bytes at `data` are all zero. No bytes are zero.
///
/// Params: `data`: any alignment; the bytes may be changed by others while they are read (a live guest).
/// Threads: any thread.
/// Cost: reads every byte of a zero buffer; of others, first the head, the tail and the middle.
inline bool buffer_is_zero(const void* data, std::size_t size) noexcept {
  return chosen_zero_kernel().is_zero(data, size);
}

/// Classifies pages: bit i of the result is set when page i is all zero.
///
/// Goes in groups of eight: checks the group's heads, while the next group's heads are on their way, then
/// scans the pages still alive, four in lock-step where the kernel can.
///
/// Params: `pages`: `count` addresses, any alignment, each of `page_bytes` bytes; `count`: 1 to 64.
/// Threads: any thread.
/// Cost: cold and against a plain loop over the pages: the same for zero pages in order of their addresses, a
///   third faster for a guest's mix in order, up to twice as fast in random order.
__attribute__((no_sanitize("thread"))) inline std::uint64_t zero_page_mask(const std::byte* const* pages,
                                                                           std::size_t count,
                                                                           std::size_t page_bytes) noexcept {
  MULTIFD_ASSERT(count >= 1 && count <= 64);
  // So many heads are on their way at once; with more, pages in order get slower.
  constexpr std::size_t group = 8;
  static_assert(group % 4 == 0);
  const ZeroKernel& kernel = chosen_zero_kernel();
  const bool has_head = page_bytes >= detail::zero_head_bytes;
  const bool in_lock_step = kernel.zero_prefix4 != nullptr && page_bytes % detail::zero_prefix_step == 0;
  std::uint64_t zero = 0;
  for (std::size_t first = 0; first < count; first += group) {
    std::array<const std::byte*, group> alive;
    std::array<std::size_t, group> index;
    std::size_t alive_count = 0;
    for (std::size_t i = first; i < std::min(first + group, count); ++i) {
      if (i + group < count) __builtin_prefetch(pages[i + group]);
      // Without a branch: which page is alive cannot be predicted.
      alive[alive_count] = pages[i];
      index[alive_count] = i;
      alive_count += std::size_t{!has_head || !detail::scalar_any64(pages[i])};
    }
    std::size_t done = 0;
    for (; in_lock_step && done + 1 < alive_count; done += 4) {
      const std::size_t four_end = std::min(done + 4, alive_count);
      // A page scanned twice costs next to nothing: its lines are there.
      for (std::size_t i = four_end; i < done + 4; ++i) alive[i] = alive[done];
      const std::size_t prefix = kernel.zero_prefix4(&alive[done], page_bytes);
      for (std::size_t i = done; i < four_end; ++i)
        zero |= std::uint64_t{kernel.is_zero(alive[i] + prefix, page_bytes - prefix)} << index[i];
    }
    for (; done < alive_count; ++done) zero |= std::uint64_t{kernel.is_zero(alive[done], page_bytes)} << index[done];
  }
  return zero;
}

}  // namespace multifd
