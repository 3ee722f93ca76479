// SPDX-License-Identifier: MIT
//
// The x86-64 kernels: SSE2 (every such CPU has it), AVX2, AVX-512F.
// Target attributes stand on each function, never on a file: with per-file flags a linker may keep the AVX
// copy of a shared inline function and run it on a machine without AVX. A helper is inlined only into a
// caller of the same target, and lambdas do not inherit the target. So each kernel has helpers of its own; all kernels
// read a buffer in the same order:
//
//   first word | head 64 B | steps of 256 or 512 B | one more step that ends at the end
//
// The steps start at 0 again and the last may overlap: reading a cached line twice costs less than odd offsets. Longer
// steps are no faster: with 512 B, cached memory is read as fast as the CPU can load. The tail and the middle are not
// read first: pages whose only non-zero byte is at the end are rare, and memory is read more slowly out of order.
#pragma once

#include <immintrin.h>

#include "multifd/zero/detail/scalar.hpp"

#define MULTIFD_SSE2 __attribute__((no_sanitize("thread")))
#define MULTIFD_AVX2 __attribute__((target("avx2"), no_sanitize("thread")))
#define MULTIFD_AVX512 __attribute__((target("avx512f"), no_sanitize("thread")))
#define MULTIFD_INLINE __attribute__((always_inline)) inline

namespace multifd::detail {

// SSE2: 16 bytes a register.

MULTIFD_SSE2 MULTIFD_INLINE __m128i sse2_or64(const std::byte* at) noexcept {
  const auto* v = reinterpret_cast<const __m128i*>(at);
  return _mm_or_si128(_mm_or_si128(_mm_loadu_si128(v), _mm_loadu_si128(v + 1)),
                      _mm_or_si128(_mm_loadu_si128(v + 2), _mm_loadu_si128(v + 3)));
}

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any(__m128i v) noexcept {
  return _mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128())) != 0xffff;
}

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any64(const std::byte* at) noexcept { return sse2_any(sse2_or64(at)); }

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any256(const std::byte* at) noexcept {
  return sse2_any(_mm_or_si128(_mm_or_si128(sse2_or64(at), sse2_or64(at + 64)),
                               _mm_or_si128(sse2_or64(at + 128), sse2_or64(at + 192))));
}

MULTIFD_SSE2 inline bool is_zero_sse2(const void* data, std::size_t size) noexcept {
  if (size < 64) return is_zero_scalar(data, size);
  const auto* at = static_cast<const std::byte*>(data);
  const std::byte* const end = at + size;
  if (load_word(at) != 0 || sse2_any64(at)) return false;
  if (size < 256) {
    for (; end - at > 64; at += 64) {
      if (sse2_any64(at)) return false;
    }
    return !sse2_any64(end - 64);
  }
  for (; end - at > 256; at += 256) {
    if (sse2_any256(at)) return false;
  }
  return !sse2_any256(end - 256);
}

/// The head of a page, in the same way for every kernel.
MULTIFD_SSE2 MULTIFD_INLINE bool head_any64(const std::byte* at) noexcept { return sse2_any64(at); }

// AVX2: 32 bytes a register.

MULTIFD_AVX2 MULTIFD_INLINE __m256i avx2_or64(const std::byte* at) noexcept {
  const auto* v = reinterpret_cast<const __m256i*>(at);
  return _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
}

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any(__m256i v) noexcept { return _mm256_testz_si256(v, v) == 0; }

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any64(const std::byte* at) noexcept { return avx2_any(avx2_or64(at)); }

MULTIFD_AVX2 MULTIFD_INLINE __m256i avx2_or128(const std::byte* at) noexcept {
  return _mm256_or_si256(avx2_or64(at), avx2_or64(at + 64));
}

MULTIFD_AVX2 MULTIFD_INLINE __m256i avx2_or256(const std::byte* at) noexcept {
  return _mm256_or_si256(avx2_or128(at), avx2_or128(at + 128));
}

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any512(const std::byte* at) noexcept {
  return avx2_any(_mm256_or_si256(avx2_or256(at), avx2_or256(at + 256)));
}

MULTIFD_AVX2 inline bool is_zero_avx2(const void* data, std::size_t size) noexcept {
  if (size < 64) return is_zero_scalar(data, size);
  const auto* at = static_cast<const std::byte*>(data);
  const std::byte* const end = at + size;
  if (load_word(at) != 0 || avx2_any64(at)) return false;
  if (size < 512) {
    for (; end - at > 64; at += 64) {
      if (avx2_any64(at)) return false;
    }
    return !avx2_any64(end - 64);
  }
  for (; end - at > 512; at += 512) {
    if (avx2_any512(at)) return false;
  }
  return !avx2_any512(end - 512);
}

/// Reads 128 bytes of each page in turn: with longer turns memory is read more slowly.
MULTIFD_AVX2 MULTIFD_INLINE __m256i avx2_or128x4(const std::byte* a, const std::byte* b, const std::byte* c,
                                                 const std::byte* d) noexcept {
  return _mm256_or_si256(_mm256_or_si256(avx2_or128(a), avx2_or128(b)), _mm256_or_si256(avx2_or128(c), avx2_or128(d)));
}

MULTIFD_AVX2 inline std::size_t zero_prefix4_avx2(const std::byte* const* pages, std::size_t size) noexcept {
  const std::byte *a = pages[0], *b = pages[1], *c = pages[2], *d = pages[3];
  for (std::size_t at = 0; at < size; at += zero_prefix_step) {
    const __m256i first = avx2_or128x4(a + at, b + at, c + at, d + at);
    const __m256i second = avx2_or128x4(a + at + 128, b + at + 128, c + at + 128, d + at + 128);
    if (avx2_any(_mm256_or_si256(first, second))) return at;
  }
  return size;
}

// AVX-512F: 64 bytes a register, so one load is a head.

MULTIFD_AVX512 MULTIFD_INLINE __m512i avx512_or128(const std::byte* at) noexcept {
  return _mm512_or_si512(_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64));
}

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any(__m512i v) noexcept { return _mm512_test_epi64_mask(v, v) != 0; }

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any64(const std::byte* at) noexcept {
  return avx512_any(_mm512_loadu_si512(at));
}

MULTIFD_AVX512 MULTIFD_INLINE __m512i avx512_or256(const std::byte* at) noexcept {
  return _mm512_or_si512(avx512_or128(at), avx512_or128(at + 128));
}

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any512(const std::byte* at) noexcept {
  return avx512_any(_mm512_or_si512(avx512_or256(at), avx512_or256(at + 256)));
}

MULTIFD_AVX512 inline bool is_zero_avx512(const void* data, std::size_t size) noexcept {
  if (size < 64) return is_zero_scalar(data, size);
  const auto* at = static_cast<const std::byte*>(data);
  const std::byte* const end = at + size;
  if (load_word(at) != 0 || avx512_any64(at)) return false;
  if (size < 512) {
    for (; end - at > 64; at += 64) {
      if (avx512_any64(at)) return false;
    }
    return !avx512_any64(end - 64);
  }
  for (; end - at > 512; at += 512) {
    if (avx512_any512(at)) return false;
  }
  return !avx512_any512(end - 512);
}

/// As avx2_or128x4().
MULTIFD_AVX512 MULTIFD_INLINE __m512i avx512_or128x4(const std::byte* a, const std::byte* b, const std::byte* c,
                                                     const std::byte* d) noexcept {
  return _mm512_or_si512(_mm512_or_si512(avx512_or128(a), avx512_or128(b)),
                         _mm512_or_si512(avx512_or128(c), avx512_or128(d)));
}

MULTIFD_AVX512 inline std::size_t zero_prefix4_avx512(const std::byte* const* pages, std::size_t size) noexcept {
  const std::byte *a = pages[0], *b = pages[1], *c = pages[2], *d = pages[3];
  for (std::size_t at = 0; at < size; at += zero_prefix_step) {
    const __m512i first = avx512_or128x4(a + at, b + at, c + at, d + at);
    const __m512i second = avx512_or128x4(a + at + 128, b + at + 128, c + at + 128, d + at + 128);
    if (avx512_any(_mm512_or_si512(first, second))) return at;
  }
  return size;
}

}  // namespace multifd::detail

#undef MULTIFD_SSE2
#undef MULTIFD_AVX2
#undef MULTIFD_AVX512
#undef MULTIFD_INLINE
