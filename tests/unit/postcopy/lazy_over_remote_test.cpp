// SPDX-License-Identifier: MIT
//
// A guest whose memory comes from a page server over TCP or UNIX sockets, while connections are cut and the server is
// stopped and started anew, at moments drawn by lot: each page that the guest reads is right, and so is all of its memory
// in the end.
//
// MULTIFD_MOMENTS says how many; 10 by default.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "multifd/postcopy/lazy_memory.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "support/page_cuts.hpp"
#include "support/page_ends.hpp"
#include "support/skip.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

/// How the source is struck.
enum class Blow { one, all, restart };

void round(Blow blow, bool over_tcp, StoppedGuest& guest, PageStore& store, GuestPages* pages, Rng& rng,
           unsigned& lost) {
  const Watchdog watchdog("lazy memory under blows");
  const std::string path = "/tmp/multifd-lazy-cuts-" + std::to_string(::getpid()) + ".sock";
  Source<NoComp> source(store, pages,
                        over_tcp ? Address{.kind = AddressKind::tcp, .host = "127.0.0.1"}
                                 : Address{.kind = AddressKind::unix_socket, .path = path});
  const Address at = source.address();
  Cutter cutter;
  auto client = RemotePages<FdTransport>::open(
      [&](FetchKind, const Interrupt& interrupt) { return cutter.connect(at, interrupt); },
      {.session = session_of(9),
       .blocks = {{"pc.ram", guest.ram.size()}, {"bios", guest.bios.size()}},
       .page_bytes = 4096});
  REQUIRE_MESSAGE(client.has_value(), text(client));

  const Block ram(guest.ram.size());
  const Block bios(guest.bios.size());
  RamMap map;
  REQUIRE(map.add("pc.ram", ram.bytes()).has_value());
  REQUIRE(map.add("bios", bios.bytes()).has_value());
  const auto regions = regions_of(map);
  REQUIRE_MESSAGE(regions.has_value(), text(regions));
  auto userfaultfd = Userfaultfd::create();
  REQUIRE_MESSAGE(userfaultfd.has_value(), text(userfaultfd));
  auto lazy = LazyMemory::open(std::move(*userfaultfd), *regions, **client, {.fault_threads = 2});
  REQUIRE_MESSAGE(lazy.has_value(), text(lazy));
  const auto started = (*lazy)->start();
  REQUIRE_MESSAGE(started.has_value(), text(started));

  std::atomic<std::size_t> wrong{0};
  std::vector<std::thread> threads;
  for (std::uint64_t number = 0; number < 2; ++number)
    threads.emplace_back([&, own = rng()] {
      Rng order(own);
      for (int i = 0; i < 300; ++i) {
        const std::size_t page = below(order, guest.ram.size() / 4096);
        wrong += !std::ranges::equal(ram.page(page, 4096), guest.ram.page(page, 4096));
      }
    });
  for (std::size_t blows = 1 + below(rng, 3); blows > 0; --blows) {
    std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 8'000)));
    if (blow != Blow::restart) {
      cutter.cut(rng, blow == Blow::all);
      continue;
    }
    source.stop();
    std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 5'000)));
    source.start();
  }
  for (std::thread& thread : threads) thread.join();
  const auto done = (*lazy)->wait(no_hang);
  CHECK_MESSAGE(done.has_value(), text(done));
  CHECK(wrong == 0);
  CHECK(ram == guest.ram);
  CHECK(bios == guest.bios);
  lost += (*lazy)->stats().lost_fetchers > 0;
  const auto finished = (*client)->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(source.whole());
}

}  // namespace

TEST_CASE("A guest on lazy memory sees right bytes, whatever becomes of its connections and its page server") {
  if (const auto made = Userfaultfd::create(); !made) {
    skip("no userfaultfd: " + text(made));
    return;
  }
  Rng rng(seed());
  StoppedGuest guest(1024);
  const auto store = guest.pages();
  unsigned lost = 0;
  const unsigned moments = wanted_moments();
  for (unsigned i = 0; i < moments; ++i) {
    CAPTURE(i);
    const Blow blow = std::array{Blow::one, Blow::all, Blow::restart}[i % 3];
    round(blow, i % 2 == 0, guest, *store, i % 4 < 2 ? store.get() : nullptr, rng, lost);
  }
  MESSAGE(moments << " rounds, fetchers lost in " << lost);
  CHECK(lost > 0);  // else no moment was in a transfer
}
