// SPDX-License-Identifier: MIT
//
// The header of a RAM block in a mapped-ram file, and where bitmap and pages lie (format/mapped_ram.md section 12.1).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/format/byte_order.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

inline constexpr std::size_t mapped_ram_header_bytes = 28;
inline constexpr std::uint32_t mapped_ram_version = 1;
/// What a writer aligns the pages of a block to. Readers take any multiple of the page size.
inline constexpr std::uint64_t mapped_ram_alignment = 1024 * 1024;

/// Offsets are bytes from the beginning of the file; both 0: a block whose memory is not in the file.
struct MappedRamHeader {
  std::uint32_t version = mapped_ram_version;
  std::uint64_t page_size = 0;
  std::uint64_t bitmap_offset = 0;
  std::uint64_t pages_offset = 0;
};

inline MappedRamHeader parse_mapped_ram_header(std::span<const std::byte, mapped_ram_header_bytes> bytes) noexcept {
  return {.version = load_be<std::uint32_t>(&bytes[0]),
          .page_size = load_be<std::uint64_t>(&bytes[4]),
          .bitmap_offset = load_be<std::uint64_t>(&bytes[12]),
          .pages_offset = load_be<std::uint64_t>(&bytes[20])};
}

inline std::array<std::byte, mapped_ram_header_bytes> encode_mapped_ram_header(const MappedRamHeader& header) noexcept {
  std::array<std::byte, mapped_ram_header_bytes> bytes;
  store_be(&bytes[0], header.version);
  store_be(&bytes[4], header.page_size);
  store_be(&bytes[12], header.bitmap_offset);
  store_be(&bytes[20], header.pages_offset);
  return bytes;
}

/// Bytes of the bitmap of a block with so many pages.
constexpr std::uint64_t mapped_ram_bitmap_bytes(std::uint64_t pages) noexcept {
  return (pages / 64 + (pages % 64 != 0)) * 8;
}

struct MappedRamPlace {
  std::uint64_t bitmap_offset = 0;
  std::uint64_t pages_offset = 0;
};

/// Where a writer puts a block's bitmap and pages.
///
/// Params `behind_header`: file offset behind the block's header. Contract: the block's entry ends below 2^63.
constexpr MappedRamPlace place_mapped_ram(std::uint64_t behind_header, std::uint64_t pages) noexcept {
  const std::uint64_t end = behind_header + mapped_ram_bitmap_bytes(pages);
  return {.bitmap_offset = behind_header,
          .pages_offset = (end + mapped_ram_alignment - 1) / mapped_ram_alignment * mapped_ram_alignment};
}

/// Checks a header's offsets against the file that it stands in: bitmap behind the header, pages behind the bitmap, page
/// aligned, all inside the file. So nothing overlaps, whatever a file says. Offsets that are both 0 are the caller's to
/// take.
///
/// Params `behind_header`: file offset behind the header; `used_length`: the block's, whole pages; `file_bytes`: size of
///   the file.
/// Errors: Errc::bad_image_layout (detail: the offset; expected: what it is compared with).
[[nodiscard]] inline Result<void> check_mapped_ram(const MappedRamPlace& place, std::uint64_t behind_header,
                                                   std::uint64_t used_length, std::uint64_t page_size,
                                                   std::uint64_t file_bytes) noexcept {
  const std::uint64_t bitmap = mapped_ram_bitmap_bytes(used_length / page_size);
  const auto refuse = [](const char* what, std::uint64_t offset, std::uint64_t bound) {
    return fail(Errc::bad_image_layout, Stage::parse, what, offset, bound);
  };
  if (place.bitmap_offset < behind_header)
    return refuse("bitmap ahead of its header's end", place.bitmap_offset, behind_header);
  if (place.pages_offset % page_size != 0) return refuse("pages not page aligned", place.pages_offset, page_size);
  if (place.bitmap_offset > place.pages_offset || bitmap > place.pages_offset - place.bitmap_offset)
    return refuse("bitmap reaches into the pages", place.bitmap_offset, place.pages_offset);
  if (place.pages_offset > file_bytes || used_length > file_bytes - place.pages_offset)
    return refuse("pages behind the file's end", place.pages_offset, file_bytes);
  return {};
}

}  // namespace multifd::wire
