// SPDX-License-Identifier: MIT
//
// The arm64 kernel: NEON, which every arm64 CPU has, so no target attribute is needed. Its steps are
// those of x86.hpp.
#pragma once

#include <arm_neon.h>

#include "multifd/zero/detail/scalar.hpp"

#define MULTIFD_NEON __attribute__((no_sanitize("thread")))
#define MULTIFD_INLINE __attribute__((always_inline)) inline

namespace multifd::detail {

MULTIFD_NEON MULTIFD_INLINE uint8x16_t neon_or64(const std::byte* at) noexcept {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(at);
  return vorrq_u8(vorrq_u8(vld1q_u8(bytes), vld1q_u8(bytes + 16)),
                  vorrq_u8(vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)));
}

MULTIFD_NEON MULTIFD_INLINE bool neon_any(uint8x16_t v) noexcept { return vmaxvq_u32(vreinterpretq_u32_u8(v)) != 0; }

MULTIFD_NEON MULTIFD_INLINE bool neon_any64(const std::byte* at) noexcept { return neon_any(neon_or64(at)); }

MULTIFD_NEON MULTIFD_INLINE bool neon_any256(const std::byte* at) noexcept {
  return neon_any(
      vorrq_u8(vorrq_u8(neon_or64(at), neon_or64(at + 64)), vorrq_u8(neon_or64(at + 128), neon_or64(at + 192))));
}

MULTIFD_NEON inline bool is_zero_neon(const void* data, std::size_t size) noexcept {
  if (size < 64) return is_zero_scalar(data, size);
  const auto* at = static_cast<const std::byte*>(data);
  const std::byte* const end = at + size;
  if (neon_any64(at)) return false;
  if (size < 256) {
    for (; end - at > 64; at += 64) {
      if (neon_any64(at)) return false;
    }
    return !neon_any64(end - 64);
  }
  for (; end - at > 256; at += 256) {
    if (neon_any256(at)) return false;
  }
  return !neon_any256(end - 256);
}

/// The head of a page, in the same way for every kernel.
MULTIFD_NEON MULTIFD_INLINE bool head_any64(const std::byte* at) noexcept { return neon_any64(at); }

}  // namespace multifd::detail

#undef MULTIFD_NEON
#undef MULTIFD_INLINE
