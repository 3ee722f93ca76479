// SPDX-License-Identifier: MIT
#include "multifd/qemu/return_path.hpp"

#include "support/basics.hpp"
#include "unit/qemu/stream.hpp"

namespace qemu = multifd::qemu;
using multifd::Errc;
using test::Bytes;
using test::Stream;

namespace {

struct Heard {
  std::vector<std::pair<unsigned, std::uint32_t>> messages;
  Bytes bytes;
  std::error_code code;
  std::uint64_t detail = 0;
  bool shut = false;
};

Heard listen(const Bytes& bytes, std::size_t most) {
  qemu::ReturnPathParser parser;
  Heard heard;
  for (std::size_t at = 0;;) {
    const auto message = parser.next();
    if (!message) {
      heard.code = message.error().code;
      heard.detail = message.error().detail;
      CHECK(parser.room().empty());
      CHECK(test::code_of(parser.next()) == heard.code);
      break;
    }
    if (*message) {
      heard.messages.emplace_back((*message)->type, (*message)->value);
      heard.bytes.insert(heard.bytes.end(), (*message)->bytes.begin(), (*message)->bytes.end());
      continue;
    }
    if (at == bytes.size()) break;
    const auto room = parser.room();
    REQUIRE_FALSE(room.empty());
    const std::size_t n = std::min({most, room.size(), bytes.size() - at});
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), n, room.begin());
    parser.commit(n);
    at += n;
  }
  heard.shut = parser.shut();
  return heard;
}

Stream message(unsigned type, std::size_t length) { return Stream().be(2, type).be(2, length).append(Bytes(length)); }

void check_unheard(const Stream& stream, Errc code, std::uint64_t detail) {
  for (const std::size_t most : {std::size_t{1}, SIZE_MAX}) {
    const Heard heard = listen(stream.bytes, most);
    CHECK(heard.code == code);
    CHECK(heard.detail == detail);
  }
}

}  // namespace

TEST_CASE("Encoded messages are those of a real destination (format/main_stream.md section 9.8)") {
  CHECK(std::ranges::equal(qemu::encode_pong(1), Stream().be(4, 0x00020004).be(4, 1).bytes));
  CHECK(std::ranges::equal(qemu::encode_pong(0xdeadbeef), Stream().be(4, 0x00020004).be(4, 0xdeadbeef).bytes));
  CHECK(std::ranges::equal(qemu::encode_shut(0), Stream().be(8, 0x0001'0004'0000'0000).bytes));
  CHECK(std::ranges::equal(qemu::encode_shut(1), Stream().be(8, 0x0001'0004'0000'0001).bytes));
  CHECK(std::ranges::equal(qemu::encode_switchover_ack(), Stream().be(4, 0x00070000).bytes));
}

TEST_CASE("A destination's messages are parsed, and passed on unchanged, however they arrive") {
  Stream stream;
  stream.be(4, 0x00020004).be(4, 0xcafe0001).be(4, 0x00070000);
  for (unsigned i = 0; i < 300; ++i) stream.be(4, 0x00020004).be(4, i);
  stream.be(4, 0x00010004).be(4, 5);
  for (const std::size_t most : {std::size_t{1}, std::size_t{3}, std::size_t{9}, SIZE_MAX}) {
    CAPTURE(most);
    const Heard heard = listen(stream.bytes, most);
    CHECK(heard.code == std::error_code{});
    REQUIRE(heard.messages.size() == 303);
    CHECK(heard.messages.front() == std::pair{2u, 0xcafe0001u});
    CHECK(heard.messages[1] == std::pair{7u, 0u});
    CHECK(heard.messages[301] == std::pair{2u, 299u});
    CHECK(heard.messages.back() == std::pair{1u, 5u});
    CHECK(heard.bytes == stream.bytes);
    CHECK(heard.shut);
  }
}

TEST_CASE("A message that is not whole is not one yet") {
  const Stream stream = message(1, 4);
  for (std::size_t size = 0; size < stream.bytes.size(); ++size) {
    const Heard heard =
        listen(Bytes(stream.bytes.begin(), stream.bytes.begin() + static_cast<std::ptrdiff_t>(size)), 1);
    CHECK(heard.messages.empty());
    CHECK(heard.code == std::error_code{});
    CHECK_FALSE(heard.shut);
  }
}

TEST_CASE("Refused: wrong lengths, unknown types, postcopy's messages, anything after SHUT") {
  for (const unsigned length : {0u, 3u, 5u, 512u}) check_unheard(message(1, length), Errc::bad_return_length, length);
  check_unheard(message(2, 8), Errc::bad_return_length, 8);
  check_unheard(message(7, 4), Errc::bad_return_length, 4);
  check_unheard(message(2, 513), Errc::bad_return_length, 513);
  check_unheard(Stream().be(2, 99).be(2, 0xffff), Errc::bad_return_length, 0xffff);
  check_unheard(message(0, 0), Errc::unknown_return_message, 0);
  check_unheard(message(8, 4), Errc::unknown_return_message, 8);
  check_unheard(message(0xffff, 512), Errc::unknown_return_message, 0xffff);
  check_unheard(message(3, 20), Errc::postcopy_refused, 3);
  check_unheard(message(4, 12), Errc::postcopy_refused, 4);
  check_unheard(message(5, 7), Errc::postcopy_refused, 5);
  check_unheard(message(6, 4), Errc::postcopy_refused, 6);
  check_unheard(message(1, 4).append(message(2, 4).bytes), Errc::unknown_return_message, 2);
}

TEST_CASE("Random return paths neither crash nor loop") {
  test::Rng rng(test::seed());
  for (int round = 0; round < 5000; ++round) {
    Stream stream;
    for (std::size_t left = test::below(rng, 40); left > 0; --left) {
      if (rng() % 4 != 0) {
        stream.append(message(rng() % 8 == 0 ? static_cast<unsigned>(rng() % 9) : 2, 4).bytes);
      } else {
        stream.be(1, rng() % 8);
      }
    }
    const Heard whole = listen(stream.bytes, SIZE_MAX);
    const Heard split = listen(stream.bytes, 1 + rng() % 7);
    CHECK(split.messages == whole.messages);
    CHECK(split.code == whole.code);
  }
}
