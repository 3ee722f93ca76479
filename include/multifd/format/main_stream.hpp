// SPDX-License-Identifier: MIT
//
// Numbers of QEMU's main migration stream and of its return path, each with its section of format/main_stream.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include "multifd/format/constants.hpp"

namespace multifd::qemu {

// Section 9.1. The magic is wire::main_stream_magic.
inline constexpr std::uint32_t stream_version = 3;
inline constexpr std::size_t stream_header_bytes = 8;

// Section 9.2: the byte that opens each element.
inline constexpr std::uint8_t element_eof = 0x00;
inline constexpr std::uint8_t element_section_start = 0x01;
inline constexpr std::uint8_t element_section_part = 0x02;
inline constexpr std::uint8_t element_section_end = 0x03;
inline constexpr std::uint8_t element_section_full = 0x04;
inline constexpr std::uint8_t element_subsection = 0x05;
inline constexpr std::uint8_t element_vm_description = 0x06;
inline constexpr std::uint8_t element_configuration = 0x07;
inline constexpr std::uint8_t element_command = 0x08;
inline constexpr std::uint8_t element_footer = 0x7e;

// Section 9.3.
inline constexpr std::uint32_t subsection_version = 1;
inline constexpr std::string_view subsection_page_bits = "configuration/target-page-bits";
inline constexpr std::string_view subsection_capabilities = "configuration/capabilities";
inline constexpr std::string_view subsection_uuid = "configuration/uuid";
inline constexpr std::string_view capability_ignore_shared = "x-ignore-shared";
inline constexpr std::string_view capability_mapped_ram = "mapped-ram";

// Section 9.2: the header of a section with a name: type, id, length of the name, name, instance, version.
inline constexpr std::size_t max_section_header_bytes = 1 + 4 + 1 + max_idstr_length + 4 + 4;
inline constexpr std::size_t footer_bytes = 5;

// Section 9.4.
inline constexpr std::string_view ram_section_name = "ram";
inline constexpr std::uint32_t ram_instance = 0;
inline constexpr std::uint32_t ram_version = 4;

// Section 9.6: flags in the low bits of a RAM record's first word; the bits above them are an offset.
inline constexpr std::uint64_t ram_full = 0x01;
inline constexpr std::uint64_t ram_zero = 0x02;
inline constexpr std::uint64_t ram_mem_size = 0x04;
inline constexpr std::uint64_t ram_page = 0x08;
inline constexpr std::uint64_t ram_eos = 0x10;
inline constexpr std::uint64_t ram_continue = 0x20;
inline constexpr std::uint64_t ram_xbzrle = 0x40;
inline constexpr std::uint64_t ram_hook = 0x80;
inline constexpr std::uint64_t ram_compress_page = 0x100;  // until 9.0
inline constexpr std::uint64_t ram_multifd_flush = 0x200;  // since 8.1

inline constexpr std::size_t ram_word_bytes = 8;
/// The longest header of a record: the word, the name's length, the name.
inline constexpr std::size_t max_ram_record_header_bytes = ram_word_bytes + 1 + max_idstr_length;
/// In front of an XBZRLE record's changes: u8 1, be16 length.
inline constexpr std::size_t xbzrle_header_bytes = 3;
inline constexpr std::uint8_t xbzrle_encoding = 1;
inline constexpr std::size_t max_zero_record_bytes = max_ram_record_header_bytes + 1;

// Section 9.7.
inline constexpr std::size_t command_header_bytes = 5;
inline constexpr std::uint16_t command_open_return_path = 1;
inline constexpr std::uint16_t command_ping = 2;
inline constexpr std::uint16_t command_postcopy_advise = 3;
inline constexpr std::uint16_t command_postcopy_listen = 4;
inline constexpr std::uint16_t command_postcopy_run = 5;
inline constexpr std::uint16_t command_postcopy_ram_discard = 6;
inline constexpr std::uint16_t command_packaged = 7;
inline constexpr std::uint16_t command_enable_colo = 8;
inline constexpr std::uint16_t command_postcopy_resume = 9;
inline constexpr std::uint16_t command_recv_bitmap = 10;
inline constexpr std::uint16_t command_switchover_start = 11;  // since 10.0

/// QEMU's name of a command; "" for an unknown one.
constexpr std::string_view command_name(std::uint16_t command) noexcept {
  constexpr std::string_view names[] = {"",
                                        "OPEN_RETURN_PATH",
                                        "PING",
                                        "POSTCOPY_ADVISE",
                                        "POSTCOPY_LISTEN",
                                        "POSTCOPY_RUN",
                                        "POSTCOPY_RAM_DISCARD",
                                        "PACKAGED",
                                        "ENABLE_COLO",
                                        "POSTCOPY_RESUME",
                                        "RECV_BITMAP",
                                        "SWITCHOVER_START"};
  return command < std::size(names) ? names[command] : std::string_view{};
}

// Section 9.8: messages from the destination.
inline constexpr std::uint16_t return_shut = 1;
inline constexpr std::uint16_t return_pong = 2;
inline constexpr std::uint16_t return_req_pages_id = 3;
inline constexpr std::uint16_t return_req_pages = 4;
inline constexpr std::uint16_t return_recv_bitmap = 5;
inline constexpr std::uint16_t return_resume_ack = 6;
inline constexpr std::uint16_t return_switchover_ack = 7;  // since 8.1
inline constexpr std::size_t return_header_bytes = 4;
inline constexpr std::size_t max_return_data_bytes = 512;

}  // namespace multifd::qemu
