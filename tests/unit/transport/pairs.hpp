// SPDX-License-Identifier: MIT
//
// Connected pairs of every kind of descriptor, made with system calls only, so that fd.hpp can be tested
// without socket.hpp. `first` writes, `second` reads.
#pragma once

#include <doctest/doctest.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <utility>

#include "multifd/transport/fd.hpp"

namespace test {

using FdPair = std::pair<multifd::FdTransport, multifd::FdTransport>;

inline multifd::FdTransport adopt(int fd) {
  auto transport = multifd::FdTransport::adopt(fd);
  REQUIRE(transport.has_value());
  return std::move(*transport);
}

inline FdPair tcp_pair() {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  REQUIRE(::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0);
  REQUIRE(::listen(listener, 1) == 0);
  REQUIRE(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  const int one = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  REQUIRE(::connect(one, reinterpret_cast<sockaddr*>(&address), size) == 0);
  const int other = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  REQUIRE(other >= 0);
  ::close(listener);
  return {adopt(one), adopt(other)};
}

inline FdPair unix_pair() {
  int fds[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
  return {adopt(fds[0]), adopt(fds[1])};
}

inline FdPair pipe_pair() {
  int fds[2];
  REQUIRE(::pipe2(fds, O_CLOEXEC) == 0);
  return {adopt(fds[1]), adopt(fds[0])};
}

inline std::string message(const multifd::Error& error) { return multifd::describe(error); }

/// Milliseconds within which something that does not hang has ended, also on a machine that is busy. No measure.
constexpr long long no_hang_ms = 20'000;

/// Milliseconds since it was made.
class Stopwatch {
 public:
  long long ms() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace test
