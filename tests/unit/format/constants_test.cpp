// SPDX-License-Identifier: MIT
#include "multifd/format/constants.hpp"

#include <doctest/doctest.h>

#include <cstdint>
#include <initializer_list>

namespace wire = multifd::wire;

TEST_CASE("Pages and header bytes per page size are those of format/packets.md section 3") {
  struct Row {
    std::size_t page_bytes, pages, header_bytes;
  };
  for (const Row row :
       {Row{1024, 512, 4416}, Row{4096, 128, 1344}, Row{8192, 64, 832}, Row{16384, 32, 576}, Row{65536, 8, 384}}) {
    CAPTURE(row.page_bytes);
    CHECK(wire::page_count(row.page_bytes) == row.pages);
    CHECK(wire::header_bytes(row.page_bytes) == row.header_bytes);
    CHECK(multifd::valid_page_bytes(row.page_bytes));
  }
  CHECK(wire::max_header_bytes == 4416);
  CHECK(wire::max_page_count == 512);
}

TEST_CASE("A page size is a power of two from 1024 to 65536, nothing else") {
  std::size_t valid = 0;
  for (std::size_t bytes = 0; bytes <= 200'000; ++bytes) valid += multifd::valid_page_bytes(bytes) ? 1u : 0u;
  CHECK(valid == 7);  // 1, 2, 4, 8, 16, 32, 64 KiB
  CHECK_FALSE(multifd::valid_page_bytes(512));
  CHECK_FALSE(multifd::valid_page_bytes(4095));
  CHECK_FALSE(multifd::valid_page_bytes(4097));
  CHECK_FALSE(multifd::valid_page_bytes(12288));
  CHECK_FALSE(multifd::valid_page_bytes(131072));
  CHECK_FALSE(multifd::valid_page_bytes(std::size_t{1} << 63));
}

TEST_CASE("Flags have the values of format/packets.md section 3.2, and methods lie inside the mask") {
  CHECK(wire::flag_sync == 0x01);
  CHECK(wire::flag_none == 0x00);
  CHECK(wire::flag_zlib == 0x02);
  CHECK(wire::flag_zstd == 0x04);
  CHECK(wire::flag_qpl == 0x08);
  CHECK(wire::flag_uadk == 0x10);
  CHECK(wire::flag_qatzip == 0x20);
  CHECK(wire::flag_compression_mask == 0x3e);
  CHECK(wire::flag_device_state == 0x40);
  CHECK((wire::flag_zlib | wire::flag_zstd | wire::flag_qpl | wire::flag_uadk | wire::flag_qatzip) ==
        wire::flag_compression_mask);
}

TEST_CASE("Sizes and magic numbers are those of the formats' text") {
  CHECK(wire::magic == 0x11223344);
  CHECK(wire::version == 1);
  CHECK(wire::main_stream_magic == (std::uint32_t{'Q'} << 24 | 'E' << 16 | 'V' << 8 | 'M'));
  CHECK(wire::init_packet_bytes == 64);
  CHECK(multifd::max_channels == 255);
  CHECK(multifd::max_idstr_length == 255);
  CHECK(wire::max_payload_bytes == 1048576);
}

TEST_CASE("The digest extension stays inside the bytes that every receiver ignores (section 3.3: 36 to 63)") {
  CHECK(wire::digest_tag_offset >= 36);
  CHECK(wire::digest_offset >= wire::digest_tag_offset + 4);
  CHECK(wire::digest_offset + 8 <= 64);
}
