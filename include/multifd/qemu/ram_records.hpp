// SPDX-License-Identifier: MIT
//
// Writes RAM records for a main stream (format/main_stream.md section 9.6), for a program that inserts, changes or
// names records on the way.
//
//   size  field
//      8  word: offset | flags         0x20 (CONTINUE): no name, same block as the record before
//      1  len of name, and the name    only without 0x20
//      -  ZERO: u8 0; PAGE: the page's bytes
//
// CONTINUE refers to the record before it in the stream, across sections. A program that inserts or drops a record must
// give the next one a name.
#pragma once

#include <cstring>
#include <span>
#include <string_view>

#include "multifd/config.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/format/main_stream.hpp"

namespace multifd::qemu {

namespace detail {

inline std::size_t encode_record_header(std::span<std::byte> to, std::uint64_t flags, std::uint64_t offset,
                                        std::string_view name) noexcept {
  MULTIFD_ASSERT(name.size() <= max_idstr_length);
  MULTIFD_ASSERT(offset % min_page_bytes == 0);
  if (name.empty()) {
    MULTIFD_ASSERT(to.size() >= ram_word_bytes);
    wire::store_be<std::uint64_t>(to.data(), offset | flags | ram_continue);
    return ram_word_bytes;
  }
  MULTIFD_ASSERT(to.size() >= ram_word_bytes + 1 + name.size());
  wire::store_be<std::uint64_t>(to.data(), offset | flags);
  to[ram_word_bytes] = static_cast<std::byte>(name.size());
  std::memcpy(&to[ram_word_bytes + 1], name.data(), name.size());
  return ram_word_bytes + 1 + name.size();
}

}  // namespace detail

/// Writes a ZERO record; max_zero_record_bytes are always enough room.
///
/// Params: `offset`: page aligned; `name`: the block's, at most 255 bytes, or empty to write CONTINUE.
/// Returns: the bytes written.
inline std::size_t encode_zero_record(std::span<std::byte> to, std::uint64_t offset, std::string_view name) noexcept {
  const std::size_t header = detail::encode_record_header(to, ram_zero, offset, name);
  MULTIFD_ASSERT(to.size() > header);
  to[header] = std::byte{0};
  return header + 1;
}

/// Writes the header in front of a PAGE record's bytes; max_ram_record_header_bytes are always enough room.
/// Params and return as encode_zero_record().
inline std::size_t encode_page_header(std::span<std::byte> to, std::uint64_t offset, std::string_view name) noexcept {
  return detail::encode_record_header(to, ram_page, offset, name);
}

}  // namespace multifd::qemu
