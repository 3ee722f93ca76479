// SPDX-License-Identifier: MIT
#include "multifd/memory/page_digest.hpp"

#include <doctest/doctest.h>

#include <random>
#include <vector>

using multifd::PageDigest;

namespace {

std::vector<std::byte> random_bytes(std::size_t size) {
  std::mt19937 random(static_cast<unsigned>(size));
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

}  // namespace

TEST_CASE("The digest of scattered buffers is that of their concatenation, wherever they are cut") {
  auto digest = PageDigest::create();
  REQUIRE(digest);
  std::mt19937 random(5);
  for (const std::size_t size : {1u, 100u, 240u, 241u, 4096u, 3 * 4096u, 300'000u}) {
    CAPTURE(size);
    const std::vector<std::byte> bytes = random_bytes(size);
    for (int round = 0; round < 10; ++round) {
      std::vector<iovec> cut;
      for (std::size_t at = 0; at < size;) {
        const std::size_t length = std::min<std::size_t>(size - at, random() % (size / 3 + 2));
        cut.push_back(multifd::const_buffer(bytes.data() + at, length));
        at += length;
      }
      CHECK(digest->of(cut) == multifd::digest_of(bytes));
    }
  }
}

TEST_CASE("One digest object can be used again and again") {
  auto digest = PageDigest::create();
  REQUIRE(digest);
  const std::vector<std::byte> one = random_bytes(4096);
  const std::vector<std::byte> two = random_bytes(8192);
  const std::vector<iovec> first{multifd::const_buffer(one)};
  const std::vector<iovec> second{multifd::const_buffer(two)};
  const std::uint64_t before = digest->of(first);
  CHECK(digest->of(second) != before);
  CHECK(digest->of(first) == before);
}

TEST_CASE("No bytes at all have the digest of the empty range") {
  auto digest = PageDigest::create();
  REQUIRE(digest);
  CHECK(digest->of({}) == multifd::digest_of({}));
}

TEST_CASE("A single flipped bit changes the digest") {
  std::vector<std::byte> bytes = random_bytes(4096);
  const std::uint64_t before = multifd::digest_of(bytes);
  for (const std::size_t at : {0u, 1u, 2047u, 4095u}) {
    bytes[at] ^= std::byte{0x10};
    CHECK(multifd::digest_of(bytes) != before);
    bytes[at] ^= std::byte{0x10};
  }
  CHECK(multifd::digest_of(bytes) == before);
}

TEST_CASE("The digest is XXH3-64, which the wire extension promises: the published value of the empty input") {
  CHECK(multifd::digest_of({}) == 0x2d06800538d394c2);
}

TEST_CASE("A 128-bit digest piece by piece is that of the whole") {
  auto digest = PageDigest::create();
  REQUIRE(digest);
  const std::vector<std::byte> bytes = random_bytes(5000);
  for (const std::size_t cut : {0u, 1u, 240u, 241u, 4999u, 5000u}) {
    digest->begin128();
    digest->add128(std::span(bytes).first(cut));
    digest->add128(std::span(bytes).subspan(cut));
    CHECK(digest->value128() == multifd::digest128_of(bytes));
  }
}

TEST_CASE("zstd's checksum is the low half of XXH64: the published values") {
  CHECK(multifd::zstd_checksum_of({}) == 0x51d8e999);
  constexpr std::byte abc[] = {std::byte{'a'}, std::byte{'b'}, std::byte{'c'}};
  CHECK(multifd::zstd_checksum_of(abc) == 0xad770999);  // of 44bc2cf5ad770999
}
