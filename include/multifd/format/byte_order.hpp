// SPDX-License-Identifier: MIT
//
// Integers in byte buffers: big-endian, as all of QEMU's format has them (format/README.md section 1), and little-endian for zstd's and
// ELF's. No casts of packed structs: a load or store by memcpy compiles to one instruction and has no alignment or aliasing trap.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstring>

namespace multifd::wire {

template <std::unsigned_integral T>
constexpr T swap_if_little(T value) noexcept {
  if constexpr (std::endian::native == std::endian::little && sizeof(T) > 1) return std::byteswap(value);
  return value;
}

template <std::unsigned_integral T>
constexpr T swap_if_big(T value) noexcept {
  if constexpr (std::endian::native == std::endian::big && sizeof(T) > 1) return std::byteswap(value);
  return value;
}

/// Reads a big-endian integer at `from`, any alignment.
template <std::unsigned_integral T>
T load_be(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  return swap_if_little(value);
}

/// Writes a big-endian integer at `to`, any alignment.
template <std::unsigned_integral T>
void store_be(std::byte* to, T value) noexcept {
  value = swap_if_little(value);
  std::memcpy(to, &value, sizeof value);
}

/// Reads a little-endian integer at `from`, any alignment.
template <std::unsigned_integral T>
T load_le(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  return swap_if_big(value);
}

/// Writes a little-endian integer at `to`, any alignment.
template <std::unsigned_integral T>
void store_le(std::byte* to, T value) noexcept {
  value = swap_if_big(value);
  std::memcpy(to, &value, sizeof value);
}

}  // namespace multifd::wire
