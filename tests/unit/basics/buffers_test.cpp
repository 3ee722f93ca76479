// SPDX-License-Identifier: MIT
#include "multifd/buffers.hpp"

#include <doctest/doctest.h>
#include <limits.h>

#include <array>

TEST_CASE("max_iovecs is what one system call takes") {
  CHECK(multifd::max_iovecs == static_cast<std::size_t>(IOV_MAX));
}

TEST_CASE("A buffer covers exactly the bytes that it was made from") {
  std::array<std::byte, 7> bytes{};
  for (const iovec buffer :
       {multifd::const_buffer(bytes.data(), bytes.size()), multifd::const_buffer(std::span<const std::byte>(bytes)),
        multifd::mutable_buffer(std::span<std::byte>(bytes))}) {
    CHECK(buffer.iov_base == bytes.data());
    CHECK(buffer.iov_len == 7);
  }
}

TEST_CASE("total_bytes() adds up all buffers, of which there may be none or empty ones") {
  std::array<std::byte, 10> bytes{};
  const std::array<iovec, 3> buffers{multifd::const_buffer(bytes.data(), 4), multifd::const_buffer(bytes.data(), 0),
                                     multifd::const_buffer(bytes.data(), 6)};
  CHECK(multifd::total_bytes(buffers) == 10);
  CHECK(multifd::total_bytes({}) == 0);
}
