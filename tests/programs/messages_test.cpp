// SPDX-License-Identifier: MIT
//
// What the programs say when something fails: no word twice, and all that is needed to look for the cause.
#include "common/control.hpp"

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <multifd/transport/connect.hpp>
#include <multifd/transport/listen.hpp>

#include <set>
#include <string>

using namespace program;
using namespace std::chrono_literals;
using multifd::Errc;
using multifd::Stage;

namespace {

/// The word that more than one part of a message begins with; empty: none does.
std::string word_said_twice(std::string_view text) {
  std::set<std::string> words;
  while (!text.empty()) {
    const std::size_t end = std::min(text.size(), text.find(": "));
    const std::string_view part = text.substr(0, end);
    if (!words.emplace(part.substr(0, part.find(' '))).second) return std::string(part);
    text.remove_prefix(std::min(text.size(), end + 2));
  }
  return {};
}

std::string message_of(const std::function<void()>& fails) {
  try {
    fails();
  } catch (const Failure& failure) {
    return failure.what();
  }
  return {};
}

}  // namespace

TEST_CASE("No part of a message begins with the word of another, whatever fails in whatever context") {
  const auto refused = std::error_code(ECONNREFUSED, std::system_category());
  unsigned tried = 0;
  for (const Stage stage : {Stage::none, Stage::setup, Stage::connect, Stage::accept, Stage::read, Stage::write})
    for (const char* op :
         {"", "connect", "bind", "listen", "accept", "open", "read", "write", "lock", "read the hello"})
      for (const char* context :
           {"", "connect to tcp:192.0.2.7:4444", "connect the channels", "listen on unix:/tmp/socket",
            "accept a source", "open /tmp/file", "read /tmp/file", "write /tmp/file", "lock /tmp/file",
            "bind unix:/tmp/socket", "destination: connect to tcp:192.0.2.7:4444"}) {
        const std::string text = Failure(multifd::Error{.code = refused, .stage = stage, .op = op}, context).what();
        CAPTURE(text);
        CHECK(word_said_twice(text).empty());
        CHECK(text.contains(context));
        CHECK(text.ends_with("Connection refused"));
        if (std::string_view(op) == "read the hello") CHECK(text.contains("the hello"));
        ++tried;
      }
  CHECK(tried == 660);
}

TEST_CASE("Errors of real calls name each step with one word") {
  const multifd::Interrupt interrupt = need(multifd::Interrupt::create());
  multifd::Address free{.host = "127.0.0.1"};
  {
    const auto listener = need(multifd::Listener::listen(free, 1));
    free = listener.local_address();
    CHECK(message_of([&] { need(multifd::Listener::listen(free, 1), "listen on " + to_string(free)); }) ==
          "listen on " + to_string(free) + ": bind: Address already in use");
  }
  const std::string refused = "connect to " + to_string(free) + ": Connection refused";
  CHECK(message_of([&] { Control::connect(free, interrupt); }) == refused);
  CHECK(message_of([&] { need(multifd::connect_channels(free, 2), "connect the channels"); }) ==
        "connect the channels: channel 0: Connection refused (" + to_string(free) + ")");
  const multifd::Address nowhere{.kind = multifd::AddressKind::unix_socket, .path = "/nowhere/socket"};
  CHECK(message_of([&] { Control::connect(nowhere, interrupt); }) ==
        "connect to unix:/nowhere/socket: No such file or directory");
  CHECK(message_of([&] { need(multifd::Listener::listen(nowhere, 1), "listen on unix:/nowhere/socket"); }) ==
        "listen on unix:/nowhere/socket: bind: No such file or directory");
}

TEST_CASE("A main connection on which nothing moves: the message has the limit, and the option that sets it") {
  const multifd::Interrupt interrupt = need(multifd::Interrupt::create());
  auto listener = need(multifd::Listener::listen({.host = "127.0.0.1"}, 1));
  TimeLimits limits;
  limits.progress = 20ms;
  limits.result = 30ms;
  Control control = Control::connect(listener.local_address(), interrupt, limits);
  auto other = need(listener.accept(10s));
  CHECK(message_of([&] { control.receive(small_message, limits.result_limit()); }) ==
        "main connection: the other side is silent for 0.03 s (--result-timeout): time limit passed");
  SUBCASE("in a message") {
    const std::byte header[] = {std::byte{6}, {}, {}, {}, std::byte{7}};  // and none of its 7 bytes
    need(multifd::write_all(other, header));
    CHECK(message_of([&] { control.receive(small_message, limits.result_limit()); }) ==
          "main connection: the other side is silent for 0.02 s (--progress-timeout): time limit passed");
  }
  SUBCASE("what is written") {
    const std::vector<std::byte> much(1 << 20);
    CHECK(message_of([&] {
            for (;;) control.send(MessageType::state, much);
          }) == "main connection: the other side takes nothing for 0.02 s (--progress-timeout): time limit passed");
  }
}

TEST_CASE("A zero run that does not fit is reported with its block and its offset") {
  std::vector<std::byte> memory(8 * 4096);
  multifd::RamMap map(4096);
  const auto block = need(map.add("pc.ram", memory));
  const auto message = [](std::initializer_list<std::uint64_t> numbers) {
    Message made{.type = MessageType::zero_runs, .payload = std::vector<std::byte>(8 * numbers.size())};
    for (std::size_t i = 0; const std::uint64_t number : numbers)
      multifd::wire::store_be(&made.payload[8 * i++], number);
    return made;
  };
  const auto apply = [&](std::initializer_list<std::uint64_t> numbers) {
    return message_of([&] {
      (void)apply_zero_runs(message(numbers), map, block, [&](std::uint64_t offset) -> multifd::Result<void> {
        const auto page = map.resolve(block, offset);  // what a receiver checks
        return page ? multifd::Result<void>{} : std::unexpected(page.error());
      });
    });
  };
  CHECK(apply({0, 4096, 8192, 4096}).empty());
  const std::string begins = "main connection: zero pages at offset ",
                    block_text = " of RAM block pc.ram (32768 bytes): ";
  CHECK(apply({0, 65536}) == begins + "0" + block_text + "65536 bytes, more than the block");
  CHECK(apply({28672, 8192}).starts_with(begins + "32768" + block_text));
  CHECK(apply({4097, 4096}).starts_with(begins + "4097" + block_text));
  CHECK(apply({8192, 4096, 4096, 4096}) ==
        begins + "4096" + block_text + "behind a run that ends at 12288: runs ascend");
  CHECK(apply({~std::uint64_t{0} - 4095, 8192}).starts_with(begins + "18446744073709547520" + block_text));
  CHECK(apply({0, 32768, 32768, 1}).starts_with(begins + "32768" + block_text));
}
