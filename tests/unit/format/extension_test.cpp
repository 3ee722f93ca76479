// SPDX-License-Identifier: MIT
//
// The messages of fixed fields, FAILED and PAGE_DIGESTS, against the tables of format/extension.md section 19, and the
// limits of every field.
#include "multifd/format/extension.hpp"

#include <doctest/doctest.h>

#include <array>
#include <ostream>  // lets doctest print a std::error_code
#include <string>

#include "multifd/format/base_digests.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/format/page_digests.hpp"
#include "multifd/format/peer_failure.hpp"
#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::Errc;
using wire::ExtensionKind;
using wire::Towards;

namespace {

/// A message with a body of zeros.
Bytes message(unsigned kind, std::size_t body) {
  Bytes bytes(2 + body);
  put(bytes, 0, 2, kind);
  return bytes;
}

std::error_code refusal(const Bytes& bytes, Towards towards) {
  const auto parsed = wire::parse_extension(bytes, towards);
  if (!parsed) CHECK(parsed.error().stage == multifd::Stage::parse);
  return parsed ? std::error_code{} : parsed.error().code;
}

wire::ExtensionMessage parsed(std::span<const std::byte> bytes, Towards towards) {
  const auto message = wire::parse_extension(bytes, towards);
  REQUIRE(message.has_value());
  return *message;
}

/// The table of section 19.2: whom a kind is for, and how long its body may be.
struct Row {
  unsigned kind;
  bool to_destination, to_source;
  std::size_t least, most;
};
constexpr std::size_t any_length = 16382;
constexpr Row rows[] = {{1, true, false, 4, 2046},      {2, false, true, 4, 510},     {3, true, true, 26, 426},
                        {4, true, true, 1, any_length}, {5, false, true, 48, 48},     {6, true, false, 8, 8},
                        {7, true, false, 20, 16380},    {8, true, false, 4, 4},       {9, false, true, 8, 8},
                        {10, true, false, 0, 0},        {11, false, true, 0, 0},      {12, true, false, 20, 16380},
                        {13, true, false, 26, 26},      {14, true, false, 20, 16380}, {15, true, false, 0, 0},
                        {16, false, true, 16, 16},      {17, false, true, 28, 508},   {18, false, true, 20, 20}};

}  // namespace

TEST_CASE("The question and its answer are section 19.1, and no other value is taken for one") {
  CHECK(wire::extension_ping(1) == 0x6d660001);
  CHECK(wire::extension_pong(1) == 0x6d668001);
  CHECK(wire::extension_ping() == wire::extension_ping(wire::extension_version));
  for (unsigned version = 1; version < 256; ++version) {
    const auto newest = static_cast<std::uint8_t>(version);
    CHECK(wire::version_in_ping(wire::extension_ping(newest)) == newest);
    CHECK(wire::version_in_pong(wire::extension_pong(newest)) == newest);
    CHECK_FALSE(wire::version_in_pong(wire::extension_ping(newest)));  // what a QEMU answers
    CHECK_FALSE(wire::version_in_ping(wire::extension_pong(newest)));
  }
  for (const std::uint32_t value : {0u, 1u, 0x6d660000u, 0x6d668000u, 0x6d660101u, 0x6d668101u, 0x016d6601u, ~0u}) {
    CHECK_FALSE(wire::version_in_ping(value));
    CHECK_FALSE(wire::version_in_pong(value));
  }
}

TEST_CASE("Every kind of message has its direction and its bounds (section 19.2)") {
  for (const Row& row : rows) {
    CAPTURE(row.kind);
    for (const Towards towards : {Towards::destination, Towards::source}) {
      const bool fits = towards == Towards::destination ? row.to_destination : row.to_source;
      const std::size_t bound = towards == Towards::destination ? wire::max_extension_bytes : 512;
      const std::size_t most = std::min(row.most, bound - 2);
      if (!fits) {
        CHECK(refusal(message(row.kind, row.least), towards) == Errc::unexpected_extension_message);
        continue;
      }
      CHECK(refusal(message(row.kind, row.least), towards) == std::error_code{});
      CHECK(refusal(message(row.kind, most), towards) == std::error_code{});
      CHECK(refusal(message(row.kind, most + 1), towards) == Errc::bad_extension_message);
      if (row.least > 0) CHECK(refusal(message(row.kind, row.least - 1), towards) == Errc::bad_extension_message);
      CHECK(parsed(message(row.kind, most), towards).body.size() == most);
    }
  }
  for (const unsigned kind : {0u, 19u, 0x8001u, 0xffffu})
    for (const Towards towards : {Towards::destination, Towards::source})
      CHECK(refusal(message(kind, 8), towards) == Errc::bad_extension_message);
  CHECK(refusal({}, Towards::destination) == Errc::bad_extension_message);
  CHECK(refusal(Bytes(1), Towards::source) == Errc::bad_extension_message);
}

TEST_CASE("Messages of a number survive the round trip, byte for byte as the table has them") {
  const auto check = [](ExtensionKind kind, Towards towards, std::size_t size, std::uint64_t number) {
    const auto bytes = wire::encode_extension(kind, number);
    Bytes expected = message(static_cast<unsigned>(kind), size);
    if (size > 0) put(expected, 2, size, number);
    CHECK(std::ranges::equal(bytes.view(), expected));
    const auto message = parsed(bytes.view(), towards);
    CHECK(message.kind == kind);
    CHECK(message.number == number);
  };
  check(ExtensionKind::section_size, Towards::destination, 8, ~std::uint64_t{0});
  check(ExtensionKind::state_whole, Towards::destination, 4, 0xdeadbeef);
  check(ExtensionKind::loaded, Towards::source, 8, 1);
  check(ExtensionKind::hand_over, Towards::destination, 0, 0);
  check(ExtensionKind::running, Towards::source, 0, 0);
}

TEST_CASE("FAILED carries the reason and a text that any terminal bears (section 19.5)") {
  const multifd::Error error{.code = Errc::wrong_compression, .detail = 4, .expected = 2};
  const auto bytes = wire::encode_failed(error, "zstd here,\n\x1b[31mzlib there");
  Bytes expected(28 + 26);
  put(expected, 0, 2, 3);
  put(expected, 2, 1, 1);
  put32(expected, 4, static_cast<std::uint32_t>(error.code.value()));
  put32(expected, 8, static_cast<std::uint32_t>(multifd::last_errc));
  put64(expected, 12, 4);
  put64(expected, 20, 2);
  put_text(expected, 28, "zstd here,??[31mzlib there");
  CHECK(std::ranges::equal(bytes.view(), expected));
  for (const Towards towards : {Towards::destination, Towards::source}) {
    const auto failure = wire::parse_failed(parsed(bytes.view(), towards));
    REQUIRE(failure.has_value());
    CHECK(failure->text() == "zstd here,??[31mzlib there");
    CHECK(failure->reason == Errc::wrong_compression);
    CHECK(failure->error().code == Errc::peer_gave_up);
    CHECK(failure->error().peer_reason == Errc::wrong_compression);
    CHECK(failure->error().detail == 4);
    CHECK(failure->error().expected == 2);
    CHECK(failure->error().subject.view() == failure->text());
  }
  // The parser shows no other byte either.
  Bytes hostile = expected;
  for (std::size_t i = 28; i < hostile.size(); ++i) hostile[i] = static_cast<std::byte>(i % 2 == 0 ? 0x1b : 0xff);
  CHECK(wire::parse_failed(parsed(hostile, Towards::source))->text() == std::string(26, '?'));
}

TEST_CASE("Of FAILED's text an error keeps what its code does not say: which setting, and both values") {
  const multifd::Error error{.code = Errc::wrong_compression,
                             .stage = multifd::Stage::hello,
                             .op = "setting: compression",
                             .subject = "source: none, destination: zstd"};
  const auto bytes = wire::encode_failed(error, describe(error));
  const auto failure = wire::parse_failed(parsed(bytes.view(), Towards::source));
  REQUIRE(failure.has_value());
  CHECK(failure->text() == describe(error));
  CHECK(failure->error().subject.view() == "setting: compression: (source: none, destination: zstd)");
}

TEST_CASE("FAILED's text is cut, and its code counts only where both sides have the same list") {
  const std::string longest(500, 'x');
  const auto bytes = wire::encode_failed({.code = {ENOSPC, std::system_category()}}, longest);
  CHECK(bytes.view().size() == 428);
  const auto failure = wire::parse_failed(parsed(bytes.view(), Towards::source));
  REQUIRE(failure.has_value());
  CHECK(failure->text() == longest.substr(0, 400));
  CHECK(failure->reason == std::error_code(ENOSPC, std::system_category()));

  const auto read = [](unsigned kind, std::uint32_t code, std::uint32_t last) {
    Bytes raw = message(3, 26);
    put(raw, 2, 1, kind);
    put32(raw, 4, code);
    put32(raw, 8, last);
    return wire::parse_failed(parsed(raw, Towards::source));
  };
  const auto last = static_cast<std::uint32_t>(multifd::last_errc);
  CHECK(read(1, 1, last)->reason == static_cast<Errc>(1));
  CHECK(read(1, last, last)->reason == static_cast<Errc>(last));
  for (const auto& [code, of] : {std::pair(1u, last + 1), {1u, last - 1}, {0u, last}, {last + 1, last}, {~0u, last}})
    CHECK(read(1, code, of)->reason == std::error_code{});
  CHECK(read(2, EIO, 0)->reason == std::error_code(EIO, std::system_category()));
  CHECK(read(3, EIO, last)->reason == std::error_code{});
  CHECK(read(3, 0, 0)->text().empty());
  for (const unsigned kind : {0u, 4u, 255u}) CHECK(read(kind, 1, last).error().code == Errc::bad_extension_message);
}

TEST_CASE("PAGE_DIGESTS is taken apart, and compared with the memory page by page (section 19.6)") {
  constexpr std::size_t page = 4096;
  std::vector<std::byte> memory(8 * page);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i / page * 7 + i % 13);
  const auto encode = [&](std::uint64_t offset, std::size_t pages) {
    Bytes bytes(14 + 8 * pages);
    put(bytes, 0, 2, 7);
    put32(bytes, 2, 3);
    put64(bytes, 6, offset);
    for (std::size_t i = 0; i < pages && offset < memory.size() && offset + (i + 1) * page <= memory.size(); ++i)
      put64(bytes, 14 + 8 * i, multifd::digest_of(std::span(memory).subspan(offset + i * page, page)));
    return bytes;
  };
  const Bytes good = encode(2 * page, 6);
  CHECK(std::ranges::equal(wire::encode_page_digests_header(3, 2 * page).view(), std::span(good).first(14)));
  const auto digests = wire::parse_page_digests(parsed(good, Towards::destination));
  REQUIRE(digests.has_value());
  CHECK(digests->block == 3);
  CHECK(digests->offset == 2 * page);
  CHECK(digests->pages() == 6);
  CHECK(wire::compare_page_digests(*digests, memory, page, "ram").has_value());

  memory[5 * page + 17] ^= std::byte{1};
  const auto differs = wire::compare_page_digests(*digests, memory, page, "ram");
  REQUIRE_FALSE(differs.has_value());
  CHECK(differs.error().code == Errc::digest_mismatch);
  CHECK(differs.error().detail == 5 * page);
  CHECK(differs.error().subject.view() == "ram");

  const auto compare = [&](std::uint64_t offset, std::size_t pages) {
    const Bytes bytes = encode(offset, pages);
    const auto taken = wire::parse_page_digests(parsed(bytes, Towards::destination));
    REQUIRE(taken.has_value());
    const auto compared = wire::compare_page_digests(*taken, memory, page, "ram");
    return compared ? std::error_code{} : compared.error().code;
  };
  CHECK(compare(0, 4) == std::error_code{});
  CHECK(compare(1, 1) == Errc::offset_misaligned);
  CHECK(compare(8 * page, 1) == Errc::offset_past_block);
  CHECK(compare(7 * page, 2) == Errc::offset_past_block);
  CHECK(compare(0, 9) == Errc::offset_past_block);
  CHECK(compare(~std::uint64_t{0} - page + 1, 1) == Errc::offset_past_block);
  // Half a digest.
  Bytes half = encode(0, 2);
  half.resize(half.size() - 4);
  CHECK(wire::parse_page_digests(parsed(half, Towards::destination)).error().code == Errc::bad_extension_message);
  CHECK(14 + 8 * wire::max_page_digests <= wire::max_extension_bytes);
}

TEST_CASE("MISSING_PAGES is taken apart, and sets the bits of a block's bitmap (section 19.9)") {
  constexpr std::size_t page = 4096;
  constexpr std::uint64_t block_bytes = 200 * page;  // three words and a part of one
  const auto encode = [](std::uint64_t offset, const std::vector<std::uint64_t>& words) {
    Bytes bytes(14 + 8 * words.size());
    put(bytes, 0, 2, 12);
    put32(bytes, 2, 3);
    put64(bytes, 6, offset);
    for (std::size_t i = 0; i < words.size(); ++i) put64(bytes, 14 + 8 * i, words[i]);
    return bytes;
  };
  const auto add = [&](std::uint64_t offset, const std::vector<std::uint64_t>& words, std::span<std::uint64_t> bitmap) {
    const Bytes bytes = encode(offset, words);
    const auto taken = wire::parse_page_bitmap(parsed(bytes, Towards::destination));
    REQUIRE(taken.has_value());
    CHECK(taken->block == 3);
    CHECK(taken->words() == words.size());
    const auto added = wire::add_missing_pages(*taken, bitmap, block_bytes, page, "ram");
    if (!added) CHECK(added.error().subject.view() == "ram");
    return added ? std::error_code{} : added.error().code;
  };
  const Bytes one = encode(64 * page, {1});
  CHECK(std::ranges::equal(wire::encode_page_bitmap_header(wire::ExtensionKind::missing_pages, 3, 64 * page).view(),
                           std::span(one).first(14)));
  std::array<std::uint64_t, 4> bitmap{};
  CHECK(add(0, {1}, bitmap) == std::error_code{});
  CHECK(add(64 * page, {0x8000000000000000, 0, 0x80}, bitmap) == std::error_code{});
  CHECK(add(0, {2, 1}, bitmap) == std::error_code{});  // the same pages again do no harm
  CHECK(bitmap == std::array<std::uint64_t, 4>{3, 0x8000000000000001, 0, 0x80});
  // Past the block: the first page behind it, words behind it that are empty, an offset behind it.
  std::array<std::uint64_t, 4> others{};
  CHECK(add(192 * page, {0x100}, others) == Errc::offset_past_block);
  CHECK(add(192 * page, {1, 0, 0, 0}, others) == std::error_code{});
  CHECK(add(192 * page, {0, 1}, others) == Errc::offset_past_block);
  CHECK(add(256 * page, {0}, others) == Errc::offset_past_block);
  CHECK(add(~std::uint64_t{0} - 64 * page + 1, {1}, others) == Errc::offset_past_block);
  CHECK(add(page, {1}, others) == Errc::offset_misaligned);
  CHECK(add(32 * page, {1}, others) == Errc::offset_misaligned);
  CHECK(others == std::array<std::uint64_t, 4>{0, 0, 0, 1});
  Bytes half = encode(0, {1, 2});
  half.resize(half.size() - 4);
  CHECK(wire::parse_page_bitmap(parsed(half, Towards::destination)).error().code == Errc::bad_extension_message);
  CHECK(14 + 8 * wire::max_page_bitmap_words <= wire::max_extension_bytes);
}

TEST_CASE("KNOWN_ZEROS is taken apart word by word, as far as it is good (section 19.11)") {
  constexpr std::size_t page = 4096;
  Bytes bytes(14 + 8 * 3);
  put(bytes, 0, 2, 14);
  put32(bytes, 2, 1);
  put64(bytes, 6, 64 * page);
  for (const auto& [word, value] : {std::pair<std::size_t, std::uint64_t>{0, 5}, {2, 0x80}})
    put64(bytes, 14 + 8 * word, value);
  const auto zeros = wire::parse_page_bitmap(parsed(bytes, Towards::destination));
  REQUIRE(zeros.has_value());
  CHECK(zeros->kind == wire::ExtensionKind::known_zeros);
  CHECK(std::ranges::equal(wire::encode_page_bitmap_header(wire::ExtensionKind::known_zeros, 1, 64 * page).view(),
                           std::span(bytes).first(14)));
  using Words = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
  Words words;
  const auto collect = [&](std::uint64_t index, std::uint64_t word) -> multifd::Result<void> {
    words.emplace_back(index, word);
    return {};
  };
  CHECK(wire::for_each_word(*zeros, 200 * page, page, "ram", collect).has_value());
  CHECK(words == Words{{1, 5}, {3, 0x80}});
  words.clear();
  const auto past = wire::for_each_word(*zeros, 199 * page, page, "ram", collect);
  CHECK(past.error().code == Errc::offset_past_block);
  CHECK(words == Words{{1, 5}});
  const auto ends =
      wire::for_each_word(*zeros, 200 * page, page, "ram", [](std::uint64_t, std::uint64_t) -> multifd::Result<void> {
        return multifd::fail(Errc::cancelled, multifd::Stage::none, "the caller's");
      });
  CHECK(ends.error().code == Errc::cancelled);
  CHECK(wire::parse_extension(bytes, Towards::source).error().code == Errc::unexpected_extension_message);
}

TEST_CASE("MEMORY_FOLLOWS and the beginning of a page connection survive the round trip (section 19.9)") {
  multifd::Uuid session;
  for (std::size_t i = 0; i < session.size(); ++i) session[i] = static_cast<std::byte>(0xa0 + i);
  const auto bytes =
      wire::encode_memory_follows({.pages = 0x0102030405060708, .connections = 0x0100, .session = session});
  Bytes expected(28);
  put(expected, 0, 2, 13);
  put64(expected, 2, 0x0102030405060708);
  put(expected, 10, 2, 0x0100);
  std::ranges::copy(session, expected.begin() + 12);
  CHECK(std::ranges::equal(bytes.view(), expected));
  const auto follows = wire::parse_memory_follows(parsed(bytes.view(), Towards::destination));
  REQUIRE(follows.has_value());
  CHECK(follows->pages == 0x0102030405060708);
  CHECK(follows->connections == 256);
  CHECK(follows->session == session);
  for (const unsigned connections : {0u, 257u, 65535u}) {
    put(expected, 10, 2, connections);
    CHECK(wire::parse_memory_follows(parsed(expected, Towards::destination)).error().code ==
          Errc::bad_extension_message);
  }

  const auto begin = wire::encode_page_connection(session);
  Bytes first(20);
  put32(first, 0, 0x6d667067);
  std::ranges::copy(session, first.begin() + 4);
  CHECK(std::ranges::equal(begin.view(), first));
  CHECK(wire::parse_page_connection(std::span<const std::byte, 20>(first)) == session);
  first[3] ^= std::byte{1};
  CHECK_FALSE(wire::parse_page_connection(std::span<const std::byte, 20>(first)).has_value());
}

TEST_CASE(
    "BASE_KEY, BASE_DIGESTS and BASE_ZEROS are taken apart, and refused where they name no page (section 19.12)") {
  multifd::DigestKey key{};
  for (std::size_t i = 0; i < key.size(); ++i) key[i] = std::byte(i + 1);
  const auto said = wire::encode_base_key(key);
  CHECK(wire::base_key_of(parsed(said.view(), Towards::source)) == key);

  Bytes zeros(2 + 20);
  put(zeros, 0, 2, 18);
  put32(zeros, 2, 3);
  put64(zeros, 6, 0x5000);
  put64(zeros, 14, 77);
  CHECK(std::ranges::equal(wire::encode_base_zeros(3, 0x5000, 77).view(), zeros));
  const auto run = wire::parse_base_pages(parsed(zeros, Towards::source));
  REQUIRE(run.has_value());
  CHECK(run->block == 3);
  CHECK(run->offset == 0x5000);
  CHECK(run->pages == 77);
  CHECK(run->digests.empty());
  put64(zeros, 14, 0);
  CHECK(wire::parse_base_pages(parsed(zeros, Towards::source)).error().code == Errc::bad_extension_message);

  const std::array<multifd::Digest128, 2> two{{{.low = 1, .high = 2}, {.low = 3, .high = ~std::uint64_t{0}}}};
  Bytes digests(2 + 12 + 32);
  put(digests, 0, 2, 17);
  put32(digests, 2, 1);
  put64(digests, 6, 0x1000);
  for (const auto& [at, value] :
       {std::pair<std::size_t, std::uint64_t>{14, 2}, {22, 1}, {30, ~std::uint64_t{0}}, {38, 3}})
    put64(digests, at, value);
  CHECK(std::ranges::equal(wire::encode_base_digests(1, 0x1000, two).view(), digests));
  const auto pages = wire::parse_base_pages(parsed(digests, Towards::source));
  REQUIRE(pages.has_value());
  CHECK(pages->pages == 2);
  CHECK(pages->digest(0) == two[0]);
  CHECK(pages->digest(1) == two[1]);
  digests.resize(digests.size() - 1);
  CHECK(wire::parse_base_pages(parsed(digests, Towards::source)).error().code == Errc::bad_extension_message);
  CHECK(14 + 16 * wire::max_base_digests <= wire::max_extension_answer_bytes);
}
