// SPDX-License-Identifier: MIT
#include "multifd/transport/connect_paths.hpp"

#include <doctest/doctest.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/listen.hpp"
#include "support/basics.hpp"
#include "support/closed_port.hpp"
#include "support/skip.hpp"

using namespace multifd;
using namespace std::chrono_literals;

namespace {

using test::ClosedPort;

Listener listen_at(const std::string& host, const SocketOptions& options = {}) {
  auto listener = Listener::listen({.host = host}, max_channels + 1, options);
  REQUIRE_MESSAGE(listener.has_value(), describe(listener.error()));
  return std::move(*listener);
}

Path path_to(const Listener& listener, std::string local = {}, unsigned channels = 1) {
  return {.local = std::move(local), .remote = listener.local_address(), .channels = channels};
}

Path refused_path(const ClosedPort& closed, unsigned channels = 1) {
  return {.remote = {.host = "127.0.0.1", .port = closed.port}, .channels = channels};
}

std::string source_of(const FdTransport& link) {
  sockaddr_in address{};
  socklen_t size = sizeof address;
  REQUIRE(::getsockname(link.native_handle(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
  char text[INET_ADDRSTRLEN];
  REQUIRE(::inet_ntop(AF_INET, &address.sin_addr, text, sizeof text) != nullptr);
  return text;
}

std::vector<std::size_t> order(const ConnectedPaths& connected) {
  std::vector<std::size_t> paths;
  for (const PathLink& each : connected.links) paths.push_back(each.path);
  return paths;
}

using Order = std::vector<std::size_t>;

}  // namespace

TEST_CASE("The channels of several paths connect from their addresses, and take turns") {
  const Listener listener = listen_at("127.0.0.1");
  const Listener other = listen_at("127.0.0.1");
  const Path paths[] = {path_to(listener, "127.0.0.2", 3), path_to(other, "127.0.0.3"), path_to(listener, "", 2)};
  const auto connected = connect_paths(paths);
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  CHECK(connected->left_out.empty());
  CHECK(order(*connected) == Order{0, 1, 2, 0, 2, 0});
  for (const PathLink& each : connected->links)
    CHECK(source_of(each.link) == (each.path == 0 ? "127.0.0.2" : each.path == 1 ? "127.0.0.3" : "127.0.0.1"));
}

TEST_CASE("A path that is refused is left out, with its error") {
  const Listener listener = listen_at("127.0.0.1");
  const ClosedPort closed;
  const Path paths[] = {refused_path(closed, 2), path_to(listener, "127.0.0.2", 2)};
  const auto connected = connect_paths(paths);
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  CHECK(order(*connected) == Order{1, 1});
  REQUIRE(connected->left_out.size() == 1);
  CHECK(connected->left_out[0].path == 0);
  CHECK(connected->left_out[0].error.code == std::errc::connection_refused);
  CHECK(connected->left_out[0].error.subject.view() == subject_of(paths[0]).view());
}

TEST_CASE("The channels of a path that is left out go over the others for a destination that counts them") {
  const Listener listener = listen_at("127.0.0.1");
  const Listener other = listen_at("127.0.0.1");
  const ClosedPort closed;
  const Path paths[] = {path_to(listener), refused_path(closed, 3), path_to(other)};
  const auto connected = connect_paths(paths, {}, PathsNeeded::one_for_all);
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  CHECK(order(*connected) == Order{0, 2, 0, 2, 0});
  REQUIRE(connected->left_out.size() == 1);
  CHECK(connected->left_out[0].path == 1);
}

TEST_CASE("Whoever insists on all paths gets the error of the one that is down") {
  const Listener listener = listen_at("127.0.0.1");
  const ClosedPort closed;
  const Path paths[] = {path_to(listener), refused_path(closed)};
  for (const auto& error : {connect_paths(paths, {}, PathsNeeded::all).error()}) {
    CHECK(error.code == std::errc::connection_refused);
    CHECK(error.subject.view() == subject_of(paths[1]).view());
  }
}

TEST_CASE("Without a path that comes up the first one's error is reported") {
  const ClosedPort closed;
  const Path paths[] = {{.local = "192.0.2.1", .remote = {.host = "127.0.0.1", .port = closed.port}},
                        refused_path(closed)};
  for (const PathsNeeded needed : {PathsNeeded::one, PathsNeeded::one_for_all, PathsNeeded::all}) {
    const auto connected = connect_paths(paths, {}, needed);
    REQUIRE_FALSE(connected.has_value());
    CHECK(connected.error().code == std::errc::address_not_available);
    CHECK(std::string(connected.error().op) == "bind to the local address");
    CHECK(connected.error().subject.view() == subject_of(paths[0]).view());
    const auto main = connect_main(paths, {}, needed);
    REQUIRE_FALSE(main.has_value());
    CHECK(main.error().code == std::errc::address_not_available);
  }
}

TEST_CASE("The main connection goes over the first path that is up, and what is down is not tried again") {
  const ClosedPort closed;
  Listener listener = listen_at("127.0.0.1");
  const Path paths[] = {refused_path(closed), path_to(listener, "127.0.0.2"), path_to(listener, "127.0.0.3")};
  auto main = connect_main(paths);
  REQUIRE_MESSAGE(main.has_value(), describe(main.error()));
  CHECK(main->main.path == 1);
  CHECK(source_of(main->main.link) == "127.0.0.2");
  REQUIRE(main->left_out.size() == 1);
  main->left_out[0].error.detail = 17;  // to be known again
  const auto connected = connect_paths(paths, {}, PathsNeeded::one, std::move(main->left_out));
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  CHECK(order(*connected) == Order{1, 2});
  REQUIRE(connected->left_out.size() == 1);
  CHECK(connected->left_out[0].error.detail == 17);
  CHECK_FALSE(connect_main(paths, {}, PathsNeeded::all).has_value());
}

TEST_CASE("One more connection goes over a path as its channels do") {
  const Listener listener = listen_at("127.0.0.1");
  const auto link = connect_path(path_to(listener, "127.0.0.2"));
  REQUIRE_MESSAGE(link.has_value(), describe(link.error()));
  CHECK(source_of(*link) == "127.0.0.2");
  const ClosedPort closed;
  const auto refused = connect_path(refused_path(closed));
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().subject.view() == subject_of(refused_path(closed)).view());
}

TEST_CASE("The sum of the channels is bounded") {
  Path path{.remote = {.host = "127.0.0.1", .port = 1}, .channels = 200};
  for (const std::vector<Path>& paths : {std::vector<Path>{path, path}, std::vector<Path>{Path{.channels = 0}},
                                         std::vector<Path>{Path{.channels = 256}}}) {
    const auto connected = connect_paths(paths);
    REQUIRE_FALSE(connected.has_value());
    CHECK(connected.error().code == Errc::bad_channel_count);
    CHECK(connect_main(paths).error().code == Errc::bad_channel_count);
  }
  CHECK(connect_paths({}).error().code == Errc::bad_option);
}

TEST_CASE("255 channels over two paths get their ids in turn") {
  const Listener listener = listen_at("127.0.0.1");
  const Path paths[] = {path_to(listener, "", 128), path_to(listener, "", 127)};
  const auto connected = connect_paths(paths);
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  REQUIRE(connected->links.size() == 255);
  for (std::size_t i = 0; i < 255; ++i) CHECK(connected->links[i].path == i % 2);
}

TEST_CASE("An Interrupt ends it for all paths, and is no path's fault") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  interrupt->trigger();
  const Listener listener = listen_at("127.0.0.1");
  const Path paths[] = {path_to(listener), path_to(listener)};
  const SocketOptions options{.interrupt = &*interrupt};
  CHECK(connect_paths(paths, options).error().code == Errc::cancelled);
  CHECK(connect_main(paths, options).error().code == Errc::cancelled);
}

TEST_CASE("What a source address or a device cannot be is said by name") {
  const Listener listener = listen_at("127.0.0.1");
  const auto error_of = [&](const SocketOptions& options, const Address& address) {
    const auto link = connect_to(address, options);
    REQUIRE_FALSE(link.has_value());
    return link.error();
  };
  const Address& there = listener.local_address();
  CHECK(std::string(error_of({.local_address = "no number"}, there).op) == "SocketOptions::local_address");
  CHECK(std::string(error_of({.local_address = "::1"}, there).op) == "resolve");
  CHECK(std::string(error_of({.device = "sixteen_letters_"}, there).op) == "SocketOptions::device");
  const Error no_device = error_of({.device = "no-such-dev"}, there);
  CHECK(std::string(no_device.op) == "bind to the device");
  CHECK((no_device.code == std::errc::no_such_device || no_device.code == std::errc::operation_not_permitted));
  const Address unix_socket{.kind = AddressKind::unix_socket, .path = "/tmp/no-such-socket"};
  for (const SocketOptions& options :
       {SocketOptions{.local_address = "127.0.0.1"}, SocketOptions{.device = "lo"}, SocketOptions{.mptcp = true}})
    CHECK(error_of(options, unix_socket).code == Errc::bad_option);
}

TEST_CASE("A listener at a UNIX socket has no device and no MPTCP") {
  const Address address{.kind = AddressKind::unix_socket, .path = "/tmp/no-such-socket"};
  for (const SocketOptions& options : {SocketOptions{.device = "lo"}, SocketOptions{.mptcp = true}}) {
    const auto listener = Listener::listen(address, 1, options);
    REQUIRE_FALSE(listener.has_value());
    CHECK(listener.error().code == Errc::bad_option);
  }
}

TEST_CASE("A path can be bound to a device") {
  const Listener listener = listen_at("127.0.0.1");
  Path path = path_to(listener);
  path.device = "lo";
  const auto connected = connect_paths({&path, 1});
  if (!connected && connected.error().code == std::errc::operation_not_permitted)
    return test::skip("binding to a device is a privilege here");
  REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
  char name[16] = {};
  socklen_t size = sizeof name;
  CHECK(::getsockopt(connected->links[0].link.native_handle(), SOL_SOCKET, SO_BINDTODEVICE, name, &size) == 0);
  CHECK(std::string(name) == "lo");
}

TEST_CASE("A listener with MPTCP takes MPTCP and plain TCP, and a listener without takes both, too") {
  const SocketOptions mptcp{.mptcp = true};
  const auto probe = Listener::listen({.host = "127.0.0.1"}, 1, mptcp);
  if (!probe) return test::skip("no MPTCP here: " + describe(probe.error()));
  for (const bool offered : {true, false}) {
    for (const bool used : {true, false}) {
      CAPTURE(offered);
      CAPTURE(used);
      Listener listener = listen_at("127.0.0.1", offered ? mptcp : SocketOptions{});
      Path path = path_to(listener, "127.0.0.2");
      path.mptcp = used;
      auto connected = connect_paths({&path, 1});
      REQUIRE_MESSAGE(connected.has_value(), describe(connected.error()));
      auto there = listener.accept(test::no_hang);
      REQUIRE(there.has_value());
      int protocol = 0;
      socklen_t size = sizeof protocol;
      CHECK(::getsockopt(connected->links[0].link.native_handle(), SOL_SOCKET, SO_PROTOCOL, &protocol, &size) == 0);
      CHECK(protocol == (used ? IPPROTO_MPTCP : IPPROTO_TCP));
      const std::vector<std::byte> sent(100'000, std::byte{7});
      auto writing = std::async(std::launch::async, [&] {
        auto done = write_all(connected->links[0].link, std::span<const std::byte>(sent));
        return done ? connected->links[0].link.finish() : done;
      });
      std::vector<std::byte> got(sent.size());
      CHECK(read_exact(*there, std::span<std::byte>(got)).has_value());
      CHECK(got == sent);
      CHECK(writing.get().has_value());
    }
  }
}
