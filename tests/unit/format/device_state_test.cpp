// SPDX-License-Identifier: MIT
#include "multifd/format/device_state.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <ostream>  // lets doctest print a std::error_code
#include <random>
#include <string>

#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::DeviceState;
using multifd::Errc;
using multifd::Stage;

namespace {

constexpr std::size_t limit = 1024 * 1024;

/// The table of format/packets.md section 13, row by row.
Bytes by_the_table(std::string_view idstr, std::uint32_t instance_id, std::uint32_t next_packet_size) {
  Bytes bytes(276);
  put32(bytes, 0, 0x11223344);  // magic
  put32(bytes, 4, 1);           // version
  put32(bytes, 8, 0x40);        // flags
  put_text(bytes, 12, idstr);
  put32(bytes, 268, instance_id);
  put32(bytes, 272, next_packet_size);
  return bytes;
}

Bytes vfio() { return by_the_table("0000:00:05.0/vfio", 0x01020304, 0x00010203); }

multifd::Result<wire::DeviceStateHeader> parse(const Bytes& bytes, std::size_t limit_bytes = limit) {
  return wire::parse_device_state_header(std::span(bytes).first<276>(), limit_bytes);
}

void check_refused(const Bytes& bytes, Errc code, std::uint64_t detail, std::size_t limit_bytes = limit) {
  const auto parsed = parse(bytes, limit_bytes);
  REQUIRE_FALSE(parsed.has_value());
  CHECK_MESSAGE(parsed.error().code == code, multifd::describe(parsed.error()));
  CHECK(parsed.error().detail == detail);
  CHECK(parsed.error().stage == Stage::parse);
  CHECK(parsed.error().code == multifd::Condition::peer_protocol);
}

std::string hex(std::span<const std::byte> bytes) {
  constexpr char digits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : bytes) {
    text += digits[std::to_integer<unsigned>(byte) >> 4];
    text += digits[std::to_integer<unsigned>(byte) & 15];
  }
  return text;
}

}  // namespace

TEST_CASE("An encoded header is the table of format/packets.md section 13, byte for byte") {
  Bytes encoded(276, std::byte{0xa5});
  const Bytes payload(0x010203);
  wire::encode_device_state_header(encoded.data(), {"0000:00:05.0/vfio", 0x01020304, payload});
  CHECK(encoded == vfio());

  // The same in hex digits, so that put32() cannot be wrong in the same way.
  const std::string zeros(2 * (256 - 17), '0');
  CHECK(hex(encoded) ==
        "11223344"
        "00000001"
        "00000040"
        "303030303a30303a30352e302f7666696f" +  // 0000:00:05.0/vfio
            zeros +
            "01020304"
            "00010203");
}

TEST_CASE("An encoded header is followed by nothing and writes nothing behind itself") {
  Bytes encoded(276 + 16, std::byte{0xa5});
  wire::encode_device_state_header(encoded.data(), {"vfio", 0, Bytes(1)});
  CHECK(std::ranges::all_of(encoded.begin() + 276, encoded.end(), [](std::byte b) { return b == std::byte{0xa5}; }));
}

TEST_CASE("Every field survives the round trip, at the ends of its range") {
  for (const std::size_t length : {1u, 2u, 254u, 255u})
    for (const std::uint32_t instance : {0u, 1u, 0x80000000u, 0xffffffffu})
      for (const std::size_t size : {std::size_t{1}, std::size_t{276}, limit}) {
        CAPTURE(length);
        CAPTURE(instance);
        CAPTURE(size);
        const std::string idstr(length, 'd');
        const Bytes payload(size);
        Bytes encoded(276);
        wire::encode_device_state_header(encoded.data(), {idstr, instance, payload});
        const auto header = parse(encoded);
        REQUIRE(header);
        CHECK(header->idstr == idstr);
        CHECK(static_cast<const void*>(header->idstr.data()) == encoded.data() + 12);
        CHECK(header->instance_id == instance);
        CHECK(header->payload_bytes == size);
      }
}

TEST_CASE("Another magic or version is refused") {
  for (std::size_t at = 0; at < 4; ++at) {
    Bytes bytes = vfio();
    bytes[at] ^= std::byte{0x01};
    check_refused(bytes, Errc::bad_magic, wire::load_be<std::uint32_t>(bytes.data()));
  }
  for (const std::uint32_t version : {0u, 2u, 0x01000000u, 0xffffffffu}) {
    Bytes bytes = vfio();
    put32(bytes, 4, version);
    check_refused(bytes, Errc::bad_version, version);
  }
}

TEST_CASE("A header without the device-state bit, or with SYNC, is refused; other bits are ignored") {
  Bytes bytes = vfio();
  for (const std::uint32_t flags : {0u, 1u, 0x41u, 0xffffffffu, 0xffffffbfu}) {
    put32(bytes, 8, flags);
    check_refused(bytes, Errc::bad_device_state, flags);
  }
  for (const std::uint32_t flags : {0x40u, 0x80000040u, 0xfffffffeu}) {
    put32(bytes, 8, flags);
    CHECK(parse(bytes));
  }
}

TEST_CASE("An idstr that is empty or has no end is refused; what is behind its end is ignored") {
  check_refused(by_the_table("", 0, 1), Errc::bad_device_state, 0);
  check_refused(by_the_table(std::string(256, 'x'), 0, 1), Errc::bad_device_state, 256);
  // The instance id behind it must not serve as its end.
  check_refused(by_the_table(std::string(256, 'x'), 0x61000000, 1), Errc::bad_device_state, 256);
  Bytes stale = by_the_table(std::string(256, 'x'), 0, 1);
  put_text(stale, 12, std::string_view("vfio\0", 5));
  CHECK(parse(stale)->idstr == "vfio");
  put_text(stale, 12, std::string_view("\0fio", 4));
  check_refused(stale, Errc::bad_device_state, 0);
}

TEST_CASE("A payload of no bytes is refused, one of the limit is not, one byte more is") {
  check_refused(by_the_table("vfio", 0, 0), Errc::bad_device_state, 0);
  for (const std::size_t most : {std::size_t{1}, std::size_t{4096}, std::size_t{0xfffffffe}}) {
    CAPTURE(most);
    const auto bytes = static_cast<std::uint32_t>(most);
    CHECK(parse(by_the_table("vfio", 0, bytes), most)->payload_bytes == most);
    check_refused(by_the_table("vfio", 0, bytes + 1), Errc::payload_too_large, most + 1, most);
  }
  CHECK(parse(by_the_table("vfio", 0, 0xffffffff), 0xffffffff));
  check_refused(by_the_table("vfio", 0, 1), Errc::payload_too_large, 1, 0);
}

TEST_CASE("Random headers are parsed or refused, and nothing is read outside them") {
  std::mt19937 random(13);
  unsigned good = 0;
  for (int round = 0; round < 20000; ++round) {
    // On the heap and exactly as large, so that AddressSanitizer sees one byte too far.
    Bytes bytes = vfio();
    for (unsigned flips = 1 + random() % 4; flips > 0; --flips)
      bytes[random() % 276] = static_cast<std::byte>(random() % 3 == 0 ? 0 : random());
    const auto header = parse(bytes);
    if (!header) continue;
    ++good;
    REQUIRE(header->payload_bytes >= 1);
    REQUIRE(header->payload_bytes <= limit);
    REQUIRE(header->idstr.size() >= 1);
    REQUIRE(header->idstr.size() <= 255);
  }
  CHECK(good > 1000);
}
