// SPDX-License-Identifier: MIT
#include "multifd/postcopy/page_server.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "multifd/postcopy/guest_pages.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "support/allocation_count.hpp"
#include "support/page_ends.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

/// The pages of some memory that the kernel has.
std::size_t resident(std::span<const std::byte> memory) {
  std::vector<unsigned char> pages(memory.size() / 4096);
  REQUIRE(::mincore(const_cast<std::byte*>(memory.data()), memory.size(), pages.data()) == 0);
  return static_cast<std::size_t>(std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; }));
}

}  // namespace

TEST_CASE("GuestPages says what is zero, and reads no page that was never touched, however often it is asked for") {
  const StoppedGuest guest(2000);
  const std::size_t before = resident(guest.ram.bytes());
  REQUIRE(before < 1900);
  const auto store = guest.pages();
  Rng rng(seed());
  std::string wrong;
  std::size_t zero = 0;
  for (int round = 0; round < 3; ++round) {
    auto fetcher = store->open(FetchKind::background);
    REQUIRE(fetcher.has_value());
    for (const PageRange& range : all_ranges(*store, 100 * 4096, rng)) {
      REQUIRE((*fetcher)->ask(range).has_value());
      const auto fetched = (*fetcher)->take();
      REQUIRE(fetched.has_value());
      zero += range.bytes / 4096 - fetched->offsets.size();
      for (std::size_t i = 0; i < fetched->offsets.size(); ++i)
        CHECK(!buffer_is_zero(fetched->bytes.data() + i * 4096, 4096));
    }
  }
  CHECK(zero >= 3 * (2000 - before));
  CHECK(resident(guest.ram.bytes()) == before);
  CHECK(fetch(*store, FetchKind::urgent, all_ranges(*store, 7 * 4096, rng), guest.map, wrong).has_value());
  CHECK(wrong == "");

  auto fetcher = store->open(FetchKind::urgent);
  REQUIRE(fetcher.has_value());
  (*fetcher)->cancel();
  CHECK(code_of((*fetcher)->ask({BlockId{0}, 0, 4096})) == Errc::cancelled);
}

TEST_CASE("GuestPages wants memory, and a page server wants options within their bounds") {
  RamMap map;
  CHECK(code_of(GuestPages::open(map)) == Errc::bad_option);
  REQUIRE(map.add_elsewhere("pc.ram", 4096).has_value());
  CHECK(code_of(GuestPages::open(map)) == Errc::block_without_memory);

  const StoppedGuest guest(4);
  const auto store = guest.pages();
  using Server = PageServer<MemoryTransport>;
  CHECK(code_of(Server::open(*store, {.max_connections = 0})) == Errc::bad_option);
  CHECK(code_of(Server::open(*store, {.hello_timeout = -1ms})) == Errc::bad_option);
  CHECK(code_of(Server::open(*store, {.progress_timeout = -1ms})) == Errc::bad_option);
  CHECK(code_of(Server::open(*store, {.piece_bytes = 0})) == Errc::bad_option);
  const auto connect = [](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
    return fail(Errc::not_supported, Stage::connect);
  };
  using Client = RemotePages<MemoryTransport>;
  CHECK(code_of(Client::open(connect, {.window = 0})) == Errc::bad_option);
  CHECK(code_of(Client::open(connect, {.window = 17})) == Errc::bad_option);
  CHECK(code_of(Client::open(connect, {.page_bytes = 4095})) == Errc::bad_page_size);
  CHECK(code_of(Client::open(connect, {.blocks = {{"pc.ram", 4096}}})) == Errc::bad_page_size);
  CHECK(code_of(Client::open(connect, {.reconnect_timeout = -1ms})) == Errc::bad_option);
  CHECK(code_of(Client::open(connect)) == Errc::not_supported);
}

TEST_CASE("It does not matter which side has dialled, nor in whose thread a connection is served") {
  const Watchdog watchdog("dial");
  StoppedGuest guest(64);
  const auto store = guest.pages();
  auto server = PageServer<FdTransport>::open(*store);
  REQUIRE(server.has_value());
  auto listener = Listener::listen({.host = "127.0.0.1"});
  REQUIRE(listener.has_value());
  // The source dials, and serves in a thread of its own making; the destination takes what comes.
  std::thread source([&] {
    for (int i = 0; i < 2; ++i) {
      auto link = connect_to(listener->local_address());
      REQUIRE(link.has_value());
      const auto served = (*server)->serve(std::move(*link));
      CHECK_MESSAGE(served.has_value(), text(served));
    }
  });
  auto client = RemotePages<FdTransport>::open(
      [&](FetchKind, const Interrupt& interrupt) { return listener->accept(20s, &interrupt); },
      {.blocks = {{"pc.ram", guest.ram.size()}, {"bios", guest.bios.size()}}, .page_bytes = 4096});
  REQUIRE_MESSAGE(client.has_value(), text(client));
  Rng rng(seed());
  std::string wrong;
  const auto fetched = fetch(**client, FetchKind::background, all_ranges(**client, 65536, rng), guest.map, wrong);
  (*client)->cancel();  // as a LazyMemory does at its end: nothing is fetched any more
  CHECK_MESSAGE(fetched.has_value(), text(fetched));
  CHECK(wrong == "");
  CHECK((*client)->finish().has_value());
  source.join();
  CHECK((*server)->whole());
  CHECK((*server)->stats().connections_failed == 0);
}

TEST_CASE("A page server over the pages of another one") {
  const Watchdog watchdog("chain");
  ServedGuest<NoComp> first(200);
  auto middle = first.client();
  auto server = PageServer<MemoryTransport>::open(static_cast<PageStore&>(*middle));
  REQUIRE_MESSAGE(server.has_value(), text(server));
  auto last = RemotePages<MemoryTransport>::open([&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
    auto links = memory_links(1);
    if (auto added = (*server)->add(std::move(links.receiver[0])); !added) return std::unexpected(added.error());
    return std::move(links.sender[0]);
  });
  REQUIRE_MESSAGE(last.has_value(), text(last));
  Rng rng(seed());
  std::string wrong;
  for (const FetchKind kind : {FetchKind::urgent, FetchKind::background}) {
    const auto fetched = fetch(**last, kind, all_ranges(**last, 17 * 4096, rng), first.guest.map, wrong);
    CHECK_MESSAGE(fetched.has_value(), text(fetched));
    CHECK(wrong == "");
  }
  // When the first server goes, the last client hears of a lost connection, which may come again.
  auto fetcher = (*last)->open(FetchKind::urgent);
  REQUIRE(fetcher.has_value());
  first.server->cancel();
  const auto asked = (*fetcher)->ask({BlockId{0}, 0, 4096});
  const Error error = asked ? (*fetcher)->take().error() : asked.error();
  CHECK_MESSAGE((*last)->may_return(error), text(error));
  middle->cancel();
}

TEST_CASE("A store that fails for good is told to the client, by the store's words") {
  const Watchdog watchdog("broken store");
  struct Broken final : PageStore {
    struct Fetcher final : PageFetcher {
      unsigned window() const noexcept override { return 3; }
      void cancel() noexcept override {}
      Result<void> do_ask(const PageRange&) noexcept override { return {}; }
      Result<FetchedPages> do_take() noexcept override {
        return fail(Errc::truncated_image, Stage::read, "page of the image", 4096, 8192, "guest.img");
      }
    };
    std::vector<StoreBlock> list{{"pc.ram", 1 << 20}};
    std::span<const StoreBlock> blocks() const noexcept override { return list; }
    std::size_t page_bytes() const noexcept override { return 4096; }
    bool may_return(const Error&) const noexcept override { return false; }
    void cancel() noexcept override {}
    Result<std::unique_ptr<PageFetcher>> do_open(FetchKind) noexcept override { return std::make_unique<Fetcher>(); }
  } store;
  auto server = PageServer<MemoryTransport>::open(static_cast<PageStore&>(store));
  REQUIRE(server.has_value());
  auto client = RemotePages<MemoryTransport>::open([&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
    auto links = memory_links(1);
    if (auto added = (*server)->add(std::move(links.receiver[0])); !added) return std::unexpected(added.error());
    return std::move(links.sender[0]);
  });
  REQUIRE(client.has_value());
  auto fetcher = (*client)->open(FetchKind::background);
  REQUIRE(fetcher.has_value());
  for (std::uint64_t i = 0; i < 4; ++i) REQUIRE((*fetcher)->ask({BlockId{0}, i * 4096, 4096}).has_value());
  const auto fetched = (*fetcher)->take();
  REQUIRE(!fetched.has_value());
  CHECK(fetched.error().code == Errc::peer_gave_up);
  CHECK(fetched.error().peer_reason == Errc::truncated_image);
  CHECK(text(fetched).contains("guest.img"));
  CHECK(!(*client)->may_return(fetched.error()));
}

TEST_CASE("cancel() from another thread ends whatever a client or a server waits for") {
  for (int moment = 0; moment < (quick() ? 10 : 40); ++moment) {
    CAPTURE(moment);
    const Watchdog watchdog("cancel");
    ServedGuest<NoComp> served(64);
    auto client = served.client();
    std::atomic<PageFetcher*> busy{nullptr};
    std::atomic<bool> asked_in_vain{false};
    Result<void> ended;
    std::thread worker([&] {
      auto fetcher = client->open(FetchKind::urgent);
      if (!fetcher) {
        ended = std::unexpected(fetcher.error());
        return;
      }
      busy.store(fetcher->get(), std::memory_order_release);
      for (std::uint64_t page = 0;; page = (page + 1) % 64) {
        ended = (*fetcher)->ask({BlockId{0}, page * 4096, 4096});
        if (ended) {
          auto fetched = (*fetcher)->take();
          if (!fetched) ended = std::unexpected(fetched.error());
        }
        if (!ended) break;
      }
      // Now and later.
      if (moment % 2 == 0 && (*fetcher)->ask({BlockId{0}, 0, 4096})) asked_in_vain = (*fetcher)->take().has_value();
      while (busy.load(std::memory_order_acquire) != nullptr) std::this_thread::yield();  // not gone under cancel()
    });
    REQUIRE(eventually([&] { return busy.load(std::memory_order_acquire) != nullptr; }));
    std::this_thread::sleep_for(std::chrono::microseconds(moment * 7));
    if (moment % 2 == 0)
      busy.load()->cancel();
    else
      served.server->cancel();
    busy.store(nullptr, std::memory_order_release);
    worker.join();
    REQUIRE(!ended.has_value());
    if (moment % 2 == 0)
      CHECK_MESSAGE(ended.error().code == Errc::cancelled, text(ended));
    else
      CHECK_MESSAGE(client->may_return(ended.error()), text(ended));
    CHECK(!asked_in_vain);
  }
}

TEST_CASE(
    "A cap holds the background back, and nothing that a guest waits for, until it is lifted or all is cancelled") {
  const Watchdog watchdog("capped");
  for (const bool lifted : {true, false}) {
    CAPTURE(lifted);
    ServedGuest<NoComp> served(64, 4096, {.bandwidth = 1});
    auto client = served.client();
    std::atomic<unsigned> answers{0};
    Result<void> ended;
    std::thread background([&] {
      auto fetcher = client->open(FetchKind::background);
      if (!fetcher) ended = std::unexpected(fetcher.error());
      for (unsigned i = 0; ended && i < 4; ++i) {
        ended = (*fetcher)->ask({BlockId{1}, 0, 4096});
        if (!ended) break;
        const auto fetched = (*fetcher)->take();
        if (fetched)
          ++answers;
        else
          ended = std::unexpected(fetched.error());
      }
    });
    REQUIRE(eventually([&] { return served.server->stats().serving == 1; }));
    auto urgent = client->open(FetchKind::urgent);
    REQUIRE_MESSAGE(urgent.has_value(), text(urgent));
    for (std::uint64_t page = 0; page < 64; ++page) {
      REQUIRE((*urgent)->ask({BlockId{0}, page * 4096, 4096}).has_value());
      REQUIRE((*urgent)->take().has_value());
    }
    CHECK(answers == 0);
    if (lifted)
      served.server->set_bandwidth(0);
    else
      served.server->cancel();
    background.join();
    CHECK(answers == (lifted ? 4 : 0));
    CHECK(ended.has_value() == lifted);
  }
}

TEST_CASE("cancel() ends an open() that waits for a server, and the wait for the guest to be whole") {
  const Watchdog watchdog("cancel open");
  ServedGuest<NoComp> served(4);
  std::atomic<int> tries{0};
  std::vector<MemoryTransport> silent;
  for (const bool mute : {false, true}) {
    tries = 0;
    auto client = RemotePages<MemoryTransport>::open(
        [&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
          ++tries;
          if (!mute) return fail_errno(Stage::connect, "connect", ECONNREFUSED);
          auto links = memory_links(1);
          silent.push_back(std::move(links.receiver[0]));
          return std::move(links.sender[0]);
        },
        {.blocks = {{"pc.ram", 4096}}, .page_bytes = 4096, .hello_timeout = 0ms});
    REQUIRE(client.has_value());
    Result<std::unique_ptr<PageFetcher>> opened;
    std::thread waiting([&] { opened = (*client)->open(FetchKind::background); });
    CHECK(eventually([&] { return tries >= (mute ? 1 : 3); }));
    (*client)->cancel();
    waiting.join();
    CHECK(code_of(opened) == Errc::cancelled);
    CHECK(code_of((*client)->open(FetchKind::urgent)) == Errc::cancelled);
  }

  // finish() has a time limit and a switch of its own.
  auto unheard = RemotePages<MemoryTransport>::open(
      [&](FetchKind, const Interrupt&) -> Result<MemoryTransport> {
        return fail_errno(Stage::connect, "connect", ECONNREFUSED);
      },
      {.blocks = {{"pc.ram", 4096}}, .page_bytes = 4096});
  REQUIRE(unheard.has_value());
  const auto late = (*unheard)->finish(20ms);
  CHECK(code_of(late) == Errc::timed_out);
  CHECK(late.error().peer_reason == std::error_code(ECONNREFUSED, std::system_category()));
  auto interrupt = Interrupt::create();
  interrupt->trigger();
  CHECK(code_of((*unheard)->finish(0ms, &*interrupt)) == Errc::cancelled);

  CHECK(code_of(served.server->wait_until_whole(0ms)) == Errc::timed_out);
  Result<void> whole;
  std::thread waiting([&] { whole = served.server->wait_until_whole(no_timeout); });
  served.server->cancel();
  waiting.join();
  CHECK(code_of(whole) == Errc::cancelled);
  auto links = memory_links(1);
  CHECK(code_of(served.server->serve(std::move(links.receiver[0]))) == Errc::cancelled);
}

TEST_CASE("Once connected, nothing is allocated for a page") {
  const Watchdog watchdog("allocation");
  ServedGuest<NoComp> served(256);
  auto client = served.client();
  for (const FetchKind kind : {FetchKind::urgent, FetchKind::background}) {
    auto fetcher = client->open(kind);
    REQUIRE(fetcher.has_value());
    const auto ask = [&](std::uint64_t page, std::uint64_t pages) {
      if (!(*fetcher)->ask({BlockId{0}, page * 4096, pages * 4096})) return false;
      return (*fetcher)->take().has_value();
    };
    REQUIRE(ask(0, 1));
    const auto before = allocations();
    bool good = true;
    for (std::uint64_t page = 0; page < 128; ++page) good = good && ask(page, 1) && ask(page, 100);
    CHECK(good);
    CHECK(allocations() == before);
  }
}
