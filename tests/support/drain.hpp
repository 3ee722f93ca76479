// SPDX-License-Identifier: MIT
//
// All that a sender wrote to a transport in memory, after it has ended its stream.
#pragma once

#include "support/links.hpp"
#include "support/raw_stream.hpp"

namespace test {

inline Bytes read_to_end(MemoryTransport& link) {
  Bytes all;
  Bytes some(1 << 16);
  for (;;) {
    iovec buffer = multifd::mutable_buffer(std::span(some));
    const auto got = link.read_some(std::span(&buffer, 1));
    REQUIRE_MESSAGE(got.has_value(), text(got));
    if (*got == 0) return all;
    append(all, std::span(some).first(*got));
  }
}

}  // namespace test
