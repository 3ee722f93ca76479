// SPDX-License-Identifier: MIT
#include "multifd/format/byte_order.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstdint>

using multifd::wire::load_be;
using multifd::wire::store_be;

TEST_CASE("The most significant byte comes first") {
  std::array<std::byte, 8> bytes{};
  store_be<std::uint64_t>(bytes.data(), 0x0102030405060708);
  for (std::size_t i = 0; i < 8; ++i) CHECK(std::to_integer<std::size_t>(bytes[i]) == i + 1);
  CHECK(load_be<std::uint8_t>(bytes.data()) == 0x01);
  CHECK(load_be<std::uint16_t>(bytes.data()) == 0x0102);
  CHECK(load_be<std::uint32_t>(bytes.data()) == 0x01020304);
  CHECK(load_be<std::uint64_t>(bytes.data()) == 0x0102030405060708);
}

TEST_CASE("Any alignment will do, and neighbours are not touched") {
  for (std::size_t at = 1; at < 8; ++at) {
    CAPTURE(at);
    std::array<std::byte, 24> bytes;
    bytes.fill(std::byte{0xee});
    store_be<std::uint64_t>(bytes.data() + at, 0xf0e1d2c3b4a59687);
    CHECK(load_be<std::uint64_t>(bytes.data() + at) == 0xf0e1d2c3b4a59687);
    CHECK(bytes[at - 1] == std::byte{0xee});
    CHECK(bytes[at + 8] == std::byte{0xee});
  }
}
