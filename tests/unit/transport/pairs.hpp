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

#include <string>
#include <utility>

#include "multifd/transport/fd.hpp"
#include "support/adopt.hpp"
#include "support/basics.hpp"

namespace test {

using FdPair = std::pair<multifd::FdTransport, multifd::FdTransport>;

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

}  // namespace test
