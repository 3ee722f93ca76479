// SPDX-License-Identifier: MIT
//
// Is this memory all zero? One function for a buffer, one for a set of pages, and the list of kernels behind them,
// which can be named, listed and forced. The best kernel that this CPU and operating system run is chosen at the first
// use. What a zero page means on the wire is in policy.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
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

/// One way to search for a non-zero byte. Its functions may be called only when it is `supported`.
struct ZeroKernel {
  std::string_view name;                               ///< scalar, sse2, avx2, avx512, neon
  bool (*is_zero)(const void*, std::size_t) noexcept;  ///< as buffer_is_zero()
  bool supported;                                      ///< this CPU and this operating system run it
  /// Scans four pages in lock-step; null in kernels that cannot. Takes the four addresses and the page size, a multiple
  /// of 256. Returns how many bytes at the start of all four pages are known to be zero: the page size if all are.
  std::size_t (*zero_prefix4)(const std::byte* const*, std::size_t) noexcept = nullptr;
};

/// Lists every kernel that is compiled in, slowest first; `supported` says which of them run here.
///
/// Threads: any thread.
inline std::span<const ZeroKernel> zero_kernels() noexcept {
#if MULTIFD_X86_64
  // __builtin_cpu_supports also checks (xgetbv) that the operating system saves the wide registers.
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
  while (!kernels[best].supported) --best;  // scalar, the first, always is supported
  return kernels[best];
}

/// Chooses the best kernel, unless another thread was faster.
inline const ZeroKernel& choose_zero_kernel() noexcept {
  const ZeroKernel* active = nullptr;
  const ZeroKernel& best = best_zero_kernel();
  // Release: whoever loads the pointer sees the list it points into; meets chosen_zero_kernel(). Acquire, on failure: so
  // does this thread; meets another thread's choose_zero_kernel(), or force_zero_kernel().
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

/// Makes every later check use the named kernel, for tests and benchmarks. "" and "auto" return to the best
/// one.
///
/// Errors: unknown_policy (no such kernel is compiled in), not_supported (it does not run on this machine).
/// Threads: any thread; checks under way in others end with the kernel they began with.
[[nodiscard]] inline Result<void> force_zero_kernel(std::string_view name) noexcept {
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

/// Whether `size` bytes at `data` are all zero; true for a `size` of 0.
///
/// Params: `data`: any alignment; other threads may change the bytes while they are read (a live guest).
/// Threads: any thread.
/// Cost: reads every byte of a zero buffer; any other buffer up to the first step that has a non-zero byte.
inline bool buffer_is_zero(const void* data, std::size_t size) noexcept {
  return chosen_zero_kernel().is_zero(data, size);
}

namespace detail {

#if !MULTIFD_X86_64 && !MULTIFD_AARCH64
inline bool head_any64(const std::byte* at) noexcept { return scalar_any64(at); }
#endif

/// Four pages in lock-step: page i of each quarter of `count` pages, a multiple of 4. Each quarter is read from
/// its first page to its last, so that the hardware's prefetcher, which follows adjacent pages, helps.
struct ZeroLanes {
  const std::byte* const* pages;
  std::size_t length;  ///< pages in each quarter

  std::array<const std::byte*, 4> operator[](std::size_t i) const noexcept {
    return {pages[i], pages[length + i], pages[2 * length + i], pages[3 * length + i]};
  }

  /// Prefetches the pages behind those at `i`, unless they are adjacent: the hardware prefetches adjacent pages by
  /// itself, and a second prefetch would slow it down. Always inlined, because GCC 12 drops calls of a function that
  /// only prefetches.
  __attribute__((always_inline)) void prefetch_after(std::size_t i, std::size_t page_bytes) const noexcept {
    if (i + 1 == length) return;
    const std::array now = (*this)[i];
    const std::array next = (*this)[i + 1];
    for (std::size_t lane = 0; lane < 4; ++lane)
      if (next[lane] != now[lane] + page_bytes) __builtin_prefetch(next[lane]);
  }
};

/// Returns which pages have a zero head: bit i for page i. Reads the first word of every page first, which settles most
/// pages: one load each and no branch, so that the core has as many cache misses under way as it can.
__attribute__((no_sanitize("thread"))) inline std::uint64_t zero_heads(const std::byte* const* pages,
                                                                       std::size_t count) noexcept {
  std::uint64_t words = 0;
  for (std::size_t i = 0; i < count; ++i) words |= std::uint64_t{load_word(pages[i]) == 0} << i;
  std::uint64_t zero = 0;
  for (; words != 0; words &= words - 1) {
    const int i = std::countr_zero(words);
    zero |= std::uint64_t{!head_any64(pages[i])} << i;
  }
  return zero;
}

/// Scans pages, bits 0 to 63 of `candidates`, and returns the bits of those that are zero.
inline std::uint64_t scan_candidates(const ZeroKernel& kernel, const std::byte* const* pages, std::uint64_t candidates,
                                     std::size_t page_bytes, bool in_lock_step) noexcept {
  std::array<const std::byte*, 64> page;
  std::array<std::uint8_t, 64> bit;
  std::size_t count = 0;
  for (std::uint64_t left = candidates; left != 0; left &= left - 1) {
    bit[count] = static_cast<std::uint8_t>(std::countr_zero(left));
    page[count] = pages[bit[count]];
    ++count;
  }
  std::uint64_t zero = 0;
  std::size_t done = 0;
  if (in_lock_step && count >= 2) {
    // Scanning a page twice costs next to nothing, because its lines are in cache.
    for (; count % 4 != 0; ++count) {
      page[count] = page[count - 1];
      bit[count] = bit[count - 1];
    }
    const ZeroLanes lanes{page.data(), count / 4};
    for (std::size_t i = 0; i < lanes.length; ++i) {
      lanes.prefetch_after(i, page_bytes);
      const std::array four = lanes[i];
      const std::size_t prefix = kernel.zero_prefix4(four.data(), page_bytes);
      for (std::size_t lane = 0; lane < 4; ++lane)
        zero |= std::uint64_t{prefix == page_bytes || kernel.is_zero(four[lane] + prefix, page_bytes - prefix)}
                << bit[lane * lanes.length + i];
    }
    done = count;
  }
  for (; done < count; ++done) zero |= std::uint64_t{kernel.is_zero(page[done], page_bytes)} << bit[done];
  return zero;
}

}  // namespace detail

/// Classifies pages: bit i of the result is set when page i is all zero.
///
/// Scans four pages in lock-step as long as all are zero. From the first non-zero page on it reads the heads of all
/// remaining pages, which settles nearly all of them, and then scans the pages that may still be zero.
///
/// Params: `pages`: `count` addresses, any alignment, each of `page_bytes` bytes; `count`: 1 to 64.
/// Threads: any thread.
/// Cost: cold zero pages in order of their addresses at the speed at which memory can be read; in random order, half
///   the time of a plain loop over the pages. benchmarks/kernels has the figures.
__attribute__((no_sanitize("thread"))) inline std::uint64_t zero_page_mask(const std::byte* const* pages,
                                                                           std::size_t count,
                                                                           std::size_t page_bytes) noexcept {
  MULTIFD_ASSERT(count >= 1 && count <= 64);
  const ZeroKernel& kernel = chosen_zero_kernel();
  const bool in_lock_step = kernel.zero_prefix4 != nullptr && page_bytes % detail::zero_prefix_step == 0;
  std::uint64_t zero = 0;
  std::uint64_t left = ~std::uint64_t{0} >> (64 - count);

  const detail::ZeroLanes lanes{pages, count / 4};
  if (in_lock_step && lanes.length > 0 && !detail::head_any64(pages[0])) {
    std::uint64_t now = 1;
    now |= now << lanes.length;
    now |= now << 2 * lanes.length;
    for (std::size_t i = 0; i < lanes.length; ++i, now <<= 1) {
      lanes.prefetch_after(i, page_bytes);
      const std::array four = lanes[i];
      if (kernel.zero_prefix4(four.data(), page_bytes) != page_bytes) break;
      zero |= now;
    }
    left &= ~zero;
  }
  if (left == 0) return zero;

  const std::uint64_t heads = page_bytes < detail::zero_head_bytes ? left : left & detail::zero_heads(pages, count);
  if (heads == 0) return zero;
  return zero | detail::scan_candidates(kernel, pages, heads, page_bytes, in_lock_step);
}

}  // namespace multifd
