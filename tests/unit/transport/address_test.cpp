// SPDX-License-Identifier: MIT
#include "multifd/transport/address.hpp"

#include <doctest/doctest.h>

#include <ostream>
#include <string>
#include <utility>

using multifd::Address;
using multifd::AddressKind;
using multifd::Errc;
using multifd::parse_address;

namespace {
Address tcp(std::string host, std::uint16_t port) {
  return {.kind = AddressKind::tcp, .host = std::move(host), .port = port};
}
Address local(std::string path) { return {.kind = AddressKind::unix_socket, .path = std::move(path)}; }
}  // namespace

TEST_CASE("parse_address reads what to_string writes") {
  const std::pair<std::string, Address> rows[] = {
      {"tcp:127.0.0.1:4444", tcp("127.0.0.1", 4444)},
      {"tcp::4444", tcp("", 4444)},
      {"tcp::0", tcp("", 0)},
      {"tcp:host.example:65535", tcp("host.example", 65535)},
      {"tcp:[::1]:80", tcp("::1", 80)},
      {"tcp:[::]:0", tcp("::", 0)},
      {"tcp:[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)},
      {"tcp:[::ffff:127.0.0.1]:1", tcp("::ffff:127.0.0.1", 1)},
      {"unix:/run/multifd.sock", local("/run/multifd.sock")},
      {"unix:relative", local("relative")},
      {"unix:/with:colon and blank", local("/with:colon and blank")},
      {"unix:" + std::string(multifd::max_unix_path, 'x'), local(std::string(multifd::max_unix_path, 'x'))},
  };
  for (const auto& [text, address] : rows) {
    CAPTURE(text);
    const auto parsed = parse_address(text);
    REQUIRE(parsed.has_value());
    CHECK(*parsed == address);
    CHECK(to_string(*parsed) == text);
  }
}

TEST_CASE("parse_address refuses what is no address, and says which part") {
  using namespace std::string_literals;
  const std::pair<std::string, std::string> rows[] = {
      {"", "neither"},
      {"4444", "neither"},
      {"127.0.0.1:4444", "neither"},
      {"TCP:127.0.0.1:1", "neither"},
      {"tcp", "neither"},
      {"unix", "neither"},
      {"fd:3", "neither"},
      {"tcp:", "port is missing"},
      {"tcp:host", "port is missing"},
      {"tcp:[::1]", "port is missing"},
      {"tcp:[::1]80", "port is missing"},
      {"tcp:host:", "not a number"},
      {"tcp:host:x", "not a number"},
      {"tcp:host:80x", "not a number"},
      {"tcp:host: 80", "not a number"},
      {"tcp:host:-1", "not a number"},
      {"tcp:host:+1", "not a number"},
      {"tcp:host:65536", "not a number"},
      {"tcp:host:99999999999999999999", "not a number"},
      {"tcp:::1:80", "[ ]"},
      {"tcp:fe80::1:80", "[ ]"},
      {"tcp:[::1:80", "without"},
      {"tcp:[]:80", "no IPv6"},
      {"tcp:[host]:80", "no IPv6"},
      {"tcp:[127.0.0.1]:80", "no IPv6"},
      {"tcp:[fe80::1%]:80", "no IPv6"},
      {"tcp:[fe80::1%a b]:80", "character"},
      {"tcp:a b:80", "character"},
      {"tcp:a\0b:80"s, "character"},
      {"tcp:a\n:80", "character"},
      {"tcp:a]:80", "character"},
      {"tcp:" + std::string(256, 'h') + ":80", "too long"},
      {"unix:", "empty"},
      {"unix:a\0b"s, "NUL"},
      {"unix:" + std::string(multifd::max_unix_path + 1, 'x'), "too long"},
  };
  for (const auto& [text, reason] : rows) {
    CAPTURE(text);
    const auto parsed = parse_address(text);
    REQUIRE_FALSE(parsed.has_value());
    CHECK(parsed.error().code == Errc::bad_address);
    CHECK(parsed.error().code == multifd::Condition::misuse);
    CHECK_MESSAGE(std::string(parsed.error().op).find(reason) != std::string::npos, parsed.error().op);
  }
}

TEST_CASE("is_local knows the addresses that stay on this machine") {
  for (const char* text : {"unix:/x", "tcp:localhost:1", "tcp:127.0.0.1:1", "tcp:127.9.8.7:1", "tcp:[::1]:1",
                           "tcp:[::ffff:127.0.0.1]:1"}) {
    CAPTURE(text);
    CHECK(is_local(*parse_address(text)));
  }
  for (const char* text : {"tcp::1", "tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:128.0.0.1:1", "tcp:[fe80::1]:1",
                           "tcp:[::ffff:10.0.0.1]:1", "tcp:host.example:1", "tcp:127.0.0.1.example:1"}) {
    CAPTURE(text);
    CHECK_FALSE(is_local(*parse_address(text)));
  }
}
