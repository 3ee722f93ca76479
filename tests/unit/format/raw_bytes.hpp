// SPDX-License-Identifier: MIT
//
// Big-endian numbers written and read one byte at a time: the tests' own, so that a mistake in the library's
// byte_order.hpp cannot cancel itself out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

using Bytes = std::vector<std::byte>;

inline void put(Bytes& bytes, std::size_t offset, std::size_t size, std::uint64_t value) {
  for (std::size_t i = 0; i < size; ++i)
    bytes.at(offset + i) = static_cast<std::byte>(value >> (8 * (size - 1 - i)) & 0xff);
}

inline void put32(Bytes& bytes, std::size_t offset, std::uint32_t value) { put(bytes, offset, 4, value); }
inline void put64(Bytes& bytes, std::size_t offset, std::uint64_t value) { put(bytes, offset, 8, value); }

inline void put_text(Bytes& bytes, std::size_t offset, std::string_view text) {
  for (std::size_t i = 0; i < text.size(); ++i) bytes.at(offset + i) = static_cast<std::byte>(text[i]);
}
