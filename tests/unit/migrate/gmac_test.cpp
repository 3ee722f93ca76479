// SPDX-License-Identifier: MIT
//
// GMAC of pages by OpenSSL, against the vector of format/extension.md section 19.12, and against what makes another digest.
#if defined(MULTIFD_HAS_OPENSSL)
#include "multifd/migrate/gmac.hpp"
#endif

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "multifd/format/base_digests.hpp"
#include "multifd/qemu/return_path.hpp"
#include "support/basics.hpp"
#include "support/format_vector.hpp"
#include "support/skip.hpp"

#if defined(MULTIFD_HAS_OPENSSL)

using namespace multifd;

namespace {

Digest128 digest(KeyedDigest& by, std::span<const std::byte> page) {
  const auto made = by.of(page);
  REQUIRE_MESSAGE(made.has_value(), test::text(made));
  return *made;
}

}  // namespace

TEST_CASE("The digests of the format's vector are those of its pages (section 19.12)") {
  const std::vector<std::byte> vector = test::format_vector("extension.md", "extension_base_answers");
  qemu::ReturnPathParser parser;
  std::ranges::copy(vector, parser.room().begin());
  parser.commit(vector.size());
  REQUIRE(parser.next().has_value());  // PONG
  parser.take_extension();
  REQUIRE(parser.next().has_value());  // ACCEPTED
  const DigestKey key = wire::base_key_of((*parser.next())->message);
  const auto made = migrate::Gmac::create(key);
  REQUIRE(made.has_value());
  const auto pages = wire::parse_base_pages((*parser.next())->message);
  REQUIRE(pages.has_value());
  std::vector<std::byte> page(4096, std::byte{0x61});
  CHECK(pages->digest(0) == digest(**made, page));
  for (std::size_t i = 0; i < page.size(); ++i) page[i] = std::byte(7 * i % 256);
  CHECK(pages->digest(1) == digest(**made, page));
  // Not that of what came before.
  CHECK(pages->digest(1) == digest(**made, page));
}

TEST_CASE("One bit of the page, or of the key, makes another digest, for pages of every size") {
  for (const std::size_t bytes : {1024u, 4096u, 65536u}) {
    CAPTURE(bytes);
    DigestKey key{std::byte{5}};
    const auto one = migrate::Gmac::create(key);
    key[15] = std::byte{1};
    const auto other = migrate::Gmac::create(key);
    REQUIRE(one.has_value());
    REQUIRE(other.has_value());
    std::vector<std::byte> page(bytes);
    const Digest128 of_zeros = digest(**one, page);
    CHECK(of_zeros != Digest128{});
    CHECK(of_zeros != digest(**other, page));
    for (const std::size_t at : {std::size_t{0}, bytes / 2 + 3, bytes - 1}) {
      page[at] ^= std::byte{0x10};
      CHECK(of_zeros != digest(**one, page));
      page[at] ^= std::byte{0x10};
    }
    CHECK(of_zeros == digest(**one, page));
  }
}

#else

TEST_CASE("GMAC of pages") { test::skip("built without OpenSSL"); }

#endif
