// SPDX-License-Identifier: MIT
//
// MISSING_PAGES and MEMORY_FOLLOWS (format/extension.md section 19.9): which pages of the stopped guest the destination does
// not have when it runs it, and that it has to ask for them on connections of their own. What those begin with is here,
// too.
//
//   MISSING_PAGES: page_bitmap.hpp         a page connection
//                                          off  size  field
//   MEMORY_FOLLOWS                           0     4  magic
//   off  size  field        refused          4    16  session
//     2     8  pages        other than MISSING_PAGES have said
//    10     2  connections  0, over 256
//    12    16  session
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/format/page_bitmap.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

// ---- MISSING_PAGES

/// Sets the bit of each page that a MISSING_PAGES names in a block's bitmap.
///
/// Params: `bitmap`: of the whole block; the others, Errors: as for_each_word().
/// Threads: any.
[[nodiscard]] inline Result<void> add_missing_pages(const PageBitmap& pages, std::span<std::uint64_t> bitmap,
                                                    std::uint64_t block_bytes, std::size_t page_bytes,
                                                    std::string_view idstr) noexcept {
  return for_each_word(pages, block_bytes, page_bytes, idstr, [&](std::uint64_t index, std::uint64_t word) {
    bitmap[index] |= word;
    return Result<void>();
  });
}

// ---- MEMORY_FOLLOWS

inline constexpr unsigned max_page_connections = 256;  ///< those of the background, and one for what is urgent

struct MemoryFollows {
  std::uint64_t pages = 0;        ///< that MISSING_PAGES have named
  std::uint16_t connections = 0;  ///< that the source makes, and makes again when one is lost
  Uuid session{};                 ///< what those have in common, and no other connection has
};

inline FieldWriter<28> encode_memory_follows(const MemoryFollows& follows) noexcept {
  FieldWriter<28> bytes;
  bytes.be(static_cast<std::uint16_t>(ExtensionKind::memory_follows)).be(follows.pages).be(follows.connections);
  return bytes.bytes(follows.session);
}

/// Parses a MEMORY_FOLLOWS that parse_extension() has returned. Errors: Errc::bad_extension_message (detail: the number of
/// connections).
[[nodiscard]] inline Result<MemoryFollows> parse_memory_follows(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  MemoryFollows follows{.pages = in.be<std::uint64_t>(), .connections = in.be<std::uint16_t>()};
  std::ranges::copy(in.take(sizeof(Uuid)), follows.session.begin());
  if (!in.good() || follows.connections == 0 || follows.connections > max_page_connections)
    return fail(Errc::bad_extension_message, Stage::parse, "number of page connections", follows.connections,
                max_page_connections, "MEMORY_FOLLOWS");
  return follows;
}

// ---- What a page connection begins with

/// "mfpg": what tells a page connection from a channel and from a main connection.
inline constexpr std::uint32_t page_connection_magic = 0x6d667067;
inline constexpr std::size_t page_connection_bytes = 4 + sizeof(Uuid);

inline FieldWriter<page_connection_bytes> encode_page_connection(const Uuid& session) noexcept {
  FieldWriter<page_connection_bytes> bytes;
  return bytes.be(page_connection_magic).bytes(session);
}

/// The session that a connection names; none: it is no page connection's.
[[nodiscard]] inline std::optional<Uuid> parse_page_connection(
    std::span<const std::byte, page_connection_bytes> bytes) noexcept {
  if (load_be<std::uint32_t>(bytes.data()) != page_connection_magic) return std::nullopt;
  Uuid session;
  std::ranges::copy(bytes.subspan<4>(), session.begin());
  return session;
}

}  // namespace multifd::wire
