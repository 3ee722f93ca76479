// SPDX-License-Identifier: MIT
//
// What a destination says of the older copy that its memory holds (format/extension.md section 19.12): a key, and under it a
// digest of each page, or that it is zero, in the order of the blocks.
//
//   BASE_KEY       off  size  field     refused
//                    2    16  key
//   BASE_DIGESTS     2     4  block     another one than the next page's
//                    6     8  offset    another one than the next page's
//                   14  16*n  digests   none, part of one, over 31; past the block's end
//   BASE_ZEROS       2     4  block     as above
//                    6     8  offset    as above
//                   14     8  pages     0; past the block's end
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/extension.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t base_digests_header_bytes = 14;
/// The most digests of one message.
inline constexpr std::size_t max_base_digests = (max_extension_answer_bytes - base_digests_header_bytes) / 16;

/// BASE_DIGESTS or BASE_ZEROS, taken apart.
struct BasePages {
  std::uint32_t block = 0;   ///< index into the block list of RAM's START; not checked yet, as the other fields
  std::uint64_t offset = 0;  ///< of the first page, bytes
  std::uint64_t pages = 0;   ///< at least one
  std::span<const std::byte> digests{};  ///< 16 bytes each; empty: all of these pages are zero

  Digest128 digest(std::size_t page) const noexcept {
    return {.low = load_be<std::uint64_t>(&digests[16 * page + 8]),
            .high = load_be<std::uint64_t>(&digests[16 * page])};
  }
};

inline FieldWriter<18> encode_base_key(const DigestKey& key) noexcept {
  FieldWriter<18> bytes;
  return bytes.be(static_cast<std::uint16_t>(ExtensionKind::base_key)).bytes(key);
}

/// Encodes BASE_ZEROS.
inline FieldWriter<22> encode_base_zeros(std::uint32_t block, std::uint64_t offset, std::uint64_t pages) noexcept {
  FieldWriter<22> bytes;
  return bytes.be(static_cast<std::uint16_t>(ExtensionKind::base_zeros)).be(block).be(offset).be(pages);
}

/// Encodes BASE_DIGESTS. Params `digests`: 1 to max_base_digests.
inline FieldWriter<max_extension_answer_bytes> encode_base_digests(std::uint32_t block, std::uint64_t offset,
                                                                   std::span<const Digest128> digests) noexcept {
  FieldWriter<max_extension_answer_bytes> bytes;
  bytes.be(static_cast<std::uint16_t>(ExtensionKind::base_digests)).be(block).be(offset);
  for (const Digest128& each : digests) bytes.be(each.high).be(each.low);
  return bytes;
}

/// The key of a BASE_KEY that parse_extension() has returned.
[[nodiscard]] inline DigestKey base_key_of(const ExtensionMessage& message) noexcept {
  DigestKey key{};
  std::ranges::copy(message.body.first(key.size()), key.begin());
  return key;
}

/// Parses a BASE_DIGESTS or BASE_ZEROS that parse_extension() has returned. Errors: Errc::bad_extension_message (detail:
/// bytes of the digests; of BASE_ZEROS: pages).
[[nodiscard]] inline Result<BasePages> parse_base_pages(const ExtensionMessage& message) noexcept {
  FieldReader in(message.body);
  BasePages pages{.block = in.be<std::uint32_t>(), .offset = in.be<std::uint64_t>()};
  const auto name = extension_name(message.kind);
  if (message.kind == ExtensionKind::base_zeros) {
    pages.pages = in.be<std::uint64_t>();
    if (!in.good() || pages.pages == 0)
      return fail(Errc::bad_extension_message, Stage::parse, "zero pages of the older copy", pages.pages, 0, name);
    return pages;
  }
  if (!in.good() || in.left() == 0 || in.left() % 16 != 0)
    return fail(Errc::bad_extension_message, Stage::parse, "digests of the older copy", in.left(), 0, name);
  pages.digests = in.rest();
  pages.pages = pages.digests.size() / 16;
  return pages;
}

}  // namespace multifd::wire
