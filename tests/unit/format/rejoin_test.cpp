// SPDX-License-Identifier: MIT
//
// How connections that return begin, and EPOCH_WHOLE, against the tables and vectors of format/extension.md section
// 19.10: each field's place, and each value that is refused, by its name.
#include "multifd/format/rejoin.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <ostream>  // lets doctest print a std::error_code
#include <span>
#include <string_view>
#include <utility>

#include "support/format_vector.hpp"
#include "unit/format/raw_bytes.hpp"

namespace wire = multifd::wire;
using multifd::Errc;
using wire::EpochWhole;
using wire::Rejoin;
using wire::RejoinAnswer;
using wire::RejoinRole;
using wire::RejoinVerdict;

namespace {

multifd::Uuid session_from(unsigned first) {
  multifd::Uuid session;
  for (std::size_t i = 0; i < session.size(); ++i) session[i] = static_cast<std::byte>(first + i);
  return session;
}

Bytes vector(const char* name) { return test::format_vector("extension.md", name); }

multifd::Result<Rejoin> parse(const Bytes& bytes) {
  REQUIRE(bytes.size() >= wire::rejoin_bytes);
  return wire::parse_rejoin(std::span(bytes).first<wire::rejoin_bytes>());
}

multifd::Result<RejoinAnswer> parse_answer(const Bytes& bytes) {
  REQUIRE(bytes.size() >= wire::rejoin_answer_bytes);
  return wire::parse_rejoin_answer(std::span(bytes).first<wire::rejoin_answer_bytes>());
}

/// What a parser says of `good` with one field changed.
template <class Parse>
void check_refused(Parse&& parse, Bytes good, std::size_t offset, std::size_t size, std::uint64_t value,
                   std::string_view name, std::string_view message) {
  CAPTURE(name);
  CAPTURE(value);
  REQUIRE(parse(good).has_value());
  put(good, offset, size, value);
  const auto parsed = parse(good);
  REQUIRE_FALSE(parsed.has_value());
  CHECK(parsed.error().code == Errc::bad_extension_message);
  CHECK(parsed.error().code == multifd::Condition::peer_protocol);
  CHECK(parsed.error().stage == multifd::Stage::parse);
  CHECK(parsed.error().op == name);
  CHECK(parsed.error().detail == value);
  CHECK(parsed.error().subject.view() == message);
  CHECK(multifd::describe(parsed.error()).contains(name));
}

}  // namespace

TEST_CASE("REJOIN survives the round trip, byte for byte as the table has it") {
  const auto check = [](const Rejoin& rejoin, const Bytes& expected) {
    CHECK(std::ranges::equal(wire::encode_rejoin(rejoin).view(), expected));
    const auto parsed = parse(expected);
    REQUIRE(parsed.has_value());
    CHECK(*parsed == rejoin);
  };
  Bytes expected(40);
  put_text(expected, 0, "mfrj");
  put32(expected, 8, 0x01020304);
  std::ranges::copy(session_from(0x10), expected.begin() + 12);
  put64(expected, 28, 0x1122334455667788);
  check({.role = RejoinRole::main,
         .channel = 0,
         .generation = 0x01020304,
         .session = session_from(0x10),
         .received = 0x1122334455667788},
        expected);
  put(expected, 4, 1, 1);
  put(expected, 5, 1, 0xfe);
  put32(expected, 8, 0xffffffff);
  put64(expected, 28, 0);
  check({.role = RejoinRole::channel, .channel = 254, .generation = 0xffffffff, .session = session_from(0x10)},
        expected);
  // No session is refused here: whose it is, only a migration knows.
  std::fill_n(expected.begin() + 12, 16, std::byte{});
  CHECK(parse(expected)->session == multifd::Uuid{});
}

TEST_CASE("REJOIN and its answers are the vectors of section 19.10") {
  const Rejoin main{.role = RejoinRole::main, .generation = 1, .session = session_from(0xa0), .received = 110};
  CHECK(std::ranges::equal(wire::encode_rejoin(main).view(), vector("rejoin_main")));
  CHECK(parse(vector("rejoin_main")) == main);
  const RejoinAnswer main_answer{.verdict = RejoinVerdict::joined, .generation = 1, .received = 4294967860};
  CHECK(std::ranges::equal(wire::encode_rejoin_answer(main_answer).view(), vector("rejoin_main_answer")));
  CHECK(parse_answer(vector("rejoin_main_answer")) == main_answer);

  const Rejoin channel{.role = RejoinRole::channel, .channel = 2, .generation = 3, .session = session_from(0xa0)};
  Bytes with_epoch(wire::rejoin_bytes + wire::rejoin_epoch_bytes);
  std::ranges::copy(wire::encode_rejoin(channel).view(), with_epoch.begin());
  put64(with_epoch, wire::rejoin_bytes, 7);
  CHECK(with_epoch == vector("rejoin_channel"));
  CHECK(parse(vector("rejoin_channel")) == channel);
  const RejoinAnswer channel_answer{.verdict = RejoinVerdict::joined, .generation = 3};
  CHECK(std::ranges::equal(wire::encode_rejoin_answer(channel_answer).view(), vector("rejoin_channel_answer")));
  CHECK(parse_answer(vector("rejoin_channel_answer")) == channel_answer);

  const RejoinAnswer refused{.verdict = RejoinVerdict::unknown_session, .generation = 3};
  CHECK(std::ranges::equal(wire::encode_rejoin_answer(refused).view(), vector("rejoin_refused")));
  CHECK(parse_answer(vector("rejoin_refused")) == refused);
}

TEST_CASE("Refused: values of REJOIN out of their bounds, by name") {
  const Bytes main = vector("rejoin_main");
  const Bytes channel = vector("rejoin_channel");
  const auto check = [](const Bytes& good, std::size_t offset, std::size_t size, std::uint64_t value,
                        std::string_view name) { check_refused(parse, good, offset, size, value, name, "REJOIN"); };
  for (const Bytes& good : {main, channel}) {
    // What other connections begin with: a channel, a main connection, a page connection, another letter.
    for (const std::uint32_t first : {0x11223344u, 0x5145564du, 0x6d667067u, 0x6d66726bu, 0u})
      check(good, 0, 4, first, "magic");
    for (const unsigned role : {2u, 255u}) check(good, 4, 1, role, "role");
    for (const unsigned reserved : {1u, 0x8000u}) check(good, 6, 2, reserved, "reserved field");
    check(good, 8, 4, 0, "generation");
    for (const std::uint32_t reserved : {1u, 0x80000000u}) check(good, 36, 4, reserved, "reserved field");
  }
  for (const unsigned id : {1u, 255u}) check(main, 5, 1, id, "channel of the main connection");
  for (const std::uint64_t received : {std::uint64_t{1}, std::uint64_t{1} << 63})
    check(channel, 28, 8, received, "bytes that a channel has received");
}

TEST_CASE("REJOIN's answer survives the round trip, byte for byte as the table has it; each verdict has its name") {
  constexpr std::array verdicts{
      std::pair(RejoinVerdict::joined, "joined"), std::pair(RejoinVerdict::unknown_session, "unknown session"),
      std::pair(RejoinVerdict::stale_generation, "stale generation"),
      std::pair(RejoinVerdict::unknown_channel, "unknown channel"), std::pair(RejoinVerdict::over, "over")};
  static_assert(verdicts.size() == wire::last_rejoin_verdict);
  unsigned number = 0;
  for (const auto& [verdict, name] : verdicts) {
    CAPTURE(name);
    Bytes expected(24);
    put_text(expected, 0, "mfrj");
    put(expected, 4, 1, ++number);
    put32(expected, 8, 0x01020304);
    put64(expected, 16, 0x1122334455667788);
    const RejoinAnswer answer{.verdict = verdict, .generation = 0x01020304, .received = 0x1122334455667788};
    CHECK(std::ranges::equal(wire::encode_rejoin_answer(answer).view(), expected));
    const auto parsed = parse_answer(expected);
    REQUIRE(parsed.has_value());
    CHECK(*parsed == answer);
    CHECK(wire::to_string(verdict) == name);
  }
}

TEST_CASE("Refused: values of REJOIN's answer out of their bounds, by name") {
  const auto check = [](std::size_t offset, std::size_t size, std::uint64_t value, std::string_view name) {
    check_refused(parse_answer, vector("rejoin_main_answer"), offset, size, value, name, "answer to REJOIN");
  };
  for (const std::uint32_t first : {0x11223344u, 0x5145564du, 0x6d66727au, 0u}) check(0, 4, first, "magic");
  for (const unsigned verdict : {0u, 6u, 255u}) check(4, 1, verdict, "verdict");
  for (const unsigned reserved : {1u, 0x80u}) check(5, 1, reserved, "reserved field");
  for (const unsigned reserved : {1u, 0x8000u}) check(6, 2, reserved, "reserved field");
  for (const std::uint32_t reserved : {1u, 0x80000000u}) check(12, 4, reserved, "reserved field");
  // Reserved bytes do not make up for each other.
  Bytes wrap = vector("rejoin_main_answer");
  put(wrap, 5, 1, 1);
  put32(wrap, 12, 0xffffffff);
  CHECK(parse_answer(wrap).error().op == std::string_view("reserved field"));
}

TEST_CASE("EPOCH_WHOLE says which channels have arrived, byte for byte as the table has it") {
  EpochWhole whole{.epoch = 0x0102030405060708, .received = 0x1112131415161718};
  for (const unsigned channel : {0u, 9u, 127u, 254u}) whole.add(channel);
  Bytes expected(50);
  put(expected, 0, 2, 5);
  put64(expected, 2, 0x0102030405060708);
  put64(expected, 10, 0x1112131415161718);
  put(expected, 18, 1, 0x01);
  put(expected, 19, 1, 0x02);
  put(expected, 18 + 15, 1, 0x80);
  put(expected, 18 + 31, 1, 0x40);
  CHECK(std::ranges::equal(wire::encode_epoch_whole(whole).view(), expected));
  const auto message = wire::parse_extension(expected, wire::Towards::source);
  REQUIRE(message.has_value());
  CHECK(message->kind == wire::ExtensionKind::epoch_whole);
  CHECK(message->number == whole.epoch);
  CHECK(wire::parse_epoch_whole(*message) == whole);
  for (unsigned channel = 0; channel < 256; ++channel) {
    CAPTURE(channel);
    CHECK(wire::parse_epoch_whole(*message).has(channel) ==
          (channel == 0 || channel == 9 || channel == 127 || channel == 254));
  }
  // A destination says it to a source, and never the other way round.
  CHECK(wire::parse_extension(expected, wire::Towards::destination).error().code == Errc::unexpected_extension_message);
}
