// SPDX-License-Identifier: MIT
#include "multifd/format/page_requests.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "support/basics.hpp"
#include "support/format_vector.hpp"

using namespace multifd;
using namespace multifd::wire;
using test::code_of;
using test::text;

namespace {

using Bytes = std::vector<std::byte>;

template <class... Parts>
Bytes joined(const Parts&... parts) {
  Bytes bytes;
  (bytes.insert(bytes.end(), parts.begin(), parts.end()), ...);
  return bytes;
}

Uuid session(unsigned char value) {
  Uuid uuid;
  uuid.fill(std::byte{value});
  return uuid;
}

/// Everything that a parser makes of `bytes`, read `piece` bytes at a time.
std::string heard(std::span<const std::byte> bytes, std::size_t piece) {
  PageRequestParser parser;
  std::string said;
  for (;;) {
    const auto request = parser.next();
    if (!request) {
      CHECK(parser.room().empty());
      CHECK(code_of(parser.next()) == request.error().code);  // an error stays
      return said + text(request);
    }
    if (*request) {
      const PageRequest& got = **request;
      said += got.kind == PageRequestKind::pages
                  ? std::string(got.idstr) + "+" + std::to_string(got.start) + "+" + std::to_string(got.bytes) + " "
              : got.kind == PageRequestKind::whole ? "WHOLE "
                                                   : "GAVE UP ";
      continue;
    }
    if (bytes.empty()) return said + (parser.inside() ? "..." : "");
    const auto now = bytes.first(std::min({piece, parser.room().size(), bytes.size()}));
    std::ranges::copy(now, parser.room().begin());
    parser.commit(now.size());
    bytes = bytes.subspan(now.size());
  }
}

std::string refused(const Bytes& bytes) {
  const std::string whole = heard(bytes, bytes.size());
  CHECK(heard(bytes, 1) == whole);
  return whole;
}

Bytes message(std::uint16_t type, std::uint16_t length, std::initializer_list<unsigned char> data) {
  Bytes bytes(4);
  store_be(&bytes[0], type);
  store_be(&bytes[2], length);
  for (const unsigned char each : data) bytes.push_back(std::byte{each});
  return bytes;
}

}  // namespace

TEST_CASE("A page connection's bytes are those of the text (section 21.8): the client's side") {
  const PageHello hello{.session = session(0x33), .page_bytes = 65536};
  const auto ask = [](std::string_view idstr, std::uint64_t start, std::uint32_t bytes) {
    return encode_page_request({.kind = PageRequestKind::pages, .idstr = idstr, .start = start, .bytes = bytes});
  };
  const Bytes ours = joined(encode_page_hello(hello), ask("ram0", 0, 0x20000).view(), ask("", 0x20000, 0x10000).view(),
                            encode_page_request({.kind = PageRequestKind::whole}).view());
  const Bytes vector = test::format_vector("page_requests.md", "page_client");
  CHECK(ours == vector);

  const auto parsed = parse_page_hello(std::span(vector).first<page_hello_bytes>());
  REQUIRE(parsed.has_value());
  CHECK(parsed->session == hello.session);
  CHECK(parsed->page_bytes == 65536);
  CHECK(parsed->method == 0);
  CHECK(parsed->kind == 0);
  const auto requests = std::span(vector).subspan(page_hello_bytes);
  for (std::size_t piece = 1; piece <= requests.size(); ++piece)
    CHECK(heard(requests, piece) == "ram0+0+131072 +131072+65536 WHOLE ");
}

TEST_CASE("A page connection's bytes are those of the text (section 21.8): the server's side") {
  const Bytes vector = test::format_vector("page_requests.md", "page_server");
  const PageHello own{.session = session(0x33), .page_bytes = 65536};
  const auto entry = encode_page_block("ram0", 0x30000);
  const Bytes ours = joined(encode_page_greeting(own), encode_page_accepted({.blocks = 1, .bytes = 13}), entry.view());
  CHECK(std::ranges::equal(ours, std::span(vector).first(ours.size())));

  const auto greeting = parse_page_greeting(std::span(vector).first<page_greeting_bytes>());
  REQUIRE(greeting.has_value());
  CHECK(compare(*greeting, own).has_value());
  const auto list = parse_page_accepted(std::span(vector).subspan<page_greeting_bytes, page_accepted_bytes>());
  REQUIRE(list.has_value());
  std::string blocks;
  const auto taken = parse_page_blocks(std::span(vector).subspan(44, list->bytes), list->blocks, 65536,
                                       [&](std::string_view idstr, std::uint64_t bytes) -> Result<void> {
                                         blocks += std::string(idstr) + "+" + std::to_string(bytes) + " ";
                                         return {};
                                       });
  CHECK_MESSAGE(taken.has_value(), text(taken));
  CHECK(blocks == "ram0+196608 ");

  const std::byte* const packet = vector.data() + 57;
  const auto header = parse_header({packet, header_bytes(65536)}, {.page_bytes = 65536});
  REQUIRE(header.has_value());
  CHECK(check_page_answer(*header, packet, "ram0", 0, 0x20000, 65536).has_value());
  for (const auto& [idstr, start, bytes] : {std::tuple{"ram1", 0ul, 0x20000ul},
                                            {"ram0", 0x10000ul, 0x20000ul},
                                            {"ram0", 0ul, 0x10000ul},
                                            {"ram0", 0ul, 0x30000ul}})
    CHECK(code_of(check_page_answer(*header, packet, idstr, start, bytes, 65536)) == Errc::unasked_pages);
  CHECK(load_be<std::uint32_t>(&vector[66361]) == page_whole_magic);
}

TEST_CASE("A page connection's bytes are those of the text (section 21.8): a server that refuses") {
  const Bytes vector = test::format_vector("page_requests.md", "page_server_failed");
  const auto size = parse_page_failed_size(vector.data() + 32);
  REQUIRE(size.has_value());
  const auto failure = parse_page_failed(std::span(vector).subspan(38));
  REQUIRE(failure.has_value());
  CHECK(failure->text() == "another migration.");
  const auto ours = encode_page_failed(fail(Errc::wrong_session, Stage::hello).error(), "another migration.");
  CHECK(ours.view().size() == vector.size() - 32);
  CHECK(std::ranges::equal(ours.view().first(10), std::span(vector).subspan(32, 10)));  // up to the codes' numbers
  const auto again = parse_page_failed(ours.view().subspan(page_failed_header_bytes));
  REQUIRE(again.has_value());
  CHECK(again->error().peer_reason == Errc::wrong_session);

  for (const int bad : {0, 27, 429, 65535}) {
    std::array<std::byte, 6> header{};
    store_be(&header[4], static_cast<std::uint16_t>(bad));
    CHECK(code_of(parse_page_failed_size(header.data())) == Errc::bad_extension_message);
  }
  Bytes other(vector.begin() + 38, vector.end());
  other[1] = std::byte{2};  // ACCEPTED, with a body of any kind
  CHECK(code_of(parse_page_failed(other)) == Errc::unexpected_extension_message);
}

TEST_CASE("Refused: hellos and greetings of another magic, version, kind, session, page size, compression") {
  const PageHello own{.session = session(1), .page_bytes = 4096, .method = flag_zstd, .kind = 1};
  const auto hello = encode_page_hello(own);
  const auto with = [&](std::size_t at, unsigned char value) {
    auto changed = hello;
    changed[at] = std::byte{value};
    return parse_page_hello(changed);
  };
  CHECK(with(36 - 1, 9).has_value());  // reserved: ignored
  CHECK(code_of(with(0, 0)) == Errc::bad_magic);
  CHECK(code_of(with(3, 0x53)) == Errc::bad_magic);  // a server's
  CHECK(code_of(with(7, 2)) == Errc::extension_version_mismatch);
  CHECK(code_of(with(32, 2)) == Errc::bad_page_request);
  auto greeting = encode_page_greeting(own);
  CHECK(parse_page_greeting(greeting).has_value());
  greeting[26] = std::byte{0};
  CHECK(code_of(parse_page_greeting(greeting)) == Errc::page_size_mismatch);  // 0
  greeting[26] = std::byte{0x11};
  CHECK(code_of(parse_page_greeting(greeting)) == Errc::page_size_mismatch);  // no power of two

  PageHello peer = own;
  CHECK(compare(peer, own).has_value());
  peer.page_bytes = 0;
  CHECK(compare(peer, own).has_value());
  peer.page_bytes = 8192;
  CHECK(code_of(compare(peer, own)) == Errc::page_size_mismatch);
  peer = own;
  peer.method = flag_none;
  CHECK(code_of(compare(peer, own)) == Errc::wrong_compression);
  peer.session[15] = std::byte{2};
  CHECK(code_of(compare(peer, own)) == Errc::wrong_session);
}

TEST_CASE("Refused: block lists out of their bounds (section 21.3)") {
  const auto accepted = [](std::uint32_t blocks, std::uint32_t bytes) {
    return code_of(parse_page_accepted(encode_page_accepted({.blocks = blocks, .bytes = bytes})));
  };
  CHECK(accepted(1, 10) == std::error_code{});
  CHECK(accepted(1024, 1024 * 264) == std::error_code{});
  CHECK(accepted(0, 0) == Errc::bad_block_list);
  CHECK(accepted(1025, 1025 * 20) == Errc::stream_limit_exceeded);
  CHECK(accepted(~0u, 0) == Errc::stream_limit_exceeded);
  CHECK(accepted(2, 19) == Errc::bad_block_list);
  CHECK(accepted(1, 265) == Errc::bad_block_list);
  CHECK(accepted(1, ~0u) == Errc::bad_block_list);

  const auto blocks = [](const Bytes& bytes, std::uint32_t count) {
    return code_of(
        parse_page_blocks(bytes, count, 4096, [](std::string_view, std::uint64_t) { return Result<void>{}; }));
  };
  const Bytes good = joined(encode_page_block("a", 4096).view(), encode_page_block("bc", 8192).view());
  CHECK(blocks(good, 2) == std::error_code{});
  CHECK(blocks(good, 1) == Errc::bad_block_list);  // bytes left over
  for (std::size_t size = 0; size < good.size(); ++size)
    CHECK(blocks(Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)), 2) == Errc::bad_block_list);
  CHECK(blocks(joined(encode_page_block("", 4096).view()), 1) == Errc::bad_block_list);
  CHECK(blocks(joined(encode_page_block(std::string_view("a\0b", 3), 4096).view()), 1) == Errc::bad_block_list);
  CHECK(blocks(joined(encode_page_block("a", 0).view()), 1) == Errc::bad_used_length);
  CHECK(blocks(joined(encode_page_block("a", 4097).view()), 1) == Errc::bad_used_length);
}

TEST_CASE("Refused: what a client must not say (section 21.5)") {
  CHECK(refused(message(2, 4, {0, 0, 0, 1})).contains("unknown"));       // PONG
  CHECK(refused(message(0x6d66, 4, {0, 0, 0, 1})).contains("unknown"));  // the extension's
  CHECK(refused(message(4, 11, {})).contains("wrong length"));           // REQ_PAGES
  CHECK(refused(message(4, 13, {})).contains("wrong length"));
  CHECK(refused(message(3, 12, {})).contains("wrong length"));  // REQ_PAGES_ID
  CHECK(refused(message(3, 13 + 256, {})).contains("wrong length"));
  CHECK(refused(message(1, 5, {})).contains("wrong length"));  // SHUT
  CHECK(refused(message(3, 14, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 2, 'a'})).contains("wrong length"));
  CHECK(refused(message(3, 13, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0})).contains("name is empty"));
  CHECK(refused(joined(message(1, 4, {0, 0, 0, 0}), message(4, 12, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0})))
            .starts_with("WHOLE parse: page request: message on the return path that is unknown"));
  CHECK(refused(message(1, 4, {0, 0, 0, 1})) == "GAVE UP ");
  CHECK(refused(message(4, 12, {1})) == "...");

  const auto checked = [](std::uint64_t start, std::uint32_t bytes, std::uint64_t block = 1 << 20) {
    return code_of(check_page_request({.start = start, .bytes = bytes}, block, 4096, "ram"));
  };
  CHECK(checked(0, 4096) == std::error_code{});
  CHECK(checked((1 << 20) - 4096, 4096) == std::error_code{});
  CHECK(checked(0, batch_bytes) == std::error_code{});
  CHECK(checked(1, 4096) == Errc::bad_page_request);
  CHECK(checked(0, 0) == Errc::bad_page_request);
  CHECK(checked(0, 4095) == Errc::bad_page_request);
  CHECK(checked(0, batch_bytes + 4096) == Errc::bad_page_request);
  CHECK(checked(0, 0xfffff000) == Errc::bad_page_request);
  CHECK(checked(1 << 20, 4096) == Errc::bad_page_request);
  CHECK(checked((1 << 20) - 4096, 8192) == Errc::bad_page_request);
  CHECK(checked(~std::uint64_t{4095}, 4096) == Errc::bad_page_request);  // start + bytes would wrap
  CHECK(checked(0, 8192, 4096) == Errc::bad_page_request);
}

TEST_CASE("Refused: an answer with other pages than were asked for (section 21.6)") {
  constexpr std::size_t page = 4096;
  std::vector<std::byte> bytes(header_bytes(page));
  const auto answer = [&](std::initializer_list<std::uint64_t> normal, std::initializer_list<std::uint64_t> zero,
                          std::uint32_t flags = 0) {
    PacketHeader header{.flags = flags,
                        .pages_alloc = 128,
                        .normal_pages = static_cast<std::uint32_t>(normal.size()),
                        .zero_pages = static_cast<std::uint32_t>(zero.size()),
                        .idstr = "ram"};
    std::size_t slot = 0;
    for (const auto offset : normal) store_offset(bytes.data(), slot++, offset * page);
    for (const auto offset : zero) store_offset(bytes.data(), slot++, offset * page);
    return code_of(check_page_answer(header, bytes.data(), "ram", 2 * page, 3 * page, page));
  };
  CHECK(answer({2, 3, 4}, {}) == std::error_code{});
  CHECK(answer({3}, {2, 4}) == std::error_code{});
  CHECK(answer({}, {2, 3, 4}) == std::error_code{});
  for (const auto& code : {answer({2, 3}, {}), answer({2, 3, 4, 5}, {}), answer({1, 2, 3}, {}), answer({3, 4, 5}, {}),
                           answer({3, 2, 4}, {}), answer({2, 2, 4}, {}), answer({2, 3}, {3}), answer({2, 3}, {5}),
                           answer({2}, {4, 3}), answer({}, {}), answer({2, 3, 4}, {}, flag_sync)})
    CHECK(code == Errc::unasked_pages);
}
