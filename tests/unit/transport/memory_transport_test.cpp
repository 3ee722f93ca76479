// SPDX-License-Identifier: MIT
#include "multifd/testing/memory_transport.hpp"

#include <doctest/doctest.h>

#include <future>
#include <ostream>
#include <vector>

#include "multifd/transport/algorithms.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using testing::memory_transport_pair;
using testing::MemoryTransport;

namespace {
std::vector<std::byte> count_up(std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i * 31 + i / 256);
  return bytes;
}
}  // namespace

TEST_CASE("MemoryTransport carries bytes both ways through rings of any capacity") {
  for (const std::size_t capacity : {1UL, 2UL, 3UL, 100UL, 4096UL, 100000UL}) {
    for (const std::size_t limit : {1UL, 3UL, 1UL << 30}) {
      CAPTURE(capacity);
      CAPTURE(limit);
      auto [a, b] = memory_transport_pair(capacity, {.max_io_bytes = limit});
      const std::size_t size = capacity < 100 ? 200 : 5000;  // a byte at a time costs a switch of threads each
      const std::vector<std::byte> sent = count_up(size);
      auto echo = std::async(std::launch::async, [&other = b, size] {
        std::vector<std::byte> bytes(size);
        return read_exact(other, std::span<std::byte>(bytes)).has_value() &&
               write_all(other, std::span<const std::byte>(bytes)).has_value();
      });
      REQUIRE(write_all(a, std::span<const std::byte>(sent)).has_value());
      std::vector<std::byte> received(size);
      REQUIRE(read_exact(a, std::span<std::byte>(received)).has_value());
      CHECK(echo.get());
      CHECK(received == sent);
    }
  }
}

TEST_CASE("MemoryTransport moves at most max_io_bytes in one call") {
  auto [a, b] = memory_transport_pair(100, {.max_io_bytes = 7});
  std::vector<std::byte> bytes = count_up(50);
  const iovec buffers[] = {{bytes.data(), 5}, {nullptr, 0}, {bytes.data() + 5, 45}};
  CHECK(a.write_some(buffers) == std::size_t{7});
  CHECK(a.write_some(buffers) == std::size_t{7});
  CHECK(b.read_some(buffers) == std::size_t{7});
}

TEST_CASE("MemoryTransport: finish is an orderly end, after which nothing is written") {
  auto [a, b] = memory_transport_pair(100);
  const auto bytes = count_up(10);
  REQUIRE(write_all(a, std::span<const std::byte>(bytes)).has_value());
  REQUIRE(a.finish().has_value());
  const auto refused = write_all(a, std::span<const std::byte>(bytes));
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == Errc::already_closed);
  {
    const MemoryTransport gone = std::move(a);
  }
  std::vector<std::byte> received(20);
  iovec buffer = mutable_buffer(received);
  CHECK(read_at_least(b, std::span(&buffer, 1), 20) == std::size_t{10});
  const auto to_nobody = write_all(b, std::span<const std::byte>(bytes));
  REQUIRE_FALSE(to_nobody.has_value());
  CHECK(to_nobody.error().code == Errc::peer_closed);
}

TEST_CASE("MemoryTransport: a cut end is an error on both sides, whatever is still in the ring") {
  const auto bytes = count_up(10);
  std::vector<std::byte> received(10);
  for (const bool destroy : {false, true}) {
    CAPTURE(destroy);
    auto [a, b] = memory_transport_pair(100);
    REQUIRE(write_all(a, std::span<const std::byte>(bytes)).has_value());
    if (destroy) {
      const MemoryTransport gone = std::move(a);
    } else {
      a.shutdown();
      const auto own = write_all(a, std::span<const std::byte>(bytes));
      REQUIRE_FALSE(own.has_value());
      CHECK(own.error().code == Errc::cancelled);
      CHECK_FALSE(a.finish().has_value());
    }
    const auto read = read_exact(b, std::span<std::byte>(received));
    REQUIRE_FALSE(read.has_value());
    CHECK(read.error().code == Errc::peer_closed);
    const auto written = write_all(b, std::span<const std::byte>(bytes));
    REQUIRE_FALSE(written.has_value());
    CHECK(written.error().code == Errc::peer_closed);
  }
}
