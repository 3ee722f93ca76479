// SPDX-License-Identifier: MIT
//
// The elements of a main stream. Each byte of the stream belongs to exactly one Element, in order: the `bytes` of all
// elements together are the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace multifd::qemu {

/// The kinds of elements, and which fields of Element each one fills beside `kind` and `bytes`.
enum class ElementKind : std::uint8_t {
  header,          ///< magic and version
  configuration,   ///< with its subsections; name: the machine type
  command,         ///< command, data
  section_start,   ///< header of RAM's START: section_id, name
  section_part,    ///< header of a PART: section_id, name
  section_end,     ///< header of the END: section_id, name
  ram_size,        ///< size: bytes of all blocks together
  block,           ///< an entry of the block list: block, name, size: used_length
  zero_page,       ///< block, offset, name, size: the page's, continues
  page,            ///< block, offset, name, size and data: the page's, continues
  xbzrle_page,     ///< as page, but data: what changes, for apply_xbzrle(). See MainStreamLimits::xbzrle
  flush,           ///< MULTIFD_FLUSH; closes_epoch
  end_of_records,  ///< EOS; closes_epoch
  footer,          ///< section_id
  device_state,    ///< a piece of the stream behind RAM, up to the connection's end; data = bytes. From an own source:
                   ///< a piece of one device's state
  // From an own source only, see MainStreamLimits::extension:
  extension,       ///< a message to this side: data, for wire::parse_extension()
  device_section,  ///< header of a device's section: section_id, name, instance_id, version_id, size: of its state
  end_of_stream,   ///< the end mark
  description,     ///< a piece of the VM description's text: data; the first has the length in front, and size
};

/// Element::block of an element that has no block.
inline constexpr std::uint32_t no_block = 0xffffffff;

/// One element. `bytes` and `data` are valid until the parser's next call of next() or room(), `name` as long as the
/// parser; a device's name as `bytes`.
struct Element {
  ElementKind kind{};
  bool closes_epoch = false;       ///< each channel's next SYNC belongs here (format/packets.md section 6)
  bool continues = false;          ///< the record has no name: its block is that of the record before it
  std::uint16_t command = 0;       ///< section 9.7
  std::uint32_t section_id = 0;    ///< as the source chose it
  std::uint32_t instance_id = 0;   ///< of a device_section
  std::uint32_t version_id = 0;    ///< of a device_section
  std::uint32_t block = no_block;  ///< index into MainStreamParser::blocks()
  std::uint64_t offset = 0;        ///< a page's, bytes from the start of its block; checked
  std::uint64_t size = 0;          ///< bytes
  std::string_view name{};         ///< the block's idstr, the section's name, the machine type
  std::span<const std::byte> data{};
  std::span<const std::byte> bytes{};  ///< exactly as on the wire
};

/// A block as the source announced it (section 9.5).
struct BlockInfo {
  std::string_view idstr;         ///< 1 to 255 bytes without NUL; may hold '/' and anything else: it comes from a peer
  std::uint64_t used_length = 0;  ///< bytes, a whole number of pages, not 0
  std::uint64_t page_size = 0;    ///< of the host memory, if the source announced it (postcopy with huge pages); else 0
  std::uint64_t gpa = 0;          ///< guest-physical address, if x-ignore-shared is on; else 0
  // In a file with mapped-ram (format/mapped_ram.md section 12), bytes from the beginning of the file:
  std::uint64_t bitmap_offset = 0;  ///< where the bitmap of pages that are in the file lies
  std::uint64_t pages_offset = 0;   ///< where page 0 lies; 0: the block is shared memory, which the file does not hold
};

/// A device's section, as its header has it (section 9.2).
struct DeviceSection {
  std::string_view idstr;         ///< 1 to 255 bytes
  std::uint32_t instance_id = 0;  ///< which one of several of that name
  std::uint32_t version_id = 1;   ///< of the state's format
};

}  // namespace multifd::qemu
