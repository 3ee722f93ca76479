// SPDX-License-Identifier: MIT
//
// MISSING_PAGES and MEMORY_FOLLOWS (format/extension.md section 19.9): which pages of the stopped guest the destination does
// not have when it runs it, and that it has to ask for them on connections of their own. What those begin with is here,
// too.
//
//   MISSING_PAGES                                        MEMORY_FOLLOWS
//   off  size  field   refused                           off  size  field        refused
//     2     4  block   not on the block list               2     8  pages        other than MISSING_PAGES have said
//     6     8  offset  not a multiple of 64 pages         10     2  connections  0, over 256
//    14   8*n  bitmap  none, part of a word, over 2046;   12    16  session
//                      a page past the block's end
//
//   a page connection                                    off  size  field
//                                                          0     4  magic
//                                                          4    16  session
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

// ---- MISSING_PAGES

inline constexpr std::size_t missing_pages_header_bytes = 14;
/// The most words of one message's bitmap.
inline constexpr std::size_t max_missing_words = (max_extension_bytes - missing_pages_header_bytes) / 8;

/// One message, taken apart.
struct MissingPages {
  std::uint32_t block = 0;              ///< index into the block list of RAM's START
  std::uint64_t offset = 0;             ///< of the page of the bitmap's first bit, bytes; not checked yet
  std::span<const std::byte> bitmap{};  ///< be64 each; bit 0 of the first one is the page at `offset`

  std::size_t words() const noexcept { return bitmap.size() / 8; }
};

/// Encodes what stands in front of the bitmap. Params: as MissingPages has them.
inline FieldWriter<missing_pages_header_bytes> encode_missing_pages_header(std::uint32_t block,
                                                                           std::uint64_t offset) noexcept {
  FieldWriter<missing_pages_header_bytes> bytes;
  return bytes.be(static_cast<std::uint16_t>(ExtensionKind::missing_pages)).be(block).be(offset);
}

/// Parses a MISSING_PAGES that parse_extension() has returned. Errors: Errc::bad_extension_message (detail: bytes of the
/// bitmap).
[[nodiscard]] inline Result<MissingPages> parse_missing_pages(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  MissingPages pages{.block = in.be<std::uint32_t>(), .offset = in.be<std::uint64_t>(), .bitmap = {}};
  if (!in.good() || in.left() == 0 || in.left() % 8 != 0)
    return fail(Errc::bad_extension_message, Stage::parse, "bitmap of missing pages", in.left(), 0, "MISSING_PAGES");
  pages.bitmap = in.rest();
  return pages;
}

/// Sets the bit of each missing page in a block's bitmap.
///
/// Params: `bitmap`: of the whole block, whose index `pages.block` is. `block_bytes`: its size. `idstr`: its name, for the
///   error.
/// Errors: Errc::offset_misaligned, offset_past_block (detail: the offset, of the message or of the page).
/// Threads: any.
[[nodiscard]] inline Result<void> add_missing_pages(const MissingPages& pages, std::span<std::uint64_t> bitmap,
                                                    std::uint64_t block_bytes, std::size_t page_bytes,
                                                    std::string_view idstr) noexcept {
  constexpr const char* what = "missing pages";
  if (pages.offset % (64 * std::uint64_t{page_bytes}) != 0)
    return fail(Errc::offset_misaligned, Stage::parse, what, pages.offset, 64 * page_bytes, idstr);
  if (pages.offset >= block_bytes)
    return fail(Errc::offset_past_block, Stage::parse, what, pages.offset, block_bytes, idstr);
  const std::uint64_t first_word = pages.offset / page_bytes / 64;
  const std::uint64_t pages_in_block = block_bytes / page_bytes;
  for (std::size_t i = 0; i < pages.words(); ++i) {
    const auto word = load_be<std::uint64_t>(&pages.bitmap[8 * i]);
    if (word == 0) continue;
    const std::uint64_t last = (first_word + i) * 64 + static_cast<unsigned>(std::bit_width(word)) - 1;
    if (last >= pages_in_block)
      return fail(Errc::offset_past_block, Stage::parse, what, last * page_bytes, block_bytes, idstr);
    bitmap[first_word + i] |= word;
  }
  return {};
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
