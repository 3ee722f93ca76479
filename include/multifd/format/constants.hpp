// SPDX-License-Identifier: MIT
//
// Numbers of the multifd wire format, each with its section of the formats' text: format/README.md says which file
// has it. `since` names the QEMU version that brought a number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "multifd/limits.hpp"

namespace multifd::wire {

// Section 2 and 3.1: the same magic and version open the initial packet and every packet header.
inline constexpr std::uint32_t magic = 0x11223344;
inline constexpr std::uint32_t version = 1;

// Section 1.2: the first four bytes of a QEMU main stream, "QEVM".
inline constexpr std::uint32_t main_stream_magic = 0x5145564d;

// Section 2.
inline constexpr std::size_t init_packet_bytes = 64;
inline constexpr std::size_t init_packet_uuid_offset = 8;
inline constexpr std::size_t init_packet_id_offset = 24;

// Bytes 25 to 63 of an initial packet are ignored by every known receiver. Our own senders use them: announcement.hpp.
inline constexpr std::size_t announcement_offset = 28;
inline constexpr std::uint32_t announcement_tag = 0x6d66414e;  // "mfAN"
inline constexpr std::uint8_t announcement_version = 1;

// Section 3: a full packet has batch_bytes of pages (limits.hpp); the header has a slot for each page, used or not.
inline constexpr std::size_t header_fixed_bytes = 320;
inline constexpr std::size_t idstr_bytes = 256;

/// Offset slots, so also the most pages, of one packet.
constexpr std::size_t page_count(std::size_t page_bytes) noexcept { return batch_bytes / page_bytes; }
constexpr std::size_t header_bytes(std::size_t page_bytes) noexcept {
  return header_fixed_bytes + 8 * page_count(page_bytes);
}

inline constexpr std::size_t max_header_bytes = header_bytes(min_page_bytes);
inline constexpr std::size_t max_page_count = page_count(min_page_bytes);

// Section 3.2.
inline constexpr std::uint32_t flag_sync = 0x01;
inline constexpr std::uint32_t flag_none = 0x00;
inline constexpr std::uint32_t flag_zlib = 0x02;              // since 5.0
inline constexpr std::uint32_t flag_zstd = 0x04;              // since 5.0
inline constexpr std::uint32_t flag_qpl = 0x08;               // since 9.1
inline constexpr std::uint32_t flag_uadk = 0x10;              // since 9.1
inline constexpr std::uint32_t flag_qatzip = 0x20;            // since 9.2
inline constexpr std::uint32_t flag_compression_mask = 0x3e;  // five bits since 9.2

/// A method as users type it. Unknown methods, and those of several bits, have no name.
constexpr std::string_view method_name(std::uint32_t method) noexcept {
  switch (method) {
    case flag_none: return "none";
    case flag_zlib: return "zlib";
    case flag_zstd: return "zstd";
    case flag_qpl: return "qpl";
    case flag_uadk: return "uadk";
    case flag_qatzip: return "qatzip";
    default: return "a method of its own";
  }
}

inline constexpr std::uint32_t flag_device_state = 0x40;  // since 10.0, another header (section 13)

// Section 4.2: every QEMU's receive buffer for compressed payloads. No sender may exceed it.
inline constexpr std::size_t max_payload_bytes = 1024 * 1024;

// Section 3.3: header bytes that every receiver from 4.1 to 11.1 ignores. Our own senders write a tag there, then
// XXH3-64 of the page data.
inline constexpr std::size_t digest_tag_offset = 36;
inline constexpr std::size_t digest_offset = 40;
inline constexpr std::uint32_t digest_tag = 0x6d664458;  // "mfDX"

}  // namespace multifd::wire
