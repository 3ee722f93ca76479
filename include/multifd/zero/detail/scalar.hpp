// SPDX-License-Identifier: MIT
//
// The kernel that every machine has: 64-bit words. The wider kernels leave buffers below 64 bytes to it.
//
// Why no_sanitize("thread") is on every kernel: a live guest writes to its memory while a kernel reads it. That is
// intended: a page that changes is dirty again and will be sent again, so any answer about a changing page is right.
// The address sanitizer stays on: no kernel may read outside its buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace multifd::detail {

/// Bytes that are read first: 99.5 % of the non-zero pages of guests have a non-zero byte among them.
inline constexpr std::size_t zero_head_bytes = 64;

/// Bytes of each page in one step of the kernels that scan four pages in lock-step; divides their page sizes.
inline constexpr std::size_t zero_prefix_step = 256;

__attribute__((no_sanitize("thread"), always_inline)) inline std::uint64_t load_word(const std::byte* at) noexcept {
  std::uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

/// Whether any of the 64 bytes at `at` is not zero.
__attribute__((no_sanitize("thread"), always_inline)) inline bool scalar_any64(const std::byte* at) noexcept {
  std::uint64_t low = load_word(at) | load_word(at + 8) | load_word(at + 16) | load_word(at + 24);
  std::uint64_t high = load_word(at + 32) | load_word(at + 40) | load_word(at + 48) | load_word(at + 56);
  return (low | high) != 0;
}

__attribute__((no_sanitize("thread"))) inline bool is_zero_scalar(const void* data, std::size_t size) noexcept {
  const auto* at = static_cast<const std::byte*>(data);
  const std::byte* const end = at + size;
  if (size < 8) {
    std::byte any{};
    for (; at != end; ++at) any |= *at;
    return any == std::byte{};
  }
  // The last word, which may overlap the loop's last step, covers every tail.
  if (load_word(end - 8) != 0) return false;
  for (; end - at >= 64; at += 64) {
    if (scalar_any64(at)) return false;
  }
  for (; end - at > 8; at += 8) {
    if (load_word(at) != 0) return false;
  }
  return true;
}

}  // namespace multifd::detail
