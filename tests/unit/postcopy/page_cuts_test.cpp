// SPDX-License-Identifier: MIT
//
// Clients that fetch a whole guest while connections are cut, and the server is stopped and started anew, at moments drawn
// by lot. Whatever happens: every page arrives as it is, or, where the server never comes back, an error says so.
//
// MULTIFD_MOMENTS says how many of each kind; 10 by default.
#include <doctest/doctest.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/zstd.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "support/page_cuts.hpp"
#include "support/page_ends.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

enum class Blow { one, all, restart, gone };

struct Toll {
  unsigned lost = 0;  ///< rounds in which a connection was lost
  unsigned ended = 0;
};

template <Compressor C>
void round(Blow blow, bool over_tcp, StoppedGuest& guest, PageStore& store, GuestPages* guest_pages, Rng& rng,
           Toll& toll) {
  const Watchdog watchdog("a round of cuts");
  const std::string path = "/tmp/multifd-cuts-" + std::to_string(::getpid()) + ".sock";
  Source<C> source(store, guest_pages,
                   over_tcp ? Address{.kind = AddressKind::tcp, .host = "127.0.0.1"}
                            : Address{.kind = AddressKind::unix_socket, .path = path});
  const Address at = source.address();
  Cutter cutter;
  auto opened = RemotePages<FdTransport, C>::open(
      [&](FetchKind, const Interrupt& interrupt) { return cutter.connect(at, interrupt); },
      {.session = session_of(9),
       .blocks = {{"bios", guest.bios.size()}, {"pc.ram", guest.ram.size()}},
       .page_bytes = guest.page_bytes,
       .progress_timeout = 5'000ms,
       .reconnect_timeout = blow == Blow::gone ? 30ms : 0ms});
  REQUIRE_MESSAGE(opened.has_value(), text(opened));
  auto& client = **opened;
  RamMap map(guest.page_bytes);  // in the client's order of blocks
  REQUIRE(map.add("bios", guest.bios.bytes()).has_value());
  REQUIRE(map.add("pc.ram", guest.ram.bytes()).has_value());

  std::array<std::vector<PageRange>, 3> ranges;
  for (const PageRange& range : all_ranges(client, batch_bytes / 8, rng)) ranges[below(rng, 2)].push_back(range);
  ranges[2] = all_ranges(client, guest.page_bytes, rng);  // single ones, of which not all are needed
  ranges[2].resize(120);
  std::array<std::string, 3> wrong;
  std::array<Result<void>, 3> ended;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] {
      ended[i] = fetch(client, i == 2 ? FetchKind::urgent : FetchKind::background, ranges[i], map, wrong[i]);
    });
  for (std::size_t blows = 1 + below(rng, 3); blows > 0; --blows) {
    std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 5'000)));
    if (blow == Blow::one || blow == Blow::all) cutter.cut(rng, blow == Blow::all);
    if (blow == Blow::restart || blow == Blow::gone) source.stop();
    if (blow == Blow::gone) break;
    if (blow == Blow::restart) {
      std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 4'000)));
      source.start();
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(wrong[i] == "");
    if (ended[i]) continue;
    CHECK(blow == Blow::gone);
    CHECK_MESSAGE(ended[i].error().code == Errc::memory_lost, text(ended[i]));
    CHECK(ended[i].error().peer_reason);
  }
  toll.lost += client.stats().connections_lost > 0;
  toll.ended += !ended[0] || !ended[1] || !ended[2];
  if (blow != Blow::gone) {
    const auto finished = client.finish();
    CHECK_MESSAGE(finished.has_value(), text(finished));
    CHECK(source.whole());
  }
}

void rounds(Blow blow, const char* what) {
  Rng rng(seed());
  StoppedGuest guest(512);
  const auto store = guest.pages();
  Toll toll;
  const unsigned moments = wanted_moments();
  for (unsigned i = 0; i < moments; ++i) {
    CAPTURE(i);
    if (i % 3 == 2)
      round<Zstd>(blow, i % 2 == 0, guest, *store, store.get(), rng, toll);
    else
      round<NoComp>(blow, i % 2 == 0, guest, *store, i % 4 < 2 ? store.get() : nullptr, rng, toll);
  }
  MESSAGE(std::string(what) << ": " << moments << " rounds, connections lost in " << toll.lost << ", ended in "
                            << toll.ended);
  CHECK(toll.lost > 0);  // else no moment was in a transfer
}

}  // namespace

TEST_CASE("Whenever one connection is cut, every page arrives") { rounds(Blow::one, "one cut"); }
TEST_CASE("Whenever all connections are cut, every page arrives") { rounds(Blow::all, "all cut"); }
TEST_CASE("Whenever the page server is stopped and started anew, every page arrives") {
  rounds(Blow::restart, "server anew");
}
TEST_CASE("Whenever the page server goes for good, what has come is right and the rest is lost, with a text") {
  rounds(Blow::gone, "server gone");
}
