// SPDX-License-Identifier: MIT
#include "multifd/transport/path.hpp"

#include <doctest/doctest.h>

#include <ostream>
#include <string>
#include <string_view>

using namespace multifd;

namespace {

Path read(std::string_view text) {
  auto path = parse_path(text);
  REQUIRE_MESSAGE(path.has_value(), text << ": " << describe(path.error()));
  return *path;
}

const Address four{.host = "192.0.2.7", .port = 4444};

}  // namespace

TEST_CASE("A path is read with all of its parts") {
  CHECK(read("=tcp:192.0.2.7:4444") == Path{.remote = four});
  CHECK(read("192.0.2.1=tcp:192.0.2.7:4444") == Path{.local = "192.0.2.1", .remote = four});
  CHECK(read("192.0.2.1=tcp:192.0.2.7:4444,channels=12,cap=100M,mptcp") ==
        Path{.local = "192.0.2.1", .remote = four, .channels = 12, .bandwidth = 100u << 20, .mptcp = true});
  CHECK(read("dev:eth1=tcp:192.0.2.7:4444") == Path{.remote = four, .device = "eth1"});
  const Path six{.local = "2001:db8::1", .remote = {.host = "2001:db8::2", .port = 1}};
  CHECK(read("2001:db8::1=tcp:[2001:db8::2]:1") == six);
  CHECK(read("[2001:db8::1]=tcp:[2001:db8::2]:1") == six);
  CHECK(read("fe80::1%eth0=tcp:[fe80::2%eth0]:1").local == "fe80::1%eth0");
  CHECK(read("=unix:/tmp/a=b") == Path{.remote = {.kind = AddressKind::unix_socket, .path = "/tmp/a=b"}});
  CHECK(read("=tcp:destination:4444").remote.host == "destination");
  CHECK(read("192.0.2.1=tcp:destination:4444").remote.host == "destination");
}

TEST_CASE("A cap is read as the programs read sizes") {
  const auto cap = [](std::string_view text) { return read(std::string("=tcp:a:1,cap=").append(text)).bandwidth; };
  CHECK(cap("0") == 0);
  CHECK(cap("1") == 1);
  CHECK(cap("125000000") == 125'000'000);
  for (const char* text : {"4096", "4k", "4K", "4KiB", "4kb", "4KI", "4096B"}) CHECK(cap(text) == 4096);
  CHECK(cap("3k") == 3u << 10);
  CHECK(cap("3M") == 3u << 20);
  CHECK(cap("3g") == std::uint64_t{3} << 30);
  CHECK(cap("3T") == std::uint64_t{3} << 40);
  CHECK(cap("18446744073709551615") == ~std::uint64_t{0});
}

TEST_CASE("A path that is none is refused by the part that is wrong") {
  struct Case {
    std::string_view text;
    std::string_view subject;
    std::string_view says;
  };
  for (const auto& [text, subject, says] : {
           Case{"", "", "no ="},
           Case{"tcp:192.0.2.7:4444", "tcp:192.0.2.7:4444", "no ="},
           Case{"eth0=tcp:a:1", "eth0", "local address"},
           Case{"192.0.2.300=tcp:a:1", "192.0.2.300", "local address"},
           Case{"192.0.2=tcp:a:1", "192.0.2", "local address"},
           Case{"[]=tcp:a:1", "[]", "local address"},
           Case{"[192.0.2.1]=tcp:a:1", "[192.0.2.1]", "local address"},
           Case{"[::1=tcp:a:1", "[::1", "local address"},
           Case{"dev:=tcp:a:1", "dev:", "network interface"},
           Case{"dev:sixteen_letters_=tcp:a:1", "dev:sixteen_letters_", "network interface"},
           Case{"dev:a b=tcp:a:1", "dev:a b", "network interface"},
           Case{"=", "", "neither tcp: nor unix:"},
           Case{"=192.0.2.7:4444", "192.0.2.7:4444", "neither tcp: nor unix:"},
           Case{"=tcp:a", "tcp:a", "port is missing"},
           Case{"=tcp:a:0", "tcp:a:0", "port 0"},
           Case{"=tcp:a:1,", "", "unknown option"},
           Case{"=tcp:a:1,channel=2", "channel=2", "unknown option"},
           Case{"=tcp:a:1,mptcp=1", "mptcp=1", "unknown option"},
           Case{"=tcp:a:1,channels=0", "channels=0", "channels="},
           Case{"=tcp:a:1,channels=256", "channels=256", "channels="},
           Case{"=tcp:a:1,channels=-1", "channels=-1", "channels="},
           Case{"=tcp:a:1,channels=1x", "channels=1x", "channels="},
           Case{"=tcp:a:1,cap=", "cap=", "cap="},
           Case{"=tcp:a:1,cap=-1", "cap=-1", "cap="},
           Case{"=tcp:a:1,cap=1.5M", "cap=1.5M", "cap="},
           Case{"=tcp:a:1,cap=1MM", "cap=1MM", "cap="},
           Case{"=tcp:a:1,cap=1iB", "cap=1iB", "cap="},
           Case{"=tcp:a:1,cap=16E", "cap=16E", "cap="},
           Case{"=tcp:a:1,cap=1X", "cap=1X", "cap="},
           Case{"=tcp:a:1,cap=18446744073709551616", "cap=18446744073709551616", "cap="},
           Case{"=tcp:a:1,cap=16777216T", "cap=16777216T", "cap="},
           Case{"192.0.2.1=unix:/tmp/x", "unix:/tmp/x", "UNIX"},
           Case{"dev:eth0=unix:/tmp/x", "unix:/tmp/x", "UNIX"},
           Case{"=unix:/tmp/x,mptcp", "unix:/tmp/x", "UNIX"},
           Case{"192.0.2.1=tcp:[::1]:1", "tcp:[::1]:1", "different kinds"},
           Case{"::1=tcp:192.0.2.7:1", "tcp:192.0.2.7:1", "different kinds"},
       }) {
    CAPTURE(text);
    const auto path = parse_path(text);
    REQUIRE_FALSE(path.has_value());
    CHECK((path.error().code == Errc::bad_option || path.error().code == Errc::bad_address));
    CHECK(path.error().subject.view() == subject);
    CHECK_MESSAGE(std::string_view(path.error().op).contains(says), path.error().op);
  }
}

TEST_CASE("A path is written as it is read") {
  for (const char* text : {"=tcp:192.0.2.7:4444", "192.0.2.1=tcp:192.0.2.7:4444,channels=12,cap=100,mptcp",
                           "dev:eth1=tcp:a:1", "2001:db8::1=tcp:[2001:db8::2]:1,channels=255", "=unix:/tmp/x,cap=1"})
    CHECK(to_string(read(text)) == text);
  CHECK(subject_of(read("dev:eth1=tcp:a:1,channels=3")).view() == "dev:eth1=tcp:a:1");
}
