// SPDX-License-Identifier: MIT
//
// A descriptor of a test's as a transport.
#pragma once

#include <doctest/doctest.h>

#include <utility>

#include "multifd/transport/fd.hpp"

namespace test {

inline multifd::FdTransport adopt(int fd) {
  auto transport = multifd::FdTransport::adopt(fd);
  REQUIRE(transport.has_value());
  return std::move(*transport);
}

}  // namespace test
