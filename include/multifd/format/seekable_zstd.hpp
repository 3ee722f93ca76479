// SPDX-License-Identifier: MIT
//
// Compressed images (format/seekable_zstd.md section 20): zstd's seekable format, and a frame of our own in it that zstd's
// programs skip. All integers little-endian.
//
//   zstd frame | zstd frame | .. | image frame | seek table
//                                  5d 2a 4d 18   5e 2a 4d 18 .. b1 ea 92 8f
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "multifd/format/byte_order.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::uint32_t seek_table_frame_magic = 0x184d2a5e;
inline constexpr std::uint32_t image_frame_magic = 0x184d2a5d;
inline constexpr std::uint32_t seekable_magic = 0x8f92eab1;
inline constexpr std::size_t skippable_header_bytes = 8;
inline constexpr std::size_t seek_footer_bytes = 9;
/// More entries no reader of the format takes.
inline constexpr std::uint64_t max_seek_entries = std::uint64_t{1} << 27;

/// What every skippable frame begins with.
struct SkippableHeader {
  std::uint32_t magic = 0;
  std::uint32_t content_bytes = 0;
};

inline SkippableHeader parse_skippable_header(std::span<const std::byte, skippable_header_bytes> bytes) noexcept {
  return {.magic = load_le<std::uint32_t>(&bytes[0]), .content_bytes = load_le<std::uint32_t>(&bytes[4])};
}
inline std::array<std::byte, skippable_header_bytes> encode_skippable_header(const SkippableHeader& header) noexcept {
  std::array<std::byte, skippable_header_bytes> bytes;
  store_le(&bytes[0], header.magic);
  store_le(&bytes[4], header.content_bytes);
  return bytes;
}

/// One entry of the seek table, about one frame of the file.
struct SeekEntry {
  std::uint32_t frame_bytes = 0;    ///< in the file
  std::uint32_t content_bytes = 0;  ///< 0: a skippable frame
  std::uint32_t checksum = 0;       ///< zstd_checksum_of() the content; 0 in a table without checksums

  friend bool operator==(const SeekEntry&, const SeekEntry&) = default;
};
inline constexpr std::size_t seek_entry_bytes = 12;
inline constexpr std::size_t seek_entry_bytes_without_checksum = 8;

/// Params `bytes`: 12, or 8 of a table without checksums.
inline SeekEntry parse_seek_entry(std::span<const std::byte> bytes) noexcept {
  return {.frame_bytes = load_le<std::uint32_t>(&bytes[0]),
          .content_bytes = load_le<std::uint32_t>(&bytes[4]),
          .checksum = bytes.size() == seek_entry_bytes ? load_le<std::uint32_t>(&bytes[8]) : 0};
}
inline std::array<std::byte, seek_entry_bytes> encode_seek_entry(const SeekEntry& entry) noexcept {
  std::array<std::byte, seek_entry_bytes> bytes;
  store_le(&bytes[0], entry.frame_bytes);
  store_le(&bytes[4], entry.content_bytes);
  store_le(&bytes[8], entry.checksum);
  return bytes;
}

/// The last bytes of a file.
struct SeekFooter {
  std::uint32_t entries = 0;
  bool checksums = true;

  std::size_t entry_bytes() const noexcept { return checksums ? seek_entry_bytes : seek_entry_bytes_without_checksum; }
  /// Of the whole seek table, a skippable frame.
  std::uint64_t table_bytes() const noexcept {
    return skippable_header_bytes + std::uint64_t{entries} * entry_bytes() + seek_footer_bytes;
  }
};

/// Errors: Errc::not_seekable (no such magic), bad_seek_table (a reserved bit is set, or too many entries).
[[nodiscard]] inline Result<SeekFooter> parse_seek_footer(
    std::span<const std::byte, seek_footer_bytes> bytes) noexcept {
  if (const auto found = load_le<std::uint32_t>(&bytes[5]); found != seekable_magic)
    return fail(Errc::not_seekable, Stage::parse, "seek table", found, seekable_magic);
  const auto descriptor = std::to_integer<std::uint8_t>(bytes[4]);
  if ((descriptor & 0x7c) != 0) return fail(Errc::bad_seek_table, Stage::parse, "descriptor", descriptor);
  const SeekFooter footer{.entries = load_le<std::uint32_t>(&bytes[0]), .checksums = (descriptor & 0x80) != 0};
  if (footer.entries > max_seek_entries)
    return fail(Errc::bad_seek_table, Stage::parse, "entries of the seek table", footer.entries, max_seek_entries);
  return footer;
}
/// Of a table with checksums.
inline std::array<std::byte, seek_footer_bytes> encode_seek_footer(std::uint32_t entries) noexcept {
  std::array<std::byte, seek_footer_bytes> bytes;
  store_le(&bytes[0], entries);
  bytes[4] = std::byte{0x80};
  store_le(&bytes[5], seekable_magic);
  return bytes;
}

// ---- The image frame.
//
//   off  size  field             refused
//     0     8  mark              other than "MfdImage"
//     8     4  version           other than 1
//    12     4  flags             other than bit 0: incremental
//    16     4  frame_bytes       no power of two from 64 KiB to 1 MiB
//    20     4  0                 anything else
//    24     8  image_bytes       needs more or fewer tables than there are
//    32    16  digest            other than that of image_bytes, frame_bytes and the digests
//    48    16  base digest       not 0 without the flag
//    64  16*F  digests           F = image_bytes / frame_bytes, rounded up: XXH3-128 of each frame's content
//         8*S  frame digests     S = entries of the seek table less one: XXH3-64 of each frame as it stands in the file
//         8*B  bitmap            with the flag only, B = F / 64, rounded up: other than S bits below F
//           8  tables digest     other than XXH3-64 of this frame up to here and the seek table, each from its magic on
//           8  mark              as above: no damage to one byte lets a file pass for one of another program

inline constexpr std::array<std::byte, 8> image_mark = {std::byte{'M'}, std::byte{'f'}, std::byte{'d'}, std::byte{'I'},
                                                        std::byte{'m'}, std::byte{'a'}, std::byte{'g'}, std::byte{'e'}};
inline constexpr std::uint32_t image_version = 1;
inline constexpr std::uint32_t image_flag_incremental = 1;
inline constexpr std::size_t image_header_bytes = 64;
inline constexpr std::size_t image_trailer_bytes = 16;
inline constexpr std::size_t min_image_frame_bytes = 64 * 1024;
inline constexpr std::size_t max_image_frame_bytes = 1024 * 1024;
constexpr bool valid_image_frame_bytes(std::uint64_t bytes) noexcept {
  return std::has_single_bit(bytes) && bytes >= min_image_frame_bytes && bytes <= max_image_frame_bytes;
}

/// What the image frame begins with.
struct ImageHeader {
  bool incremental = false;
  std::uint32_t frame_bytes = 0;
  std::uint64_t image_bytes = 0;
  Digest128 digest{};
  Digest128 base_digest{};

  /// F.
  std::uint64_t frames() const noexcept { return image_bytes / frame_bytes + (image_bytes % frame_bytes != 0); }
  /// Of one frame's content.
  std::uint32_t bytes_of(std::uint64_t frame) const noexcept {
    const std::uint64_t left = image_bytes - frame * frame_bytes;
    return left < frame_bytes ? static_cast<std::uint32_t>(left) : frame_bytes;
  }
  std::uint64_t bitmap_words() const noexcept { return incremental ? frames() / 64 + (frames() % 64 != 0) : 0; }
  /// Of the image frame's content. Params `stored`: S, at most max_seek_entries. Cannot wrap: frame_bytes is 2^16 at least.
  std::uint64_t content_bytes(std::uint64_t stored) const noexcept {
    return image_header_bytes + 16 * frames() + 8 * stored + 8 * bitmap_words() + image_trailer_bytes;
  }

  friend bool operator==(const ImageHeader&, const ImageHeader&) = default;
};

inline Digest128 load_digest128(const std::byte* from) noexcept {
  return {.low = load_le<std::uint64_t>(from), .high = load_le<std::uint64_t>(from + 8)};
}
inline std::array<std::byte, 16> encode_digest128(const Digest128& digest) noexcept {
  std::array<std::byte, 16> bytes;
  store_le(&bytes[0], digest.low);
  store_le(&bytes[8], digest.high);
  return bytes;
}

/// What stands ahead of the digests when the digest of an image is made.
inline std::array<std::byte, 16> encode_digest_head(const ImageHeader& header) noexcept {
  return encode_digest128({.low = header.image_bytes, .high = header.frame_bytes});
}

/// Errors: Errc::bad_seek_table.
[[nodiscard]] inline Result<ImageHeader> parse_image_header(
    std::span<const std::byte, image_header_bytes> bytes) noexcept {
  constexpr Errc bad = Errc::bad_seek_table;
  if (std::memcmp(bytes.data(), image_mark.data(), image_mark.size()) != 0)
    return fail(bad, Stage::parse, "image: mark");
  if (const auto found = load_le<std::uint32_t>(&bytes[8]); found != image_version)
    return fail(bad, Stage::parse, "image: version", found, image_version);
  const auto flags = load_le<std::uint32_t>(&bytes[12]);
  if ((flags & ~image_flag_incremental) != 0) return fail(bad, Stage::parse, "image: flags", flags);
  const ImageHeader header{.incremental = flags != 0,
                           .frame_bytes = load_le<std::uint32_t>(&bytes[16]),
                           .image_bytes = load_le<std::uint64_t>(&bytes[24]),
                           .digest = load_digest128(&bytes[32]),
                           .base_digest = load_digest128(&bytes[48])};
  if (!valid_image_frame_bytes(header.frame_bytes))
    return fail(bad, Stage::parse, "image: frame size", header.frame_bytes);
  if (const auto reserved = load_le<std::uint32_t>(&bytes[20]); reserved != 0)
    return fail(bad, Stage::parse, "image: reserved field", reserved);
  if (!header.incremental && header.base_digest != Digest128{})
    return fail(bad, Stage::parse, "image: base without the flag");
  return header;
}

inline std::array<std::byte, image_header_bytes> encode_image_header(const ImageHeader& header) noexcept {
  std::array<std::byte, image_header_bytes> bytes{};
  std::memcpy(&bytes[0], image_mark.data(), image_mark.size());
  store_le(&bytes[8], image_version);
  store_le(&bytes[12], header.incremental ? image_flag_incremental : 0);
  store_le(&bytes[16], header.frame_bytes);
  store_le(&bytes[24], header.image_bytes);
  const auto digest = encode_digest128(header.digest);
  const auto base = encode_digest128(header.base_digest);
  std::memcpy(&bytes[32], digest.data(), digest.size());
  std::memcpy(&bytes[48], base.data(), base.size());
  return bytes;
}

}  // namespace multifd::wire
