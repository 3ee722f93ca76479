// SPDX-License-Identifier: MIT
//
// Time is checked from below only: a busy machine may be slow, never too fast.
#include "multifd/transport/capped.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/fd.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using testing::memory_transport_pair;
using testing::MemoryTransport;
using Clock = std::chrono::steady_clock;

namespace {

constexpr auto burst = 20ms;  // what may go out at once after a pause

using Link = Capped<MemoryTransport>;

struct Pair {
  explicit Pair(std::shared_ptr<PathShared> path, std::size_t capacity = std::size_t{8} << 20)
      : Pair(memory_transport_pair(capacity), std::move(path)) {}
  Pair(std::pair<MemoryTransport, MemoryTransport> pair, std::shared_ptr<PathShared> path)
      : writer(std::move(pair.first), std::move(path)), reader(std::move(pair.second)) {}
  Link writer;
  MemoryTransport reader;
};

Result<void> write(Link& link, std::size_t bytes) {
  const std::vector<std::byte> all(bytes);
  return write_all(link, std::span<const std::byte>(all));
}

/// A path whose cap is used up for days.
std::shared_ptr<PathShared> closed_path() {
  auto path = std::make_shared<PathShared>(1);
  Pair other(path);
  const std::vector<std::byte> bytes(512);
  const iovec buffer = const_buffer(std::span<const std::byte>(bytes));
  for (int i = 0; i < 1000; ++i) REQUIRE(other.writer.write_now(std::span(&buffer, 1)).has_value());
  return path;
}

void wait_until_held_back(const PathShared& path) {
  while (!path.holds_back()) std::this_thread::yield();
}

}  // namespace

TEST_CASE("A path's cap is one for all of its channels") {
  const auto path = std::make_shared<PathShared>(1'000'000);
  Pair one(path);
  Pair other(path);
  const auto start = Clock::now();
  {
    std::jthread beside([&] { CHECK(write(one.writer, 60'000).has_value()); });
    CHECK(write(other.writer, 60'000).has_value());
  }
  CHECK(Clock::now() - start >= 120ms - 10ms - burst);  // the last piece leaves before its time is over
  CHECK(path->written_bytes() == 120'000);
}

TEST_CASE("Paths have caps of their own") {
  const auto path = closed_path();
  Pair held(path);
  std::jthread waiting([&] { (void)write(held.writer, 1); });
  Pair other(std::make_shared<PathShared>(0));
  CHECK(write(other.writer, 1 << 20).has_value());
  held.writer.shutdown();
}

TEST_CASE("What is written under a cap comes in pieces, whatever the buffers are") {
  const auto path = std::make_shared<PathShared>(10'000'000);
  Pair pair(path);
  std::vector<std::byte> bytes(200'000);
  const iovec whole = const_buffer(std::span<const std::byte>(bytes));
  const auto count = pair.writer.write_some(std::span(&whole, 1));
  REQUIRE(count.has_value());
  CHECK(*count <= 64 * 1024);
  CHECK(*count > 0);
  std::vector<iovec> many;
  for (std::size_t i = 0; i < 1000; ++i) {
    many.push_back({nullptr, 0});
    many.push_back({bytes.data() + i, 1});
  }
  const auto few = pair.writer.write_some(std::span(many).first(1000));
  REQUIRE(few.has_value());
  CHECK(*few > 0);
}

TEST_CASE("Bytes are counted in both directions, with a cap and without") {
  for (const std::uint64_t rate : {0u, 1'000'000'000u}) {
    const auto path = std::make_shared<PathShared>(rate);
    auto pair = memory_transport_pair(1 << 20);
    Link one(std::move(pair.first), path);
    Link other(std::move(pair.second), path);
    CHECK(write(one, 100'000).has_value());
    std::vector<std::byte> got(100'000);
    CHECK(read_exact(other, std::span<std::byte>(got)).has_value());
    CHECK(path->written_bytes() == 100'000);
    CHECK(path->read_bytes() == 100'000);
  }
}

TEST_CASE("Bytes pass at once when a cap is lifted, or raised") {
  for (const std::uint64_t rate : {0u, 1'000'000'000u}) {
    const auto path = closed_path();
    Pair pair(path);
    std::future<Result<void>> writing = std::async(std::launch::async, [&] { return write(pair.writer, 300'000); });
    wait_until_held_back(*path);
    CHECK(path->rate() == 1);
    path->set_rate(rate);
    REQUIRE(writing.wait_for(test::no_hang) == std::future_status::ready);
    CHECK(writing.get().has_value());
    CHECK(path->rate() == rate);
  }
}

TEST_CASE("A cap that comes while bytes move holds them back") {
  const auto path = std::make_shared<PathShared>();
  Pair pair(path);
  CHECK(write(pair.writer, 1'000'000).has_value());
  path->set_rate(1'000'000);
  const auto start = Clock::now();
  CHECK(write(pair.writer, 100'000).has_value());
  CHECK(Clock::now() - start >= 100ms - 10ms - burst);
}

TEST_CASE("shutdown() ends a wait for the cap, of this connection alone") {
  const auto path = closed_path();
  Pair one(path);
  Pair other(path);
  std::future<Result<void>> ended = std::async(std::launch::async, [&] { return write(one.writer, 1); });
  std::future<Result<void>> goes_on = std::async(std::launch::async, [&] { return write(other.writer, 1); });
  wait_until_held_back(*path);
  one.writer.shutdown();
  REQUIRE(ended.wait_for(test::no_hang) == std::future_status::ready);
  const auto result = ended.get();
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == Errc::cancelled);
  CHECK(goes_on.wait_for(0ms) == std::future_status::timeout);
  path->set_rate(0);
  REQUIRE(goes_on.wait_for(test::no_hang) == std::future_status::ready);
  CHECK(goes_on.get().has_value());
}

TEST_CASE("shutdown() holds for a connection that moves") {
  const auto path = closed_path();
  Pair pair(path);
  pair.writer.shutdown();
  Link moved(std::move(pair.writer));
  CHECK_FALSE(write(moved, 1).has_value());
  moved = Pair(path).writer;
  moved.shutdown();
  CHECK_FALSE(write(moved, 1).has_value());
}

TEST_CASE("A write with a time limit ends while it waits for the cap, and by an Interrupt") {
  const auto path = closed_path();
  auto [here, there] = test::unix_pair();
  Capped<FdTransport> writer(std::move(here), path);
  const std::byte byte{1};
  const iovec buffer = const_buffer(std::span(&byte, 1));
  const auto late = writer.write_some(std::span(&buffer, 1), 10ms, nullptr);
  REQUIRE_FALSE(late.has_value());
  CHECK(late.error().code == Errc::timed_out);
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  auto waiting =
      std::async(std::launch::async, [&] { return writer.write_some(std::span(&buffer, 1), no_timeout, &*interrupt); });
  wait_until_held_back(*path);
  interrupt->trigger();
  REQUIRE(waiting.wait_for(test::no_hang) == std::future_status::ready);
  const auto ended = waiting.get();
  REQUIRE_FALSE(ended.has_value());
  CHECK(ended.error().code == Errc::cancelled);
  path->set_rate(0);
  CHECK(writer.write_some(std::span(&buffer, 1), 10s, nullptr).value_or(0) == 1);
  CHECK(path->written_bytes() == 512'001);
}

TEST_CASE("What a short write leaves is given back") {
  const auto path = std::make_shared<PathShared>(10);
  auto pair = memory_transport_pair(1 << 20, {.max_io_bytes = 1});
  Link link(std::move(pair.first), path);
  const std::vector<std::byte> bytes(512);
  const iovec all = const_buffer(std::span<const std::byte>(bytes));
  CHECK(link.write_some(std::span(&all, 1)).value_or(0) == 1);  // of 512, which would be 51 s
  std::future<Result<void>> next = std::async(std::launch::async, [&] { return write(link, 1); });
  CHECK(next.wait_for(test::no_hang) == std::future_status::ready);
  link.shutdown();
}

TEST_CASE("write_now() is not held back, and counts") {
  const auto path = std::make_shared<PathShared>(1'000'000);
  Pair pair(path);
  const std::vector<std::byte> bytes(100'000);
  const iovec buffer = const_buffer(std::span<const std::byte>(bytes));
  const auto start = Clock::now();
  CHECK(pair.writer.write_now(std::span(&buffer, 1)).value_or(0) == 100'000);
  CHECK(write(pair.writer, 1).has_value());
  CHECK(Clock::now() - start >= 100ms - burst);
}
