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
//
// Written with the compilers' vector types and builtins, which are what the intrinsics are made of: <immintrin.h> alone
// took an eighth of the time that multifd.hpp takes to compile.
#pragma once

#include "multifd/zero/detail/scalar.hpp"

#define MULTIFD_SSE2 __attribute__((no_sanitize("thread")))
#define MULTIFD_AVX2 __attribute__((target("avx2"), no_sanitize("thread")))
#define MULTIFD_AVX512 __attribute__((target("avx512f"), no_sanitize("thread")))
#define MULTIFD_INLINE __attribute__((always_inline)) inline

namespace multifd::detail {

// Registers of 16, 32 and 64 bytes, and the same in memory: anywhere, and over objects of any type. Never deduced: with
// `auto` and in templates GCC drops the alignment of 1.
using Vector16 [[gnu::vector_size(16)]] = long long;
using Vector32 [[gnu::vector_size(32)]] = long long;
using Vector64 [[gnu::vector_size(64)]] = long long;
using Bytes16 [[gnu::vector_size(16)]] = char;
using Unaligned16 __attribute__((vector_size(16), aligned(1), may_alias)) = long long;
using Unaligned32 __attribute__((vector_size(32), aligned(1), may_alias)) = long long;
using Unaligned64 __attribute__((vector_size(64), aligned(1), may_alias)) = long long;
static_assert(alignof(Unaligned16) == 1 && alignof(Unaligned32) == 1 && alignof(Unaligned64) == 1);

// SSE2: 16 bytes a register.

MULTIFD_SSE2 MULTIFD_INLINE Vector16 sse2_load(const std::byte* at) noexcept {
  return *reinterpret_cast<const Unaligned16*>(at);
}

MULTIFD_SSE2 MULTIFD_INLINE Vector16 sse2_or64(const std::byte* at) noexcept {
  return (sse2_load(at) | sse2_load(at + 16)) | (sse2_load(at + 32) | sse2_load(at + 48));
}

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any(Vector16 v) noexcept {
  return __builtin_ia32_pmovmskb128(reinterpret_cast<Bytes16>(v) == Bytes16{}) != 0xffff;
}

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any64(const std::byte* at) noexcept { return sse2_any(sse2_or64(at)); }

MULTIFD_SSE2 MULTIFD_INLINE bool sse2_any256(const std::byte* at) noexcept {
  return sse2_any((sse2_or64(at) | sse2_or64(at + 64)) | (sse2_or64(at + 128) | sse2_or64(at + 192)));
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

MULTIFD_AVX2 MULTIFD_INLINE Vector32 avx2_load(const std::byte* at) noexcept {
  return *reinterpret_cast<const Unaligned32*>(at);
}

MULTIFD_AVX2 MULTIFD_INLINE Vector32 avx2_or64(const std::byte* at) noexcept {
  return avx2_load(at) | avx2_load(at + 32);
}

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any(Vector32 v) noexcept { return __builtin_ia32_ptestz256(v, v) == 0; }

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any64(const std::byte* at) noexcept { return avx2_any(avx2_or64(at)); }

MULTIFD_AVX2 MULTIFD_INLINE Vector32 avx2_or128(const std::byte* at) noexcept {
  return avx2_or64(at) | avx2_or64(at + 64);
}

MULTIFD_AVX2 MULTIFD_INLINE Vector32 avx2_or256(const std::byte* at) noexcept {
  return avx2_or128(at) | avx2_or128(at + 128);
}

MULTIFD_AVX2 MULTIFD_INLINE bool avx2_any512(const std::byte* at) noexcept {
  return avx2_any(avx2_or256(at) | avx2_or256(at + 256));
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
MULTIFD_AVX2 MULTIFD_INLINE Vector32 avx2_or128x4(const std::byte* a, const std::byte* b, const std::byte* c,
                                                  const std::byte* d) noexcept {
  return (avx2_or128(a) | avx2_or128(b)) | (avx2_or128(c) | avx2_or128(d));
}

MULTIFD_AVX2 inline std::size_t zero_prefix4_avx2(const std::byte* const* pages, std::size_t size) noexcept {
  const std::byte *a = pages[0], *b = pages[1], *c = pages[2], *d = pages[3];
  for (std::size_t at = 0; at < size; at += zero_prefix_step) {
    const Vector32 first = avx2_or128x4(a + at, b + at, c + at, d + at);
    const Vector32 second = avx2_or128x4(a + at + 128, b + at + 128, c + at + 128, d + at + 128);
    if (avx2_any(first | second)) return at;
  }
  return size;
}

// AVX-512F: 64 bytes a register, so one load is a head.

MULTIFD_AVX512 MULTIFD_INLINE Vector64 avx512_load(const std::byte* at) noexcept {
  return *reinterpret_cast<const Unaligned64*>(at);
}

MULTIFD_AVX512 MULTIFD_INLINE Vector64 avx512_or128(const std::byte* at) noexcept {
  return avx512_load(at) | avx512_load(at + 64);
}

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any(Vector64 v) noexcept {
  constexpr int not_equal = 4;
  return __builtin_ia32_cmpq512_mask(v, Vector64{}, not_equal, 0xff) != 0;
}

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any64(const std::byte* at) noexcept { return avx512_any(avx512_load(at)); }

MULTIFD_AVX512 MULTIFD_INLINE Vector64 avx512_or256(const std::byte* at) noexcept {
  return avx512_or128(at) | avx512_or128(at + 128);
}

MULTIFD_AVX512 MULTIFD_INLINE bool avx512_any512(const std::byte* at) noexcept {
  return avx512_any(avx512_or256(at) | avx512_or256(at + 256));
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
MULTIFD_AVX512 MULTIFD_INLINE Vector64 avx512_or128x4(const std::byte* a, const std::byte* b, const std::byte* c,
                                                      const std::byte* d) noexcept {
  return (avx512_or128(a) | avx512_or128(b)) | (avx512_or128(c) | avx512_or128(d));
}

MULTIFD_AVX512 inline std::size_t zero_prefix4_avx512(const std::byte* const* pages, std::size_t size) noexcept {
  const std::byte *a = pages[0], *b = pages[1], *c = pages[2], *d = pages[3];
  for (std::size_t at = 0; at < size; at += zero_prefix_step) {
    const Vector64 first = avx512_or128x4(a + at, b + at, c + at, d + at);
    const Vector64 second = avx512_or128x4(a + at + 128, b + at + 128, c + at + 128, d + at + 128);
    if (avx512_any(first | second)) return at;
  }
  return size;
}

}  // namespace multifd::detail

#undef MULTIFD_SSE2
#undef MULTIFD_AVX2
#undef MULTIFD_AVX512
#undef MULTIFD_INLINE
