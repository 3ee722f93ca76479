// SPDX-License-Identifier: MIT
//
// progress_timeout: whoever waits for channels on which nothing moves gets an error in bounded time, and whoever waits
// for channels that are slow does not. The other time limits: hello and barrier in hostile_test.cpp, connecting and
// accepting in unit/transport.
#include <doctest/doctest.h>

#include <thread>

#include "multifd/compress/nocomp.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
constexpr auto limit = 300ms;

template <class R>
void check_stalled(const R& result, Stage stage) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == Errc::timed_out, text(result));
  CHECK(result.error().code == Condition::timed_out);
  CHECK(result.error().stage == stage);
  CHECK(text(result).contains("progress_timeout"));
}

/// A sender whose channels take a little and then nothing more.
template <class Call>
void check_sender(Call&& call) {
  const Watchdog watchdog("a sender that nobody reads");
  GuestRam source(4096);
  auto links = memory_links(2, 1000);
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.depth = 2, .progress_timeout = limit});
  REQUIRE(tx.has_value());
  const Stopwatch watch;
  check_stalled(call(*tx, source), Stage::write);
  CHECK(watch.elapsed() >= limit);
  CHECK(watch.elapsed() < no_hang);
  check_stalled(tx->close_channels(), Stage::write);  // the first error stays
}

}  // namespace

TEST_CASE("A sender whose peer reads nothing: room for pages, an epoch, and the end have a time limit") {
  check_sender([](auto& tx, GuestRam& source) { return tx.queue_range(source.block, 0, source.memory.size()); });
  check_sender([](auto& tx, GuestRam& source) {
    REQUIRE(tx.queue_range(source.block, 0, 64 * page).has_value());
    REQUIRE(tx.sync().has_value());
    return tx.wait(0);
  });
  check_sender([](auto& tx, GuestRam& source) {
    REQUIRE(tx.queue_range(source.block, 0, 64 * page).has_value());
    return tx.close_channels();
  });
}

TEST_CASE("A sender is not in a hurry: neither a slow peer nor its own bandwidth cap is standing still") {
  const Watchdog watchdog("a slow migration");
  GuestRam source(4096);
  using Tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>;
  auto tape = captures(2);
  // A packet takes a second.
  auto tx = Tx::open(source.map, std::move(tape.links), {.bandwidth = 512 * 1024, .progress_timeout = 100ms});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, 3 * 128 * page).has_value());
  const auto epoch = tx->sync_and_wait();
  CHECK_MESSAGE(epoch.has_value(), text(epoch));
  const auto closed = tx->close_channels();
  CHECK_MESSAGE(closed.has_value(), text(closed));
}

TEST_CASE("A receiver whose peers are silent ends, and says which channel it would have heard from") {
  const Watchdog watchdog("a silent source");
  GuestRam target(4096);
  const auto outcome = feed<NoComp>(
      target.map,
      {RawStream().hello(0).packet({.zero = {0}}).bytes(), RawStream().hello(1).packet({.zero = {page}}).bytes()},
      Then::silence, {.progress_timeout = limit});
  check_stalled(outcome.result, Stage::read);
  CHECK(outcome.result.error().channel == 0);
  CHECK(outcome.elapsed >= limit);
  CHECK(outcome.elapsed < no_hang);
}

TEST_CASE("A receiver that gets a packet now and then goes on") {
  const Watchdog watchdog("a slow source");
  constexpr auto long_limit = 2s;
  GuestRam target(4096);
  auto links = memory_links(1);
  std::jthread peer([&] {
    const auto send = [&](const RawStream& part) {
      CHECK(write_all(links.sender[0], std::span<const std::byte>(part.bytes())).has_value());
    };
    send(RawStream().hello(0));
    // Longer than the limit in all, and each pause so short that a busy machine does not make it one that is over it.
    for (std::uint64_t i = 0; i < 12; ++i) {
      std::this_thread::sleep_for(long_limit / 10);
      send(RawStream().packet({.zero = {i * page}}));
    }
    send(RawStream().sync());
    CHECK(links.sender[0].finish().has_value());
  });
  auto rx =
      Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver), {.progress_timeout = long_limit});
  REQUIRE(rx.has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
}

TEST_CASE("No limit, as people write it, is one") {
  const Watchdog watchdog("no limit");
  GuestRam source(4096), target(4096);
  auto links = memory_links(2);
  constexpr auto never = std::chrono::milliseconds::max();
  std::jthread receiving([&] {
    auto rx = Receiver<MemoryTransport, NoComp>::open(
        target.map, std::move(links.receiver),
        {.hello_timeout = never, .barrier_timeout = never, .progress_timeout = never});
    REQUIRE(rx.has_value());
    const auto finished = rx->finish();
    CHECK_MESSAGE(finished.has_value(), text(finished));
  });
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.progress_timeout = never});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  CHECK(tx->sync_and_wait().has_value());
  CHECK(tx->close_channels().has_value());
}
