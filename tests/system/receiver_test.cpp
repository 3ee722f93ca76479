// SPDX-License-Identifier: MIT
#include "multifd/receiver.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/sender.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
using MemoryReceiver = Receiver<MemoryTransport, NoComp>;

}  // namespace

TEST_CASE("Receiver::open refuses what cannot work") {
  GuestRam target(2, std::byte{0});
  CHECK(code_of(MemoryReceiver::open(target.map, {})) == Errc::bad_channel_count);
  CHECK(code_of(MemoryReceiver::open(target.map, memory_links(256, 1).receiver)) == Errc::bad_channel_count);
  CHECK(code_of(MemoryReceiver::open(RamMap{}, memory_links(1).receiver)) == Errc::bad_block_size);
  RamMap with_rom = target.map;
  std::vector<std::byte> rom(page);
  REQUIRE(with_rom.add_read_only("rom", rom).has_value());
  CHECK(code_of(MemoryReceiver::open(with_rom, memory_links(1).receiver)) == Errc::read_only_block);
  CHECK(code_of(Receiver<MemoryTransport, Zstd>::open(target.map, memory_links(1).receiver,
                                                      {.compressor = {.max_window_log = 9}})) == Errc::bad_option);
}

TEST_CASE("open returns within the hello's time limit, also when only one of many channels is missing") {
  const Watchdog watchdog("hello time limit");
  GuestRam target(1, std::byte{0});
  auto links = memory_links(3);
  for (const unsigned id : {0u, 2u})
    REQUIRE(write_all(links.sender[id], std::span<const std::byte>(RawStream().hello(id).bytes())).has_value());
  const Stopwatch watch;
  const auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.hello_timeout = 1s});
  CHECK(code_of(rx) == Errc::timed_out);
  CHECK(rx.error().channel == 1);
  CHECK(watch.elapsed() >= 1s);
  CHECK(watch.elapsed() < no_hang);
}

TEST_CASE("stats() sees the bytes of a packet as they come, not when it is whole") {
  const Watchdog watchdog("bytes of half a packet");
  GuestRam target(128, std::byte{0});
  Packet packet{.payload = Bytes(128 * page, std::byte{7})};
  for (std::uint64_t i = 0; i < 128; ++i) packet.normal.push_back(i * page);
  RawStream stream;
  stream.hello(0).packet(packet).sync();
  const std::span<const std::byte> bytes = stream.bytes();
  for (const bool over_socket : {false, true}) {
    CAPTURE(over_socket);
    const auto run = [&](auto links) {
      using T = std::decay_t<decltype(links.receiver[0])>;
      REQUIRE(write_all(links.sender[0], bytes.first(100)).has_value());
      auto rx = Receiver<T, NoComp>::open(target.map, std::move(links.receiver));
      REQUIRE_MESSAGE(rx.has_value(), text(rx));
      const std::size_t part = bytes.size() / 2;
      REQUIRE(write_all(links.sender[0], bytes.subspan(100, part - 100)).has_value());
      const Stopwatch watch;
      while (rx->stats().channels[0].wire_bytes < part && watch.elapsed() < no_hang) std::this_thread::sleep_for(1ms);
      CHECK(rx->stats().channels[0].wire_bytes == part);
      CHECK(rx->stats().channels[0].packets == 0);
      REQUIRE(write_all(links.sender[0], bytes.subspan(part)).has_value());
      REQUIRE(links.sender[0].finish().has_value());
      CHECK(rx->finish().has_value());
      CHECK(rx->stats().channels[0].wire_bytes == bytes.size());
    };
    if (over_socket)
      run(unix_links(1));
    else
      run(memory_links(1));
  }
}

TEST_CASE("Over memory of unknown content zero pages are written, but only where they must be") {
  Rng rng(seed());
  GuestRam target(4, std::byte{0});
  target.memory.fill(std::byte{0xee});
  fill_page(target.memory.page(2, page), Fill::zero, rng);
  RawStream stream;
  stream.hello(0).packet({.zero = {0, 2 * page}}).sync();
  const auto outcome = feed<NoComp>(target.map, {stream.bytes()}, Then::end_of_stream);
  CHECK(outcome.result.has_value());
  CHECK(std::ranges::all_of(target.memory.page(0, page), [](std::byte b) { return b == std::byte{}; }));
  CHECK(target.memory.page(1, page)[0] == std::byte{0xee});
  CHECK(outcome.stats.zeros_written == 1);
  CHECK(total(outcome.stats.channels).zero_pages == 2);
}

TEST_CASE("Fresh memory stays untouched under zero pages, until it has held something") {
  GuestRam target(4, std::byte{0});
  ReceiverOptions<NoComp> fresh{.into = {.destination = DestinationMemory::zeroed}};
  SUBCASE("no page is touched") {
    RawStream stream;
    stream.hello(0).packet({.zero = {0, page, 2 * page, 3 * page}}).sync();
    CHECK(feed<NoComp>(target.map, {stream.bytes()}, Then::end_of_stream, fresh).result.has_value());
    unsigned char resident[4] = {};
    REQUIRE(::mincore(target.memory.data(), target.memory.size(), resident) == 0);
    for (const unsigned char each : resident) CHECK((each & 1) == 0);
  }
  SUBCASE("written where bytes have come, and not even looked at elsewhere, however often") {
    target.memory.fill(std::byte{0xee});  // a lie, to see it
    RawStream stream;
    stream.hello(0);
    stream.packet({.normal = {page}, .zero = {0, 2 * page}, .payload = Bytes(page, std::byte{5})}).sync();
    stream.packet({.zero = {page, 2 * page}}).sync();
    const auto outcome = feed<NoComp>(target.map, {stream.bytes()}, Then::end_of_stream, fresh);
    CHECK(outcome.result.has_value());
    CHECK(target.memory.page(0, page)[0] == std::byte{0xee});
    CHECK(target.memory.page(1, page)[0] == std::byte{});
    CHECK(target.memory.page(2, page)[0] == std::byte{0xee});
    CHECK(outcome.stats.zeros_written == 1);
  }
}

TEST_CASE("received() knows the pages that arrived, from any thread while they arrive") {
  const Watchdog watchdog("received");
  Rng rng(seed());
  constexpr std::size_t pages = 700;
  GuestRam target(pages, std::byte{0});
  Block source(pages * page);
  RamMap source_map;
  const auto block = source_map.add("pc.ram", source.bytes());
  auto links = memory_links(3);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesMultifd>::open(source_map, std::move(links.sender));
  auto rx = MemoryReceiver::open(target.map, std::move(links.receiver));
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  std::atomic<bool> done = false;
  std::thread watcher([&] {
    std::uint64_t last = 0;
    do {
      const std::uint64_t now = total(rx->stats().channels).wire_bytes;
      CHECK(now >= last);
      last = now;
      (void)rx->received().test(*block, 0);
    } while (!done);
  });
  std::set<std::size_t> sent;
  for (std::size_t p = 0; p < pages; ++p) {
    if (below(rng, 2) == 0) continue;
    fill_page(source.page(p, page), any_fill(rng), rng);
    REQUIRE(tx->queue_page(*block, p * page).has_value());
    sent.insert(p);
  }
  CHECK(tx->close_channels().has_value());
  CHECK(rx->finish().has_value());
  done = true;
  watcher.join();
  for (std::size_t p = 0; p < pages; ++p) CHECK(rx->received().test(*block, p * page) == sent.contains(p));
  std::size_t other = 0;
  while (sent.contains(other)) ++other;
  CHECK(rx->apply_zero(*block, other * page).has_value());
  CHECK(rx->received().test(*block, other * page));
}

TEST_CASE("Pages of a main stream go into memory as those of packets do") {
  for (const bool fresh : {false, true}) {
    CAPTURE(fresh);
    GuestRam target(8, std::byte{0});
    target.memory.fill(std::byte{0xee});  // of fresh memory a lie, to see what is written
    auto links = memory_links(1);
    const Bytes stream =
        RawStream().hello(0).packet({.normal = {page}, .payload = Bytes(page, std::byte{5})}).sync().bytes();
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream)).has_value());
    REQUIRE(links.sender[0].finish().has_value());
    auto rx =
        MemoryReceiver::open(target.map, std::move(links.receiver),
                             {.into = {.destination = fresh ? DestinationMemory::zeroed : DestinationMemory::unknown}});
    REQUIRE(rx.has_value());
    REQUIRE(rx->finish().has_value());
    const BlockId block{0};
    const Bytes bytes(page, std::byte{7});
    CHECK(rx->apply_page(block, 2 * page, bytes).has_value());
    CHECK(rx->apply_page(block, 3 * page, bytes).has_value());
    for (const std::size_t p : {0u, 1u, 3u}) CHECK(rx->apply_zero(block, p * page).has_value());
    for (std::size_t p = 0; p < 8; ++p) CHECK(rx->received().test(block, p * page) == (p < 4));
    CHECK(target.memory.page(0, page)[0] == (fresh ? std::byte{0xee} : std::byte{0}));
    CHECK(target.memory.page(1, page)[0] == std::byte{0});
    CHECK(target.memory.page(2, page)[page - 1] == std::byte{7});
    CHECK(target.memory.page(3, page)[0] == std::byte{0});
    CHECK(target.memory.page(4, page)[0] == std::byte{0xee});
    CHECK(rx->stats().zeros_written == (fresh ? 2 : 3));
    // The numbers may be a peer's.
    CHECK(code_of(rx->apply_zero(block, std::uint64_t{1} << 62)) == Errc::offset_past_block);
    CHECK(code_of(rx->apply_page(block, 8 * page, bytes)) == Errc::offset_past_block);
    CHECK(code_of(rx->apply_zero(block, page + 1)) == Errc::offset_misaligned);
    CHECK(code_of(rx->apply_zero(BlockId{1}, 0)) == Errc::bad_range);
    CHECK(code_of(rx->apply_page(block, 0, std::span(bytes).first(page - 1))) == Errc::bad_range);
  }
}

TEST_CASE("Digests are verified, and a byte that flips on the way is noticed") {
  const Watchdog watchdog("digest");
  Rng rng(seed());
  Block source(16 * page);
  for (std::size_t p = 0; p < 16; ++p) fill_page(source.page(p, page), any_fill(rng), rng);
  RamMap source_map;
  const auto block = source_map.add("pc.ram", source.bytes());
  auto out = captures(1);
  auto tx = Sender<CaptureTransport, NoComp, ZeroPagesMultifd>::open(source_map, std::move(out.links),
                                                                     {.digest = Digest::on});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(*block, 0, source.size()).has_value());
  REQUIRE(tx->close_channels().has_value());
  const Bytes good = out.tapes[0]->bytes;
  const auto packets = packets_of(good);
  REQUIRE(packets.size() == 2);
  CHECK(get(good, packets[0].at + 36, 4) == 0x6d664458);
  {
    GuestRam target(16, std::byte{0});
    const auto outcome = feed<NoComp>(target.map, {good}, Then::end_of_stream);
    CHECK(outcome.result.has_value());
    CHECK(outcome.stats.pages_verified == packets[0].normal);
    CHECK(source == target.memory);
  }
  const std::size_t payload = packets[0].at + 1344;
  for (const std::size_t at : {payload, payload + 4095, payload + packets[0].size - 1, packets[0].at + 40}) {
    CAPTURE(at);
    Bytes flipped = good;
    flipped[at] ^= std::byte{1};
    GuestRam target(16, std::byte{0});
    const auto outcome = feed<NoComp>(target.map, {flipped}, Then::end_of_stream);
    CHECK(code_of(outcome.result) == Errc::digest_mismatch);
    CHECK(outcome.result.error().channel == 0);
  }
}

TEST_CASE_TEMPLATE("Digests go with every compressor", C, NoComp, Zlib, Zstd) {
  const Watchdog watchdog("digest with compression");
  Rng rng(seed());
  GuestRam target(64, std::byte{0});
  Block source(64 * page);
  for (std::size_t p = 0; p < 64; ++p) fill_page(source.page(p, page), any_fill(rng), rng);
  RamMap source_map;
  const auto block = source_map.add("pc.ram", source.bytes());
  auto links = memory_links(2);
  auto tx =
      Sender<MemoryTransport, C, ZeroPagesNone>::open(source_map, std::move(links.sender), {.digest = Digest::on});
  auto rx = Receiver<MemoryTransport, C>::open(target.map, std::move(links.receiver));
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  REQUIRE(tx->queue_range(*block, 0, source.size()).has_value());
  CHECK(tx->close_channels().has_value());
  CHECK(rx->finish().has_value());
  CHECK(rx->stats().pages_verified == 64);
  CHECK(source == target.memory);
}

TEST_CASE("sync is for manual barriers, and finish happens once") {
  const Watchdog watchdog("finish twice");
  GuestRam target(1, std::byte{0});
  auto links = memory_links(1);
  RawStream stream;
  stream.hello(0, std::byte{0x42}).sync();
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
  REQUIRE(links.sender[0].finish().has_value());
  auto rx = MemoryReceiver::open(target.map, std::move(links.receiver));
  REQUIRE(rx.has_value());
  CHECK(rx->peer_uuid()[7] == std::byte{0x42});
  CHECK(code_of(rx->release_epoch()) == Errc::not_supported);
  CHECK(rx->finish().has_value());
  CHECK(code_of(rx->finish()) == Errc::already_closed);
}

TEST_CASE("The manual barrier holds every channel until the caller says so") {
  const Watchdog watchdog("manual barrier");
  GuestRam target(2, std::byte{0});
  auto links = memory_links(2, 1 << 20);
  for (unsigned id = 0; id < 2; ++id) {
    RawStream stream;
    stream.hello(id).sync().packet({.normal = {id * page}, .payload = Bytes(page, std::byte{5})}).sync();
    REQUIRE(write_all(links.sender[id], std::span<const std::byte>(stream.bytes())).has_value());
    REQUIRE(links.sender[id].finish().has_value());
  }
  auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual});
  REQUIRE(rx.has_value());
  CHECK(eventually([&] { return total(rx->stats().channels).syncs == 2; }));
  CHECK(total(rx->stats().channels).normal_pages == 0);
  CHECK(rx->stats().epochs == 0);
  CHECK(rx->release_epoch() == std::uint64_t{0});
  CHECK(rx->release_epoch() == std::uint64_t{1});
  CHECK(total(rx->stats().channels).normal_pages == 2);
  CHECK(target.memory.bytes()[page] == std::byte{5});
  CHECK(rx->finish().has_value());
}

TEST_CASE("The thread hook runs once in each receiving worker") {
  const Watchdog watchdog("receiver's thread hook");
  GuestRam target(1, std::byte{0});
  std::mutex mutex;
  std::set<std::thread::id> threads;
  ReceiverOptions<NoComp> options;
  options.thread_hook = [&](const ThreadInfo& info) {
    const std::scoped_lock lock(mutex);
    CHECK(std::string(info.role) == "recv");
    threads.insert(std::this_thread::get_id());
  };
  const auto outcome = feed<NoComp>(target.map, {RawStream().hello(0).bytes(), RawStream().hello(1).bytes()},
                                    Then::end_of_stream, options);
  CHECK(outcome.result.has_value());
  CHECK(threads.size() == 2);
  CHECK_FALSE(threads.contains(std::this_thread::get_id()));
}

TEST_CASE("No limit, as people write it, is no limit") {
  const Watchdog watchdog("no limit");
  GuestRam target(4, std::byte{0});
  auto links = memory_links(2);
  auto rx = MemoryReceiver::open(
      target.map,
      [&] {
        for (unsigned id = 0; id < 2; ++id)
          REQUIRE(write_all(links.sender[id], std::span<const std::byte>(RawStream().hello(id).bytes())).has_value());
        return std::move(links.receiver);
      }(),
      {.hello_timeout = std::chrono::milliseconds::max(), .barrier_timeout = std::chrono::milliseconds::max()});
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  // Channel 0 is at the barrier before channel 1 has sent its SYNC.
  const Bytes sync = RawStream().sync().bytes();
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(sync)).has_value());
  REQUIRE(eventually([&] { return rx->stats().channels[0].syncs == 1; }));
  REQUIRE(write_all(links.sender[1], std::span<const std::byte>(sync)).has_value());
  for (auto& link : links.sender) REQUIRE(link.finish().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(rx->stats().epochs == 1);
}

TEST_CASE("A device-state packet that arrives together with the data packet before it is refused at once") {
  GuestRam target(4, std::byte{0});
  Bytes state(276 + 4);
  put(state, 0, 0x11223344, 4);
  put(state, 4, 1, 4);
  put(state, 8, 0x40, 4);
  RawStream stream;
  stream.hello(0).packet({.normal = {0}, .payload = Bytes(page)}).raw(state);
  const auto outcome = feed<NoComp>(target.map, {stream.bytes()}, Then::silence);
  CHECK_MESSAGE(code_of(outcome.result) == Errc::device_state_refused, text(outcome.result));
}

TEST_CASE("A channel that is blamed for its silence is not given another channel's packet number") {
  GuestRam target(4, std::byte{0});
  RawStream busy;
  busy.hello(0).packet({.normal = {0}, .payload = Bytes(page)}).sync();
  const auto outcome = feed<NoComp>(target.map, {busy.bytes(), RawStream().hello(1).bytes()}, Then::silence,
                                    {.barrier_timeout = std::chrono::seconds(1)});
  REQUIRE(code_of(outcome.result) == Errc::timed_out);
  CHECK(outcome.result.error().channel == 1);
  CHECK(outcome.result.error().packet == no_packet);
}

TEST_CASE("on_error is called once, with the first error, and not from a destructor") {
  const Watchdog watchdog("on_error");
  GuestRam target(4, std::byte{0});
  std::atomic<int> told = 0;
  Errc what{};
  const auto open = [&](Links<MemoryTransport>& links) {
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(RawStream().hello(0).bytes())).has_value());
    auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.on_error = [&](const Error& error) {
                                     what = Errc(error.code.value());
                                     ++told;
                                   }});
    REQUIRE(rx.has_value());
    return std::move(*rx);
  };
  auto first = memory_links(1);
  {
    const auto dropped = open(first);
  }
  CHECK(told == 0);
  auto second = memory_links(1);
  auto rx = open(second);
  rx.cancel();
  rx.cancel();
  CHECK(code_of(rx.finish()) == Errc::cancelled);
  CHECK(told == 1);
  CHECK(what == Errc::cancelled);
}

TEST_CASE("sync after a finish that went well changes nothing") {
  const Watchdog watchdog("sync after finish");
  GuestRam target(4, std::byte{0});
  auto links = memory_links(1);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(RawStream().hello(0).bytes())).has_value());
  REQUIRE(links.sender[0].finish().has_value());
  auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual});
  REQUIRE(rx.has_value());
  REQUIRE(rx->finish().has_value());
  CHECK(code_of(rx->release_epoch()) == Errc::already_closed);
  CHECK(code_of(rx->finish()) == Errc::already_closed);
}

TEST_CASE(
    "finish(limit) and end_epochs() end the epochs: none can be released, and a SYNC that comes is one too many") {
  const Watchdog watchdog("no epoch behind the end");
  for (const bool by_finish : {true, false})
    for (const bool sync_comes : {true, false}) {
      CAPTURE(by_finish);
      CAPTURE(sync_comes);
      GuestRam target(4, std::byte{0});
      auto links = memory_links(1);
      const auto send = [&](const RawStream& stream) {
        REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
      };
      send(RawStream().hello(0).sync());
      auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual});
      REQUIRE(rx.has_value());
      CHECK(rx->release_epoch() == std::uint64_t{0});
      if (by_finish)
        CHECK(code_of(rx->finish(0ms)) == Errc::timed_out);
      else
        CHECK(rx->end_epochs().has_value());
      CHECK(code_of(rx->release_epoch()) == Errc::already_closed);
      if (sync_comes) {
        send(RawStream().sync());
        CHECK(code_of(rx->finish(no_hang)) == Errc::sync_mismatch);
        CHECK(code_of(rx->release_epoch()) == Errc::sync_mismatch);
      } else {  // that call has cost nothing
        REQUIRE(links.sender[0].finish().has_value());
        CHECK(rx->finish(no_hang).has_value());
        CHECK(code_of(rx->release_epoch()) == Errc::already_closed);
      }
    }
}

TEST_CASE("An epoch of nothing but zero pages on the main stream ends with SYNCs at close") {
  const Watchdog watchdog("zero epoch");
  GuestRam source(4, std::byte{0});
  GuestRam target(4, std::byte{0});
  auto links = memory_links(2);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesLegacy>::open(source.map, std::move(links.sender));
  auto rx = MemoryReceiver::open(target.map, std::move(links.receiver), {.barrier = Barrier::manual});
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  int zeros = 0;
  REQUIRE(tx->queue_range(BlockId{0}, 0, 4 * page, [&](std::uint64_t) { ++zeros; }).has_value());
  CHECK(zeros == 4);
  REQUIRE(tx->close_channels().has_value());
  const auto epoch = rx->release_epoch();
  CHECK_MESSAGE(epoch.has_value(), text(epoch));
  CHECK(rx->finish().has_value());
}
