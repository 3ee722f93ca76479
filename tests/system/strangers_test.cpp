// SPDX-License-Identifier: MIT
//
// A port that others find, too (format/hardening.md section 16, row 22): whoever connects while a migration is on
// disturbs nobody, and whoever gets a channel's place ends the migration at once, on both sides. How connections are
// told apart before they have one: unit/qemu/accept_source_test.cpp.
#include <doctest/doctest.h>

#include <string_view>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t page = 4096;
using Tx = Sender<FdTransport, NoComp, ZeroPagesMultifd>;
using Rx = Receiver<FdTransport, NoComp>;

Listener listen() {
  auto listener = Listener::listen({.host = "127.0.0.1"}, 128);
  REQUIRE_MESSAGE(listener.has_value(), text(listener));
  return std::move(*listener);
}

FdTransport connect(const Listener& listener) {
  auto link = connect_to(listener.local_address(), {.connect_timeout = 5s});
  REQUIRE_MESSAGE(link.has_value(), text(link));
  return std::move(*link);
}

void say(FdTransport& link, const RawStream& stream) {
  REQUIRE(write_all(link, std::span<const std::byte>(stream.bytes())).has_value());
}

/// The connection is over: nothing more than its end can be read.
void check_closed(FdTransport& link) {
  std::byte byte{};
  iovec buffer = mutable_buffer(std::span(&byte, 1));
  const auto got = link.read_some(std::span(&buffer, 1));
  CHECK((!got || *got == 0));
}

struct Guests {
  Guests() {
    Rng rng(seed());
    for (std::size_t p = 0; p < source.size() / page; ++p) fill_page(source.page(p, page), any_fill(rng), rng);
    target.fill(std::byte{0xee});
    block = *source_map.add("pc.ram", source.bytes());
    REQUIRE(target_map.add("pc.ram", target.bytes()).has_value());
  }
  Block source{600 * page};
  Block target{600 * page};
  RamMap source_map, target_map;
  BlockId block{};
};

}  // namespace

TEST_CASE("Strangers on the port while a migration is on disturb nobody") {
  const Watchdog watchdog("strangers");
  {
    Guests guests;
    Listener listener = listen();
    FdTransport main = connect(listener);
    say(main, RawStream().raw("QEVM"));
    std::vector<FdTransport> links;
    for (int i = 0; i < 2; ++i) links.push_back(connect(listener));
    auto tx = Tx::open(guests.source_map, std::move(links));
    REQUIRE(tx.has_value());
    auto source = accept_source(listener, 2);
    REQUIRE_MESSAGE(source.has_value(), text(source));
    auto rx = Rx::open(guests.target_map, std::move(source->channels));
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    Result<void> received;
    std::thread finishing([&] { received = rx->finish(); });

    std::vector<FdTransport> strangers;
    for (int round = 0; round < 10; ++round) {
      for (int kind = 0; kind < 3; ++kind) {
        strangers.push_back(connect(listener));
        if (kind == 1) say(strangers.back(), RawStream().raw("GET / HTTP/1.1\r\n\r\n"));
        if (kind == 2)
          say(strangers.back(), RawStream().hello(0).packet({.normal = {0}, .payload = Bytes(page, std::byte{0xbd})}));
      }
      REQUIRE(tx->queue_range(guests.block, 0, guests.source.size()).has_value());
      const auto epoch = tx->close_epoch_and_wait();
      REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
    }
    CHECK(tx->close_channels().has_value());
    finishing.join();
    CHECK_MESSAGE(received.has_value(), text(received));
    CHECK(guests.source == guests.target);

    {
      const Listener gone = std::move(listener);
    }
    for (FdTransport& stranger : strangers) check_closed(stranger);
  }
}

TEST_CASE("A connection that says another one's channel id ends the receiver and both peers, before any data") {
  const Watchdog watchdog("duplicate id");
  Guests guests;
  Listener listener = listen();
  std::vector<FdTransport> peers;
  for (int i = 0; i < 2; ++i) {
    peers.push_back(connect(listener));
    say(peers.back(), RawStream().hello(1).packet({.normal = {0}, .payload = Bytes(page, std::byte{0xbd})}));
  }
  auto links = listener.accept_channels(2, 5s);
  REQUIRE(links.has_value());
  const Stopwatch watch;
  const auto rx = Rx::open(guests.target_map, std::move(*links));
  REQUIRE_FALSE(rx.has_value());
  CHECK_MESSAGE(code_of(rx) == Errc::duplicate_channel_id, text(rx));
  CHECK(rx.error().stage == Stage::hello);
  CHECK(watch.elapsed() < no_hang);
  for (FdTransport& peer : peers) check_closed(peer);
}

TEST_CASE("A stranger in a channel's place ends the migration by its first bytes, and the source hears of it") {
  const Watchdog watchdog("a stranger in a channel's place");
  Guests guests;
  Listener listener = listen();
  std::vector<FdTransport> links;
  links.push_back(connect(listener));
  FdTransport stranger = connect(listener);
  say(stranger, RawStream().raw("\x16\x03\x01\x02"));  // TLS, which is not spoken here
  links.push_back(connect(listener));
  auto tx = Tx::open(guests.source_map, std::move(links));
  REQUIRE(tx.has_value());
  auto accepted = listener.accept_channels(2, 5s);
  REQUIRE(accepted.has_value());
  const Stopwatch watch;
  const auto rx = Rx::open(guests.target_map, std::move(*accepted));
  CHECK_MESSAGE(code_of(rx) == Errc::bad_magic, text(rx));
  CHECK(guests.target.data()[0] == std::byte{0xee});
  {
    const Listener gone = std::move(listener);
  }  // the third connection is still in its queue
  Result<void> sent;
  while (sent) {
    auto queued = tx->queue_range(guests.block, 0, guests.source.size());
    if (!queued) sent = std::unexpected(queued.error());
  }
  CHECK_MESSAGE(sent.error().code == Condition::peer_gone, text(sent));
  CHECK(watch.elapsed() < no_hang);
  check_closed(stranger);
}
