// SPDX-License-Identifier: MIT
//
// What the programs say when something fails: no word twice, and all that is needed to look for the cause.
#include "common/program.hpp"

#include <doctest/doctest.h>
#include <multifd/transport/connect.hpp>
#include <multifd/transport/listen.hpp>

#include <set>
#include <string>

using namespace program;
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
  multifd::Address free{.host = "127.0.0.1"};
  {
    const auto listener = need(multifd::Listener::listen(free, 1));
    free = listener.local_address();
    CHECK(message_of([&] { need(multifd::Listener::listen(free, 1), "listen on " + to_string(free)); }) ==
          "listen on " + to_string(free) + ": bind: Address already in use");
  }
  const std::string refused = "connect to " + to_string(free) + ": Connection refused";
  CHECK(message_of([&] { need(multifd::connect_to(free), "connect to " + to_string(free)); }) == refused);
  CHECK(message_of([&] { need(multifd::connect_channels(free, 2), "connect the channels"); }) ==
        "connect the channels: channel 0: Connection refused (" + to_string(free) + ")");
  const multifd::Address nowhere{.kind = multifd::AddressKind::unix_socket, .path = "/nowhere/socket"};
  CHECK(message_of([&] { need(multifd::connect_to(nowhere), "connect to unix:/nowhere/socket"); }) ==
        "connect to unix:/nowhere/socket: No such file or directory");
  CHECK(message_of([&] { need(multifd::Listener::listen(nowhere, 1), "listen on unix:/nowhere/socket"); }) ==
        "listen on unix:/nowhere/socket: bind: No such file or directory");
}
