// SPDX-License-Identifier: MIT
#include "multifd/error.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <set>
#include <string>
#include <type_traits>

#include "multifd/error_value.hpp"

using multifd::Condition;
using multifd::Errc;
using multifd::Error;
using multifd::Stage;

namespace {

constexpr int first_errc = static_cast<int>(Errc::bad_magic);
constexpr int last_errc = static_cast<int>(Errc::session_lost);
constexpr const char* text_of_unknown = "unknown multifd error";

std::error_code from_errno(int value) { return {value, std::system_category()}; }

}  // namespace

// Workers copy errors across threads and into a slot that is written once: no allocation may hide in one.
static_assert(std::is_nothrow_copy_constructible_v<Error> && std::is_trivially_destructible_v<Error>);

TEST_CASE("Every Errc has a text of its own") {
  std::set<std::string> texts;
  for (int value = first_errc; value <= last_errc; ++value) {
    CAPTURE(value);
    const std::string text = std::error_code(static_cast<Errc>(value)).message();
    CHECK(text != text_of_unknown);
    CHECK_FALSE(text.empty());
    CHECK_MESSAGE(texts.insert(text).second, "same text twice: ", text);
  }
}

TEST_CASE("session_lost is the last Errc, so the loops of this file see all of them") {
  CHECK(multifd::category().message(first_errc - 1) == text_of_unknown);
  CHECK(multifd::category().message(last_errc + 1) == text_of_unknown);
}

TEST_CASE("Every Errc belongs to the condition of its group, and to no other") {
  constexpr Condition all[] = {Condition::peer_protocol, Condition::peer_gone, Condition::timed_out,
                               Condition::cancelled,     Condition::misuse,    Condition::local_io,
                               Condition::bad_file};
  for (int value = first_errc; value <= last_errc; ++value) {
    CAPTURE(value);
    const auto code = static_cast<Errc>(value);
    const Condition expected = code < Errc::peer_closed                                    ? Condition::peer_protocol
                               : code <= Errc::tls_truncated                               ? Condition::peer_gone
                               : code == Errc::timed_out || code == Errc::did_not_converge ? Condition::timed_out
                               : code == Errc::cancelled                                   ? Condition::cancelled
                               : code <= Errc::already_closed                              ? Condition::misuse
                               : code <= Errc::unclear_addresses                           ? Condition::bad_file
                               : code <= Errc::bad_region                                  ? Condition::misuse
                               : code <= Errc::wrong_session                               ? Condition::peer_protocol
                               : code == Errc::bad_prefetch_list                           ? Condition::bad_file
                                                                                           : Condition::peer_gone;
    const std::error_code as_error_code = code;
    CHECK(multifd::condition_of(as_error_code) == expected);
    for (const Condition condition : all) CHECK((as_error_code == condition) == (condition == expected));
  }
}

TEST_CASE("errno codes compare with conditions") {
  for (const int value : {EPIPE, ECONNRESET, ECONNABORTED, ENOTCONN, ECONNREFUSED, EHOSTUNREACH, ENETUNREACH}) {
    CAPTURE(value);
    CHECK(from_errno(value) == Condition::peer_gone);
    CHECK(from_errno(value) != Condition::local_io);
  }
  CHECK(from_errno(ETIMEDOUT) == Condition::timed_out);
  CHECK(from_errno(ECANCELED) == Condition::cancelled);
  for (const int value : {ENOMEM, EBADF, EACCES, EMFILE, EINVAL}) {
    CAPTURE(value);
    CHECK(from_errno(value) == Condition::local_io);
    CHECK(from_errno(value) != Condition::peer_gone);
  }
}

TEST_CASE("Codes of ours and of the operating system are never equal, even with equal values") {
  const std::error_code ours = Errc::bad_magic;
  CHECK(ours == Errc::bad_magic);
  CHECK(ours != Errc::bad_version);
  CHECK(ours != from_errno(ours.value()));
  CHECK(std::string(ours.category().name()) == "multifd");
}

TEST_CASE("Every condition has a text, and so has a value that is none") {
  std::set<std::string> texts;
  for (int value = 1; value <= static_cast<int>(Condition::local_io); ++value)
    texts.insert(std::error_condition(static_cast<Condition>(value)).message());
  CHECK(texts.size() == 6);
  CHECK_FALSE(texts.contains("unknown"));
  CHECK(multifd::condition_category().message(99) == "unknown");
  CHECK(std::string(multifd::condition_category().name()) == "multifd condition");
}

TEST_CASE("Every stage has a name of its own") {
  std::set<std::string> names;
  for (int value = 0; value <= static_cast<int>(Stage::close); ++value)
    names.insert(multifd::to_string(static_cast<Stage>(value)));
  CHECK(names.size() == static_cast<std::size_t>(Stage::close) + 1);
  CHECK(std::string(multifd::to_string(Stage::none)) == "none");
  CHECK(std::string(multifd::to_string(Stage::zero_check)) == "zero check");
  CHECK(std::string(multifd::to_string(Stage::close)) == "close");
}

TEST_CASE("describe() writes channel, packet, stage, operation, text and value in one line") {
  const Error error{.code = Errc::offset_misaligned,
                    .stage = Stage::parse,
                    .op = "offset",
                    .detail = 4097,
                    .channel = 2,
                    .packet = 17};
  CHECK(multifd::describe(error) ==
        "channel 2, packet 17: parse: offset: page offset is not a multiple of the page size (offset 4097)");
}

TEST_CASE("describe() leaves out what an error does not say") {
  CHECK(multifd::describe({.code = Errc::cancelled}) == "cancelled");
  CHECK(multifd::describe({.code = Errc::cancelled, .channel = 0}) == "channel 0: cancelled");
  CHECK(multifd::describe({.code = Errc::cancelled, .packet = 0}) == "packet 0: cancelled");
  CHECK(multifd::describe({.code = Errc::cancelled, .stage = Stage::sync}) == "sync: cancelled");
  CHECK(multifd::describe({.code = Errc::cancelled, .op = "barrier"}) == "barrier: cancelled");
  CHECK(multifd::describe({.code = Errc::bad_page_size, .stage = Stage::setup, .detail = 1000}) ==
        "setup: page size is not a power of two from 1024 to 65536 (value 1000)");
}

TEST_CASE("describe() uses the operating system's words for an errno") {
  const std::string text =
      multifd::describe({.code = from_errno(ECONNREFUSED), .stage = Stage::connect, .op = "connect"});
  CHECK(text == "connect: " + from_errno(ECONNREFUSED).message());
}

TEST_CASE("describe() does not say a stage and an operation that begins with its word") {
  const auto place = [](Stage stage, const char* op) {
    return multifd::describe({.code = Errc::cancelled, .stage = stage, .op = op});
  };
  CHECK(place(Stage::read, "read") == "read: cancelled");
  CHECK(place(Stage::read, "read the header") == "read the header: cancelled");
  CHECK(place(Stage::read, "ready") == "read: ready: cancelled");
  CHECK(place(Stage::none, "read") == "read: cancelled");
  CHECK(place(Stage::read, "") == "read: cancelled");
  CHECK(place(Stage::zero_check, "zero check") == "zero check: cancelled");
}

TEST_CASE("describe() names what an error is about, and both of two values that differ") {
  Error error{.code = Errc::page_size_mismatch, .stage = Stage::parse, .detail = 1024, .expected = 4096};
  CHECK(multifd::describe(error) ==
        "parse: guest's page size differs between the two sides: set the source's "
        "(page size of the peer 1024, of this side 4096)");
  error = {.code = Errc::bad_range, .detail = 8192, .subject = std::string_view("pc.ram")};
  CHECK(multifd::describe(error).ends_with(" (pc.ram, at 8192)"));
  error = {.code = Errc::duplicate_page, .detail = 0, .expected = 8192, .subject = std::string_view("pc.ram")};
  CHECK(multifd::describe(error) == "the same page twice in one packet (pc.ram, offset 0, of 8192)");
  error = {.code = from_errno(EADDRINUSE), .op = "bind", .subject = std::string_view("tcp:192.0.2.7:4444")};
  CHECK(multifd::describe(error) == "bind: " + from_errno(EADDRINUSE).message() + " (tcp:192.0.2.7:4444)");
}

TEST_CASE("A subject is cut where it is too long, and shows no control characters") {
  CHECK(multifd::Subject().view().empty());
  CHECK(multifd::Subject(std::string(63, 'x')).view() == std::string(63, 'x'));
  CHECK(multifd::Subject(std::string(64, 'x')).view() == std::string(60, 'x') + "...");
  CHECK(multifd::Subject(std::string(255, 'x')).view() == std::string(60, 'x') + "...");
  CHECK(multifd::describe({.code = Errc::cancelled, .subject = std::string_view("a\x1b[2J\xff\n")}) ==
        "cancelled (a\\x1b[2J\\xff\\x0a)");
}
