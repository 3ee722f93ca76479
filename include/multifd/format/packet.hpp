// SPDX-License-Identifier: MIT
//
// The RAM packet header (format/packets.md section 3): encoding, parsing, and every check that needs no memory map.
//
//   off  size   field             refused (section 16)
//     0     4   magic             anything but 0x11223344
//     4     4   version           anything but 1
//     8     4   flags             device state (0x40); other unknown bits are ignored
//    12     4   pages_alloc       > page_count; the page_count of another page size
//    16     4   normal_pages      normal + zero > pages_alloc
//    20     4   next_packet_size  see payload_bytes(); meaningless without normal pages (old senders: stale)
//    24     8   packet_num        nothing
//    32     4   zero_pages        see above; reserved before QEMU 9.0
//    36    28   reserved          nothing; ours: digest tag at 36, XXH3-64 of the page data at 40
//    64   256   ramblock          empty, or no NUL inside
//   320   8*n   offset[]          RamMap::resolve() checks each used one
//
// A packet without pages ends after the counts: old senders leave stale bytes in its name and offsets, which are not
// read.
#pragma once

#include <cstring>
#include <span>
#include <string_view>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/result.hpp"

namespace multifd::wire {

/// A header's fixed fields, checked. `idstr` points into the bytes that were parsed.
struct PacketHeader {
  std::uint32_t flags = 0;
  std::uint32_t pages_alloc = 0;
  std::uint32_t normal_pages = 0;
  std::uint32_t zero_pages = 0;
  std::uint32_t next_packet_size = 0;
  std::uint64_t packet_num = 0;
  std::string_view idstr{};  ///< empty in a packet without pages
  bool has_digest = false;   ///< the sender is ours and digests are on
  std::uint64_t digest = 0;

  bool is_sync() const noexcept { return (flags & flag_sync) != 0; }
  bool has_pages() const noexcept { return normal_pages + zero_pages != 0; }
};

/// A receiver's settings that headers are checked against.
struct PacketLimits {
  std::size_t page_bytes = 4096;
  std::uint32_t method = flag_none;               ///< the configured compression bits
  std::size_t payload_bytes = max_payload_bytes;  ///< upper bound of a compressed payload
};

/// Writes the fixed 320 bytes of a header; the caller stores the offsets behind it with store_offset().
///
/// Params: `to`: at least header_bytes(page_bytes); `header.idstr`: at most 255 bytes.
inline void encode_header(std::byte* to, const PacketHeader& header) noexcept {
  std::memset(to, 0, header_fixed_bytes);
  store_be<std::uint32_t>(to + 0, magic);
  store_be<std::uint32_t>(to + 4, version);
  store_be<std::uint32_t>(to + 8, header.flags);
  store_be<std::uint32_t>(to + 12, header.pages_alloc);
  store_be<std::uint32_t>(to + 16, header.normal_pages);
  store_be<std::uint32_t>(to + 20, header.next_packet_size);
  store_be<std::uint64_t>(to + 24, header.packet_num);
  store_be<std::uint32_t>(to + 32, header.zero_pages);
  if (header.has_digest) {
    store_be<std::uint32_t>(to + digest_tag_offset, digest_tag);
    store_be<std::uint64_t>(to + digest_offset, header.digest);
  }
  if (!header.idstr.empty()) std::memcpy(to + 64, header.idstr.data(), header.idstr.size());
}

inline void store_offset(std::byte* header, std::size_t slot, std::uint64_t offset) noexcept {
  store_be(header + header_fixed_bytes + 8 * slot, offset);
}

inline std::uint64_t load_offset(const std::byte* header, std::size_t slot) noexcept {
  return load_be<std::uint64_t>(header + header_fixed_bytes + 8 * slot);
}

/// The first bytes of a packet that show its kind (magic, version and flags), and those that also show its page size
/// (with pages_alloc).
inline constexpr std::size_t prefix_bytes = 12;
inline constexpr std::size_t sized_prefix_bytes = 16;

/// Whether a packet begins with the magic. Params: `prefix`: prefix_bytes of a packet.
inline bool has_magic(const std::byte* prefix) noexcept { return load_be<std::uint32_t>(prefix) == magic; }
inline bool is_device_state(const std::byte* prefix) noexcept {
  return has_magic(prefix) && (load_be<std::uint32_t>(prefix + 8) & flag_device_state) != 0;
}

/// The page size that a header was written for, if it is not `page_bytes`: every sender writes the number of pages of a
/// full packet into pages_alloc. 0: the same page size, or a SYNC without it (9.2 and later), or no valid page size.
///
/// Params: `header`: sized_prefix_bytes of it.
inline std::size_t other_page_bytes(const std::byte* header, std::size_t page_bytes) noexcept {
  const auto slots = load_be<std::uint32_t>(header + 12);
  if (slots == page_count(page_bytes) || slots == 0) return 0;
  const std::size_t other = batch_bytes / slots;
  return valid_page_bytes(other) && page_count(other) == slots ? other : 0;
}

/// Parses and checks everything of a RAM packet header that can be checked without the memory map.
///
/// Params: `bytes`: header_bytes(limits.page_bytes) bytes, which must outlive the result.
/// Errors (stage parse, detail: the refused value): bad_magic, bad_version, device_state_refused, page_size_mismatch
///   (expected: limits.page_bytes), too_many_pages, wrong_compression (only in packets with pages, as QEMU does),
///   bad_block_name, bad_payload_size, payload_too_large.
/// Threads: any. Cost: no allocation, no copy. Wire: format/packets.md section 3.
[[nodiscard]] inline Result<PacketHeader> parse_header(std::span<const std::byte> bytes,
                                                       const PacketLimits& limits) noexcept {
  constexpr auto stage = Stage::parse;
  const std::byte* at = bytes.data();
  if (const auto got = load_be<std::uint32_t>(at); got != magic)
    return fail(Errc::bad_magic, stage, "packet header", got);
  if (const auto got = load_be<std::uint32_t>(at + 4); got != version)
    return fail(Errc::bad_version, stage, "packet header", got);

  PacketHeader header;
  header.flags = load_be<std::uint32_t>(at + 8);
  if ((header.flags & flag_device_state) != 0) return fail(Errc::device_state_refused, stage, "flags", header.flags);
  header.pages_alloc = load_be<std::uint32_t>(at + 12);
  header.normal_pages = load_be<std::uint32_t>(at + 16);
  header.next_packet_size = load_be<std::uint32_t>(at + 20);
  header.packet_num = load_be<std::uint64_t>(at + 24);
  header.zero_pages = load_be<std::uint32_t>(at + 32);
  if (const std::size_t other = other_page_bytes(at, limits.page_bytes); other != 0)
    return fail(Errc::page_size_mismatch, stage, "pages_alloc", other, limits.page_bytes);
  if (header.pages_alloc > page_count(limits.page_bytes))
    return fail(Errc::too_many_pages, stage, "pages_alloc", header.pages_alloc);
  // In 64 bits, so that two huge counts cannot wrap.
  const std::uint64_t pages = std::uint64_t{header.normal_pages} + header.zero_pages;
  if (pages > header.pages_alloc) return fail(Errc::too_many_pages, stage, "normal + zero pages", pages);
  if (pages == 0) return header;

  if ((header.flags & flag_compression_mask) != limits.method)
    return fail(Errc::wrong_compression, stage, "compression bits", header.flags & flag_compression_mask);
  const char* name = reinterpret_cast<const char*>(at + 64);
  const std::size_t name_length = ::strnlen(name, idstr_bytes);
  if (name_length == 0 || name_length == idstr_bytes) return fail(Errc::bad_block_name, stage, "ramblock", name_length);
  header.idstr = {name, name_length};
  if (load_be<std::uint32_t>(at + digest_tag_offset) == digest_tag) {
    header.has_digest = true;
    header.digest = load_be<std::uint64_t>(at + digest_offset);
  }
  if (header.normal_pages > 0) {
    if (limits.method == flag_none) {
      if (header.next_packet_size != header.normal_pages * limits.page_bytes)
        return fail(Errc::bad_payload_size, stage, "next_packet_size", header.next_packet_size);
    } else if (header.next_packet_size == 0) {
      return fail(Errc::bad_payload_size, stage, "next_packet_size", 0);
    } else if (header.next_packet_size > limits.payload_bytes) {
      return fail(Errc::payload_too_large, stage, "next_packet_size", header.next_packet_size);
    }
  }
  return header;
}

/// The number of bytes that follow the header: 0 without normal pages, whatever next_packet_size is (section 3.1).
inline std::size_t payload_bytes(const PacketHeader& header) noexcept {
  return header.normal_pages > 0 ? header.next_packet_size : 0;
}

}  // namespace multifd::wire
