// SPDX-License-Identifier: MIT
#include "multifd/format/init_packet.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <random>

#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::Errc;
using multifd::Stage;
using multifd::Uuid;

namespace {

Uuid counting_uuid() {
  Uuid uuid;
  for (std::size_t i = 0; i < uuid.size(); ++i) uuid[i] = static_cast<std::byte>(0xa0 + i);
  return uuid;
}

/// The table of format/packets.md section 2, row by row.
Bytes by_the_table(const Uuid& uuid, std::uint8_t id) {
  Bytes bytes(64);
  put32(bytes, 0, 0x11223344);
  put32(bytes, 4, 1);
  std::ranges::copy(uuid, bytes.begin() + 8);
  put(bytes, 24, 1, id);
  return bytes;  // 25 to 63 stay zero
}

std::span<const std::byte, 64> as_packet(const Bytes& bytes) { return std::span(bytes).first<64>(); }

void check_refused(const Bytes& bytes, unsigned channels, Errc code, std::uint64_t detail) {
  const auto parsed = wire::parse_init_packet(as_packet(bytes), channels);
  REQUIRE_FALSE(parsed.has_value());
  CHECK(parsed.error().code == code);
  CHECK(parsed.error().detail == detail);
  CHECK(parsed.error().stage == Stage::hello);
  CHECK(parsed.error().code == multifd::Condition::peer_protocol);
}

}  // namespace

TEST_CASE("An encoded initial packet is the table of format/packets.md section 2, byte for byte") {
  const wire::InitPacketBytes bytes = wire::encode(wire::InitPacket{.uuid = counting_uuid(), .id = 0xc3});
  CHECK(std::ranges::equal(bytes, by_the_table(counting_uuid(), 0xc3)));
  CHECK(std::ranges::equal(wire::encode(wire::InitPacket{}), by_the_table(Uuid{}, 0)));
}

TEST_CASE("Every id survives the round trip, with its uuid") {
  for (unsigned id = 0; id < 255; ++id) {
    CAPTURE(id);
    const auto bytes = wire::encode({.uuid = counting_uuid(), .id = static_cast<std::uint8_t>(id)});
    const auto parsed = wire::parse_init_packet(bytes, 255);
    REQUIRE(parsed);
    CHECK(parsed->id == id);
    CHECK(parsed->uuid == counting_uuid());
  }
}

TEST_CASE("An initial packet with another magic is refused, whichever byte differs") {
  for (std::size_t at = 0; at < 4; ++at) {
    CAPTURE(at);
    Bytes bytes = by_the_table({}, 0);
    bytes[at] ^= std::byte{0x01};
    check_refused(bytes, 2, Errc::bad_magic, wire::load_be<std::uint32_t>(bytes.data()));
  }
  Bytes main_stream = by_the_table({}, 0);
  put_text(main_stream, 0, "QEVM");
  check_refused(main_stream, 2, Errc::bad_magic, 0x5145564d);
}

TEST_CASE("An initial packet of another version is refused, also one in the wrong byte order") {
  for (const std::uint32_t version : {0u, 2u, 0x01000000u, 0xffffffffu}) {
    CAPTURE(version);
    Bytes bytes = by_the_table({}, 0);
    put32(bytes, 4, version);
    check_refused(bytes, 2, Errc::bad_version, version);
  }
}

TEST_CASE("An id that is not below the channel count is refused: N itself, too (section 2, row 1 of section 16)") {
  for (const unsigned channels : {1u, 2u, 8u, 254u, 255u}) {
    CAPTURE(channels);
    CHECK(wire::parse_init_packet(as_packet(by_the_table({}, static_cast<std::uint8_t>(channels - 1))), channels));
    check_refused(by_the_table({}, static_cast<std::uint8_t>(channels)), channels, Errc::channel_id_out_of_range,
                  channels);
    check_refused(by_the_table({}, 255), channels, Errc::channel_id_out_of_range, 255);
  }
}

TEST_CASE("Magic is checked before version, version before the id") {
  Bytes bytes = by_the_table({}, 200);
  put32(bytes, 4, 7);
  check_refused(bytes, 2, Errc::bad_version, 7);
  put32(bytes, 0, 7);
  check_refused(bytes, 2, Errc::bad_magic, 7);
}

TEST_CASE("The reserved bytes may hold anything (section 3.3)") {
  std::mt19937 random(2);
  for (int round = 0; round < 100; ++round) {
    Bytes bytes = by_the_table(counting_uuid(), 1);
    for (std::size_t at = 25; at < 64; ++at) put(bytes, at, 1, random());
    put(bytes, 28, 1, round % 2 == 0 ? 0 : 'M');  // no tag of ours, whatever random() says
    const auto parsed = wire::parse_init_packet(as_packet(bytes), 2);
    REQUIRE(parsed);
    CHECK(parsed->id == 1);
    CHECK(parsed->uuid == counting_uuid());
  }
}

TEST_CASE("An announcement is the table of format/announcement.hpp, byte for byte, and survives the round trip") {
  const wire::Announcement announced{.channels = 3,
                                     .page_bytes = 65536,
                                     .method = 4,
                                     .blocks = 0x01020304,
                                     .bytes = 0x1112131415161718,
                                     .digest = 0x2122232425262728,
                                     .takes_answer = true};
  Bytes bytes = by_the_table(counting_uuid(), 2);
  put_text(bytes, 28, "mfAN");
  put(bytes, 32, 1, 1);
  put(bytes, 33, 1, 3);
  put(bytes, 34, 1, 16);
  put(bytes, 35, 1, 1);
  put32(bytes, 36, 4);
  put64(bytes, 40, 0x1112131415161718);
  put32(bytes, 48, 0x01020304);
  put64(bytes, 56, 0x2122232425262728);
  CHECK(std::ranges::equal(wire::encode({.uuid = counting_uuid(), .id = 2, .announced = announced}), bytes));
  const auto parsed = wire::parse_init_packet(as_packet(bytes), 3);
  REQUIRE(parsed);
  REQUIRE(parsed->announced);
  CHECK(*parsed->announced == announced);
}

TEST_CASE("An announced channel count is compared before the id") {
  const auto bytes = wire::encode({.id = 3, .announced = wire::Announcement{.channels = 4, .page_bytes = 4096}});
  CHECK(wire::parse_init_packet(bytes, 4).has_value());
  const auto refused = wire::parse_init_packet(bytes, 3);
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == Errc::channel_count_mismatch);
  CHECK(refused.error().detail == 4);
  CHECK(refused.error().expected == 3);
}
