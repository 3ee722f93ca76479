// SPDX-License-Identifier: MIT
#include "multifd/format/packet.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <random>
#include <string>

#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::Errc;
using multifd::Stage;
using wire::PacketHeader;
using wire::PacketLimits;

namespace {

constexpr PacketLimits nocomp{};
constexpr PacketLimits zlib{.method = wire::flag_zlib};

/// A data packet of the table of format/packets.md section 3.1, row by row: 2 normal pages and 3 zero pages of 4
/// KiB.
Bytes data_packet(std::uint32_t flags = 0, std::uint32_t next_packet_size = 2 * 4096) {
  Bytes bytes(1344);
  put32(bytes, 0, 0x11223344);           // magic
  put32(bytes, 4, 1);                    // version
  put32(bytes, 8, flags);                // flags
  put32(bytes, 12, 128);                 // pages_alloc
  put32(bytes, 16, 2);                   // normal_pages
  put32(bytes, 20, next_packet_size);    // next_packet_size
  put64(bytes, 24, 0x0102030405060708);  // packet_num
  put32(bytes, 32, 3);                   // zero_pages
  put_text(bytes, 64, "pc.ram");         // ramblock
  for (std::size_t slot = 0; slot < 5; ++slot) put64(bytes, 320 + 8 * slot, 4096 * (slot + 1));
  return bytes;
}

Bytes sync_packet() {
  Bytes bytes(1344);
  put32(bytes, 0, 0x11223344);
  put32(bytes, 4, 1);
  put32(bytes, 8, 1);
  return bytes;
}

PacketHeader parsed(const Bytes& bytes, const PacketLimits& limits = nocomp) {
  const auto header = wire::parse_header(bytes, limits);
  REQUIRE_MESSAGE(header.has_value(), multifd::describe(header.error()));
  return *header;
}

void check_refused(const Bytes& bytes, const PacketLimits& limits, Errc code, std::uint64_t detail) {
  const auto header = wire::parse_header(bytes, limits);
  REQUIRE_FALSE(header.has_value());
  CHECK_MESSAGE(header.error().code == code, multifd::describe(header.error()));
  CHECK(header.error().detail == detail);
  CHECK(header.error().stage == Stage::parse);
  CHECK(header.error().code == multifd::Condition::peer_protocol);
}

}  // namespace

TEST_CASE("An encoded header is the table of format/packets.md section 3.1, byte for byte") {
  const PacketHeader header{.flags = 0x80000004,
                            .pages_alloc = 128,
                            .normal_pages = 0x21,
                            .zero_pages = 0x43,
                            .next_packet_size = 0x000f1e2d,
                            .packet_num = 0x0102030405060708,
                            .idstr = "pc.ram"};
  Bytes encoded(400, std::byte{0xee});
  wire::encode_header(encoded.data(), header);
  wire::store_offset(encoded.data(), 0, 0x1112131415161718);
  wire::store_offset(encoded.data(), 2, 0x0000000100000000);

  Bytes table(400, std::byte{0xee});
  std::fill_n(table.begin(), 320, std::byte{0});
  put32(table, 0, 0x11223344);
  put32(table, 4, 1);
  put32(table, 8, 0x80000004);
  put32(table, 12, 128);
  put32(table, 16, 0x21);
  put32(table, 20, 0x000f1e2d);
  put64(table, 24, 0x0102030405060708);
  put32(table, 32, 0x43);
  put_text(table, 64, "pc.ram");
  put64(table, 320, 0x1112131415161718);
  put64(table, 336, 0x0000000100000000);
  CHECK(encoded == table);
  CHECK(wire::load_offset(encoded.data(), 0) == 0x1112131415161718);
  CHECK(wire::load_offset(encoded.data(), 2) == 0x0000000100000000);
}

TEST_CASE("A digest goes into header bytes 36 to 47, and nowhere else") {
  Bytes with(320);
  Bytes without(320);
  wire::encode_header(without.data(), {.normal_pages = 1, .idstr = "a"});
  wire::encode_header(with.data(), {.normal_pages = 1, .idstr = "a", .has_digest = true, .digest = 0xfedcba9876543210});
  put_text(without, 36, "mfDX");
  put64(without, 40, 0xfedcba9876543210);
  CHECK(with == without);
}

TEST_CASE("An idstr of 255 bytes still ends with a NUL inside its 256 bytes") {
  Bytes bytes(384, std::byte{0xee});
  const std::string longest(255, 'x');
  wire::encode_header(bytes.data(), {.idstr = longest});
  CHECK(bytes[318] == std::byte{'x'});
  CHECK(bytes[319] == std::byte{0});
  CHECK(bytes[320] == std::byte{0xee});
}

TEST_CASE("Headers survive the round trip at every page size") {
  std::mt19937_64 random(7);
  for (const std::size_t page_bytes : {1024u, 2048u, 4096u, 8192u, 16384u, 32768u, 65536u}) {
    CAPTURE(page_bytes);
    const auto most = static_cast<std::uint32_t>(wire::page_count(page_bytes));
    for (int round = 0; round < 200; ++round) {
      const auto normal = static_cast<std::uint32_t>(random() % (most + 1));
      const auto zero = static_cast<std::uint32_t>(random() % (most - normal + 1));
      const std::string idstr(1 + random() % 255, static_cast<char>('a' + random() % 26));
      const PacketHeader header{.flags = random() % 2 != 0 ? wire::flag_sync : 0,
                                .pages_alloc = most,
                                .normal_pages = normal,
                                .zero_pages = zero,
                                .next_packet_size = static_cast<std::uint32_t>(normal * page_bytes),
                                .packet_num = random(),
                                .idstr = idstr,
                                .has_digest = random() % 2 != 0,
                                .digest = random()};
      Bytes bytes(wire::header_bytes(page_bytes), std::byte{0xee});
      wire::encode_header(bytes.data(), header);
      std::vector<std::uint64_t> offsets(normal + zero);
      for (std::size_t slot = 0; slot < offsets.size(); ++slot)
        wire::store_offset(bytes.data(), slot, offsets[slot] = random());

      const PacketHeader back = parsed(bytes, {.page_bytes = page_bytes});
      CHECK(back.flags == header.flags);
      CHECK(back.pages_alloc == header.pages_alloc);
      CHECK(back.normal_pages == header.normal_pages);
      CHECK(back.zero_pages == header.zero_pages);
      CHECK(back.next_packet_size == header.next_packet_size);
      CHECK(back.packet_num == header.packet_num);
      CHECK(back.is_sync() == ((header.flags & 1) != 0));
      CHECK(back.has_pages() == (normal + zero > 0));
      CHECK(wire::payload_bytes(back) == normal * page_bytes);
      if (back.has_pages()) {
        CHECK(back.idstr == header.idstr);
        CHECK(back.has_digest == header.has_digest);
        if (header.has_digest) CHECK(back.digest == header.digest);
      }
      for (std::size_t slot = 0; slot < offsets.size(); ++slot)
        CHECK(wire::load_offset(bytes.data(), slot) == offsets[slot]);
    }
  }
}

TEST_CASE("A data packet of the table parses into its fields") {
  const Bytes bytes = data_packet();
  const PacketHeader header = parsed(bytes);
  CHECK(header.flags == 0);
  CHECK(header.pages_alloc == 128);
  CHECK(header.normal_pages == 2);
  CHECK(header.zero_pages == 3);
  CHECK(header.next_packet_size == 8192);
  CHECK(header.packet_num == 0x0102030405060708);
  CHECK(header.idstr == "pc.ram");
  CHECK(static_cast<const void*>(header.idstr.data()) == bytes.data() + 64);
  CHECK_FALSE(header.has_digest);
  CHECK_FALSE(header.is_sync());
  CHECK(wire::payload_bytes(header) == 8192);
  CHECK(wire::load_offset(bytes.data(), 4) == 5 * 4096);
}

TEST_CASE("A header with another magic or version is refused") {
  for (std::size_t at = 0; at < 4; ++at) {
    Bytes bytes = data_packet();
    bytes[at] ^= std::byte{0x80};
    check_refused(bytes, nocomp, Errc::bad_magic, wire::load_be<std::uint32_t>(bytes.data()));
  }
  for (const std::uint32_t version : {0u, 2u, 0x01000000u, 0xffffffffu}) {
    Bytes bytes = data_packet();
    put32(bytes, 4, version);
    check_refused(bytes, nocomp, Errc::bad_version, version);
  }
}

TEST_CASE("A device-state packet is refused before its other fields are read: it has another layout") {
  Bytes bytes = data_packet();
  put32(bytes, 8, 0x40);
  put32(bytes, 12, 0xffffffff);
  check_refused(bytes, nocomp, Errc::device_state_refused, 0x40);
  put32(bytes, 8, 0x80000041);
  check_refused(bytes, nocomp, Errc::device_state_refused, 0x80000041);
}

TEST_CASE("pages_alloc above the page count of the page size is refused, in packets without pages too") {
  for (const std::size_t page_bytes : {1024u, 4096u, 16384u, 65536u}) {
    CAPTURE(page_bytes);
    const auto most = static_cast<std::uint32_t>(wire::page_count(page_bytes));
    Bytes bytes(wire::header_bytes(page_bytes));
    wire::encode_header(bytes.data(), {.flags = 1, .pages_alloc = most});
    CHECK(parsed(bytes, {.page_bytes = page_bytes}).pages_alloc == most);
    for (const std::uint32_t alloc : {most + 1, 100 * most, 0xffffffffu}) {
      put32(bytes, 12, alloc);
      check_refused(bytes, {.page_bytes = page_bytes}, Errc::too_many_pages, alloc);
    }
  }
}

TEST_CASE("pages_alloc of another page size is refused, and both sizes are named") {
  constexpr std::size_t sizes[] = {1024, 2048, 4096, 8192, 16384, 32768, 65536};
  for (const std::size_t ours : sizes) {
    for (const std::size_t theirs : sizes) {
      CAPTURE(ours);
      CAPTURE(theirs);
      Bytes bytes(wire::header_bytes(ours));
      wire::encode_header(bytes.data(),
                          {.flags = 1, .pages_alloc = static_cast<std::uint32_t>(wire::page_count(theirs))});
      if (ours == theirs) {
        CHECK_FALSE(parsed(bytes, {.page_bytes = ours}).has_pages());
        continue;
      }
      check_refused(bytes, {.page_bytes = ours}, Errc::page_size_mismatch, theirs);
      const auto refused = wire::parse_header(bytes, {.page_bytes = ours});
      CHECK(refused.error().expected == ours);
      const std::string text = describe(refused.error());
      CHECK_MESSAGE(text.contains(std::to_string(ours)), text);
      CHECK_MESSAGE(text.contains(std::to_string(theirs)), text);
    }
  }
}

TEST_CASE("normal and zero pages together may fill pages_alloc, not exceed it") {
  struct Row {
    std::uint32_t alloc, normal, zero;
    bool fits;
  };
  for (const Row row : {Row{128, 128, 0, true}, Row{128, 0, 128, true}, Row{128, 100, 28, true}, Row{3, 2, 1, true},
                        Row{128, 129, 0, false}, Row{128, 0, 129, false}, Row{128, 100, 29, false}, Row{3, 2, 2, false},
                        Row{0, 1, 0, false}, Row{0, 0, 1, false}, Row{127, 128, 0, false}}) {
    CAPTURE(row.alloc);
    CAPTURE(row.normal);
    CAPTURE(row.zero);
    Bytes bytes = data_packet();
    put32(bytes, 12, row.alloc);
    put32(bytes, 16, row.normal);
    put32(bytes, 20, row.normal * 4096);
    put32(bytes, 32, row.zero);
    if (row.fits)
      CHECK(parsed(bytes).has_pages());
    else
      check_refused(bytes, nocomp, Errc::too_many_pages, row.normal + row.zero);
  }
}

TEST_CASE("Counts that would wrap in 32 bits are added in 64") {
  struct Row {
    std::uint32_t normal, zero;
  };
  for (const Row row : {Row{0xffffffff, 1}, Row{1, 0xffffffff}, Row{0x80000000, 0x80000000},
                        Row{0xffffffff, 0xffffffff}, Row{0xffffff81, 0x7f + 128}, Row{0x00100000, 0}}) {
    CAPTURE(row.normal);
    CAPTURE(row.zero);
    Bytes bytes = data_packet();
    put32(bytes, 16, row.normal);
    put32(bytes, 20, 0);  // 0x100000 pages of 4 KiB are 2^32 bytes: 0 in 32 bits
    put32(bytes, 32, row.zero);
    check_refused(bytes, nocomp, Errc::too_many_pages, std::uint64_t{row.normal} + row.zero);
  }
}

TEST_CASE("A packet with pages must have the configured compression, compared as a whole under the mask") {
  for (const std::uint32_t method : {0x00u, 0x02u, 0x04u, 0x08u, 0x10u, 0x20u}) {
    for (std::uint32_t bits = 0; bits <= wire::flag_compression_mask; bits += 2) {
      CAPTURE(method);
      CAPTURE(bits);
      const PacketLimits limits{.method = method};
      if (bits == method)
        CHECK(parsed(data_packet(bits | 1), limits).is_sync());
      else
        check_refused(data_packet(bits | 1), limits, Errc::wrong_compression, bits);
    }
  }
}

TEST_CASE("A packet with zero pages only must have the configured compression, too") {
  Bytes bytes = data_packet(wire::flag_zlib, 0);
  put32(bytes, 16, 0);
  CHECK(parsed(bytes, zlib).zero_pages == 3);
  check_refused(bytes, nocomp, Errc::wrong_compression, wire::flag_zlib);
}

TEST_CASE("A packet without pages may have any compression bits: old senders leave them 0, whatever is set") {
  for (std::uint32_t bits = 0; bits <= wire::flag_compression_mask; bits += 2) {
    Bytes bytes = sync_packet();
    put32(bytes, 8, bits | 1);
    CHECK(parsed(bytes, zlib).is_sync());
    CHECK(parsed(bytes, nocomp).is_sync());
  }
}

TEST_CASE("A block name must be there and end with a NUL inside its field") {
  Bytes empty = data_packet();
  put(empty, 64, 1, 0);
  check_refused(empty, nocomp, Errc::bad_block_name, 0);

  Bytes full = data_packet();
  for (std::size_t at = 64; at < 320; ++at) put(full, at, 1, 'n');
  check_refused(full, nocomp, Errc::bad_block_name, 256);

  put(full, 319, 1, 0);
  CHECK(parsed(full).idstr == std::string(255, 'n'));
}

TEST_CASE("Without compression the payload must be normal pages times page size (row 3 of section 16)") {
  for (const std::uint32_t size : {0u, 1u, 4096u, 8191u, 8193u, 12288u, 0xffffffffu}) {
    CAPTURE(size);
    check_refused(data_packet(0, size), nocomp, Errc::bad_payload_size, size);
  }
  Bytes full = data_packet(0, 512 * 1024);
  put32(full, 16, 128);
  put32(full, 32, 0);
  CHECK(wire::payload_bytes(parsed(full)) == 512 * 1024);
}

TEST_CASE("A compressed payload must be there and within its bound before a byte of it is read (row 2)") {
  check_refused(data_packet(wire::flag_zlib, 0), zlib, Errc::bad_payload_size, 0);
  CHECK(wire::payload_bytes(parsed(data_packet(wire::flag_zlib, 1), zlib)) == 1);
  CHECK(wire::payload_bytes(parsed(data_packet(wire::flag_zlib, 1048576), zlib)) == 1048576);
  check_refused(data_packet(wire::flag_zlib, 1048577), zlib, Errc::payload_too_large, 1048577);
  check_refused(data_packet(wire::flag_zlib, 0xffffffff), zlib, Errc::payload_too_large, 0xffffffff);

  const PacketLimits tight{.method = wire::flag_zstd, .payload_bytes = 1000};
  CHECK(parsed(data_packet(wire::flag_zstd, 1000), tight).next_packet_size == 1000);
  check_refused(data_packet(wire::flag_zstd, 1001), tight, Errc::payload_too_large, 1001);
}

TEST_CASE("A payload follows if and only if there are normal pages, whatever next_packet_size says") {
  for (const PacketLimits& limits : {nocomp, zlib}) {
    Bytes zero_only = data_packet(limits.method, 181099);
    put32(zero_only, 16, 0);
    const PacketHeader header = parsed(zero_only, limits);
    CHECK(header.zero_pages == 3);
    CHECK(wire::payload_bytes(header) == 0);
  }
}

TEST_CASE("A SYNC of senders up to 8.x carries a stale size, name and offsets, which are not read") {
  Bytes bytes = data_packet(wire::flag_sync, 181099);  // the size that a 7.2 was seen to leave
  put32(bytes, 16, 0);
  put32(bytes, 32, 0);
  for (std::size_t at = 64; at < bytes.size(); ++at) put(bytes, at, 1, 0xff);  // a name without an end, wild offsets
  put_text(bytes, 36, "mfDX");
  for (const PacketLimits& limits : {nocomp, zlib}) {
    const PacketHeader header = parsed(bytes, limits);
    CHECK(header.is_sync());
    CHECK_FALSE(header.has_pages());
    CHECK(header.idstr.empty());
    CHECK_FALSE(header.has_digest);
    CHECK(wire::payload_bytes(header) == 0);
  }
}

TEST_CASE("A SYNC may announce slots, as up to 9.1, or none, as from 9.2") {
  Bytes bytes = sync_packet();
  CHECK(parsed(bytes).is_sync());
  put32(bytes, 12, 128);
  CHECK(parsed(bytes).is_sync());
}

TEST_CASE("A SYNC can ride on a data packet, as 7.2 sends it: both count") {
  const PacketHeader header = parsed(data_packet(wire::flag_sync | wire::flag_zlib, 500), zlib);
  CHECK(header.is_sync());
  CHECK(header.normal_pages == 2);
  CHECK(wire::payload_bytes(header) == 500);
}

TEST_CASE("An empty packet with flags 0, which 7.2 sends after such a SYNC, is nothing to mind") {
  Bytes bytes = data_packet(0, 181099);
  put32(bytes, 16, 0);
  put32(bytes, 32, 0);
  for (const PacketLimits& limits : {nocomp, zlib}) {
    const PacketHeader header = parsed(bytes, limits);
    CHECK_FALSE(header.is_sync());
    CHECK_FALSE(header.has_pages());
    CHECK(wire::payload_bytes(header) == 0);
  }
}

TEST_CASE("What receivers tolerate (section 3.3) is tolerated here") {
  std::mt19937_64 random(33);
  Bytes bytes = data_packet();

  SUBCASE("reserved bytes 36 to 63") {
    for (std::size_t at = 36; at < 64; ++at) put(bytes, at, 1, random());
    put32(bytes, 36, 0x6d664459);  // one off the digest tag
    CHECK_FALSE(parsed(bytes).has_digest);
  }
  SUBCASE("the name's tail after its NUL") {
    for (std::size_t at = 64 + 7; at < 320; ++at) put(bytes, at, 1, random());
    CHECK(parsed(bytes).idstr == "pc.ram");
  }
  SUBCASE("offset slots after the used ones") {
    for (std::size_t slot = 5; slot < 128; ++slot) put64(bytes, 320 + 8 * slot, random());
    CHECK(parsed(bytes).normal_pages == 2);
  }
  SUBCASE("flag bits from 7 up") {
    for (unsigned bit = 7; bit < 32; ++bit) {
      CAPTURE(bit);
      put32(bytes, 8, std::uint32_t{1} << bit);
      CHECK(parsed(bytes).normal_pages == 2);
    }
    put32(bytes, 8, 0xffffff80);
    CHECK_FALSE(parsed(bytes).is_sync());
  }
  SUBCASE("packet_num, whatever it is") {
    for (const std::uint64_t number : {std::uint64_t{0}, ~std::uint64_t{0}, random()}) {
      put64(bytes, 24, number);
      CHECK(parsed(bytes).packet_num == number);
    }
  }
}

TEST_CASE("A header's digest is taken only behind its tag") {
  Bytes bytes = data_packet();
  put64(bytes, 40, 0x1122334455667788);
  CHECK_FALSE(parsed(bytes).has_digest);
  put_text(bytes, 36, "mfDX");
  CHECK(parsed(bytes).has_digest);
  CHECK(parsed(bytes).digest == 0x1122334455667788);
}

TEST_CASE("Whatever bytes come, an accepted header keeps its promises") {
  // One field of a good packet at a time is replaced by a random or a bordering value.
  std::mt19937_64 random(99);
  const std::uint32_t borders[] = {0, 1, 127, 128, 129, 4096, 8192, 0x7fffffff, 0x80000000, 0xffffffff};
  unsigned accepted = 0;
  for (int round = 0; round < 50'000; ++round) {
    const PacketLimits limits = round % 2 == 0 ? nocomp : zlib;
    Bytes bytes = data_packet(limits.method);
    for (std::uint64_t changes = random() % 3 + 1; changes > 0; --changes)
      put32(bytes, 4 * (random() % 80),
            random() % 2 == 0 ? static_cast<std::uint32_t>(random()) : borders[random() % std::size(borders)]);
    const auto header = wire::parse_header(bytes, limits);
    if (!header) continue;
    ++accepted;
    REQUIRE(header->pages_alloc <= 128);
    REQUIRE(std::uint64_t{header->normal_pages} + header->zero_pages <= 128);
    REQUIRE(header->idstr.size() <= 255);
    REQUIRE(wire::payload_bytes(*header) <= wire::max_payload_bytes);
    REQUIRE(header->idstr.empty() != header->has_pages());
  }
  CHECK(accepted > 1000);
}
