// SPDX-License-Identifier: MIT
//
// PAGE_DIGESTS (format/extension.md section 19.6): digests of neighbouring pages of one RAM block, as the stopped guest
// has them at the source, for the destination to compare with its own.
//
//   off  size  field     refused
//     2     4  block     not on the block list; counted from 0 in its order
//     6     8  offset    not a multiple of the page size
//    14   8*n  digests   none, part of one, over 2046; XXH3-64 (seed 0) of each page; past the block's end
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/format/extension.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t page_digests_header_bytes = 14;
/// The most digests of one message.
inline constexpr std::size_t max_page_digests = (max_extension_bytes - page_digests_header_bytes) / 8;

/// One message, taken apart.
struct PageDigests {
  std::uint32_t block = 0;               ///< index into the block list of RAM's START
  std::uint64_t offset = 0;              ///< of the first page, bytes; not checked yet
  std::span<const std::byte> digests{};  ///< be64 each

  std::size_t pages() const noexcept { return digests.size() / 8; }
};

/// Encodes what stands in front of the digests. Params: as PageDigests has them.
inline FieldWriter<page_digests_header_bytes> encode_page_digests_header(std::uint32_t block,
                                                                         std::uint64_t offset) noexcept {
  FieldWriter<page_digests_header_bytes> bytes;
  return bytes.be(static_cast<std::uint16_t>(ExtensionKind::page_digests)).be(block).be(offset);
}

/// Parses a PAGE_DIGESTS that parse_extension() has returned. Errors: Errc::bad_extension_message (detail: bytes of the
/// digests).
[[nodiscard]] inline Result<PageDigests> parse_page_digests(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  PageDigests digests{.block = in.be<std::uint32_t>(), .offset = in.be<std::uint64_t>(), .digests = {}};
  if (!in.good() || in.left() == 0 || in.left() % 8 != 0)
    return fail(Errc::bad_extension_message, Stage::parse, "digests of pages", in.left(), 0, "PAGE_DIGESTS");
  digests.digests = in.rest();
  return digests;
}

/// Compares the source's digests with a block's memory, which is final.
///
/// Params: `memory`: the whole block, whose index `digests.block` is. `idstr`: its name, for the error. `zeros`: a bit for each
///   page of it that is zero and is not to be read, which would make it resident.
/// Errors: Errc::offset_misaligned, offset_past_block (detail: the offset); digest_mismatch (detail: the offset of the
///   first page that differs).
/// Threads: any. Cost: reads each page once.
[[nodiscard]] inline Result<void> compare_page_digests(const PageDigests& digests, std::span<const std::byte> memory,
                                                       std::size_t page_bytes, std::string_view idstr,
                                                       std::span<const std::uint64_t> zeros = {}) noexcept {
  if (digests.offset % page_bytes != 0)
    return fail(Errc::offset_misaligned, Stage::parse, "digests of pages", digests.offset, page_bytes, idstr);
  if (digests.offset > memory.size() || digests.pages() > (memory.size() - digests.offset) / page_bytes)
    return fail(Errc::offset_past_block, Stage::parse, "digests of pages", digests.offset, memory.size(), idstr);
  std::size_t at = digests.offset;
  const std::uint64_t of_zeros = digest_of_zeros(page_bytes);
  for (std::size_t i = 0; i < digests.pages(); ++i, at += page_bytes) {
    const bool known = has_page(zeros, at / page_bytes);
    if (load_be<std::uint64_t>(&digests.digests[8 * i]) !=
        (known ? of_zeros : digest_of(memory.subspan(at, page_bytes))))
      return fail(Errc::digest_mismatch, Stage::parse, "page at the source and here", at, 0, idstr);
  }
  return {};
}

}  // namespace multifd::wire
