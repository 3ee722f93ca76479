// SPDX-License-Identifier: MIT
//
// What the zero check is compared with: the loops that one would write, and what memory can do at best. Each loop is
// called for one page through a pointer, like a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "multifd/config.hpp"
#if MULTIFD_X86_64
#include <immintrin.h>
#endif

namespace kernels {

/// A word at a time, as the compiler makes it. (It does not vectorise a loop that may end early.)
[[gnu::noinline]] inline bool plain_loop(const void* data, std::size_t size) noexcept {
  const auto* at = static_cast<const std::byte*>(data);
  for (std::size_t i = 0; i < size; i += sizeof(std::uint64_t)) {
    std::uint64_t word;
    std::memcpy(&word, at + i, sizeof word);
    if (word != 0) return false;
  }
  return true;
}

#if MULTIFD_X86_64

/// The loop of the table in the issue: AVX2, 128 bytes a step, no prefetch.
[[gnu::noinline, gnu::target("avx2")]] inline bool avx2_loop(const void* data, std::size_t size) noexcept {
  const auto* at = static_cast<const __m256i*>(data);
  const __m256i* const end = at + size / sizeof(__m256i);
  for (; at != end; at += 4) {
    const __m256i low = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
    const __m256i high = _mm256_or_si256(_mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3));
    const __m256i any = _mm256_or_si256(low, high);
    if (!_mm256_testz_si256(any, any)) return false;
  }
  return true;
}

/// Reads a whole without a branch for what is in it, a kilobyte a step; returns something of what it read.
[[gnu::noinline, gnu::target("avx2")]] inline std::uint64_t read_in_order(const std::byte* data,
                                                                          std::size_t size) noexcept {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (const std::byte* const end = data + size; data != end; data += 1024) {
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += 4) {
      const auto* at = reinterpret_cast<const __m256i*>(data) + i;
      a = _mm256_or_si256(a, _mm256_loadu_si256(at));
      b = _mm256_or_si256(b, _mm256_loadu_si256(at + 1));
      c = _mm256_or_si256(c, _mm256_loadu_si256(at + 2));
      d = _mm256_or_si256(d, _mm256_loadu_si256(at + 3));
    }
  }
  return static_cast<std::uint64_t>(
      _mm256_movemask_epi8(_mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d))));
}

/// Reads a megabyte after the other, each in four or eight places at once, which is where one core is fastest.
template <std::size_t Streams>
[[gnu::noinline, gnu::target("avx2")]] std::uint64_t read_streams(const std::byte* data, std::size_t size) noexcept {
  constexpr std::size_t whole = std::size_t{1} << 20;
  constexpr std::size_t part = whole / Streams;
  __m256i any = _mm256_setzero_si256();
  for (const std::byte* const end = data + size; data != end; data += whole) {
    for (std::size_t at = 0; at < part; at += 128) {
      for (std::size_t stream = 0; stream < Streams; ++stream) {
        const auto* from = reinterpret_cast<const __m256i*>(data + stream * part + at);
        const __m256i low = _mm256_or_si256(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1));
        const __m256i high = _mm256_or_si256(_mm256_loadu_si256(from + 2), _mm256_loadu_si256(from + 3));
        any = _mm256_or_si256(any, _mm256_or_si256(low, high));
      }
    }
  }
  return static_cast<std::uint64_t>(_mm256_movemask_epi8(any));
}

#endif

}  // namespace kernels
