// SPDX-License-Identifier: MIT
//
// For the contract checks: what pages hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>

namespace multifd::testing::detail {

/// Fills each KiB, a whole number of them, with a byte of its own behind a word of its own: quick, and no two pages alike.
inline void fill_differently(std::span<std::byte> bytes, std::mt19937_64& random) {
  for (std::size_t i = 0; i < bytes.size(); i += 1024) {
    const std::uint64_t word = random();
    std::memset(bytes.data() + i, static_cast<int>(word >> 56), 1024);
    std::memcpy(bytes.data() + i, &word, 8);
  }
}

/// Whether all bytes have this value.
inline bool holds_only(std::span<const std::byte> bytes, std::byte value) {
  return bytes.empty() || (bytes[0] == value && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0);
}

}  // namespace multifd::testing::detail
