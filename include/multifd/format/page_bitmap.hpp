// SPDX-License-Identifier: MIT
//
// A message that names pages of one RAM block by a bitmap: MISSING_PAGES (format/extension.md section 19.9) and KNOWN_ZEROS
// (section 19.11).
//
//   off  size  field   refused
//     0     2  kind
//     2     4  block   not on the block list
//     6     8  offset  not a multiple of 64 pages
//    14   8*n  bitmap  none, part of a word, over 2046; a page past the block's end
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t page_bitmap_header_bytes = 14;
/// The most words of one message's bitmap.
inline constexpr std::size_t max_page_bitmap_words = (max_extension_bytes - page_bitmap_header_bytes) / 8;

/// One message, taken apart.
struct PageBitmap {
  ExtensionKind kind{};
  std::uint32_t block = 0;              ///< index into the block list of RAM's START
  std::uint64_t offset = 0;             ///< of the page of the bitmap's first bit, bytes; not checked yet
  std::span<const std::byte> bitmap{};  ///< be64 each; bit 0 of the first one is the page at `offset`

  std::size_t words() const noexcept { return bitmap.size() / 8; }
};

/// Which words of a bitmap the next message has: from the first one that is not 0 to the end of the message. None are left:
/// an empty span. Params `most`: from 1 to max_page_bitmap_words.
[[nodiscard]] inline std::span<const std::uint64_t> next_words(std::span<const std::uint64_t> bitmap,
                                                               std::size_t most = max_page_bitmap_words) noexcept {
  constexpr std::ptrdiff_t gap = 3;  // so many words without a page are as long as a message's head
  const auto is_set = [](std::uint64_t word) { return word != 0; };
  const auto first = std::ranges::find_if(bitmap, is_set);
  auto end = first;  // behind the last word of the message
  for (auto next = first; next != bitmap.end() && next - end < gap; next = std::find_if(end, bitmap.end(), is_set)) {
    if (next + 1 - first > static_cast<std::ptrdiff_t>(most)) break;
    end = next + 1;
  }
  return {first, end};
}

/// Encodes what stands in front of the bitmap. Params: as PageBitmap has them.
inline FieldWriter<page_bitmap_header_bytes> encode_page_bitmap_header(ExtensionKind kind, std::uint32_t block,
                                                                       std::uint64_t offset) noexcept {
  FieldWriter<page_bitmap_header_bytes> bytes;
  return bytes.be(static_cast<std::uint16_t>(kind)).be(block).be(offset);
}

/// Parses a message of such a kind that parse_extension() has returned. Errors: Errc::bad_extension_message (detail: bytes
/// of the bitmap; subject: the message's name).
[[nodiscard]] inline Result<PageBitmap> parse_page_bitmap(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  PageBitmap pages{
      .kind = message.kind, .block = in.be<std::uint32_t>(), .offset = in.be<std::uint64_t>(), .bitmap = {}};
  if (!in.good() || in.left() == 0 || in.left() % 8 != 0)
    return fail(Errc::bad_extension_message, Stage::parse, "bitmap of pages", in.left(), 0,
                extension_name(message.kind));
  pages.bitmap = in.rest();
  return pages;
}

/// Calls `on_word(index, word)`, which returns a Result<void>, for each word that names pages; `index` is the word's place in
/// a bitmap of the whole block. A word is checked before it is passed on.
///
/// Params: `block_bytes`: the size of the block whose index `pages.block` is. `idstr`: its name, for the error.
/// Errors: Errc::offset_misaligned, offset_past_block (detail: the offset, of the message or of the page); what on_word
///   returns.
/// Threads: any.
template <class OnWord>
[[nodiscard]] Result<void> for_each_word(const PageBitmap& pages, std::uint64_t block_bytes, std::size_t page_bytes,
                                         std::string_view idstr, OnWord&& on_word) {
  const char* const what = pages.kind == ExtensionKind::known_zeros ? "known zeros" : "missing pages";
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
    MULTIFD_TRY(on_word(first_word + i, word));
  }
  return {};
}

/// Calls `on_run(first, count)`, which returns a Result<void>, for each run of adjacent pages that are named, also over several
/// words; `first`: the page's number in the block. Else as for_each_word().
template <class OnRun>
[[nodiscard]] Result<void> for_each_run(const PageBitmap& pages, std::uint64_t block_bytes, std::size_t page_bytes,
                                        std::string_view idstr, OnRun&& on_run) {
  std::uint64_t first = 0, count = 0;
  const auto on_word = [&](std::uint64_t index, std::uint64_t word) -> Result<void> {
    for (unsigned at = 0; at < 64 && word >> at != 0;) {
      at += static_cast<unsigned>(std::countr_zero(word >> at));
      const auto run = static_cast<unsigned>(std::countr_one(word >> at));
      if (count > 0 && index * 64 + at != first + count) {
        MULTIFD_TRY(on_run(first, std::exchange(count, 0)));
      }
      if (count == 0) first = index * 64 + at;
      count += run;
      at += run;
    }
    return {};
  };
  MULTIFD_TRY(for_each_word(pages, block_bytes, page_bytes, idstr, on_word));
  return count == 0 ? Result<void>{} : on_run(first, count);
}

}  // namespace multifd::wire
