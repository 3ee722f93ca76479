// SPDX-License-Identifier: MIT
#include "multifd/sender.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;

template <class C, class Z>
using CaptureSender = Sender<CaptureTransport, C, Z>;

/// A source of one block.
}  // namespace

TEST_CASE("Sender::open refuses what cannot work") {
  GuestRam source(4);
  const auto none = [&](auto links, SenderOptions<NoComp, ZeroPagesNone> options = {}) {
    return code_of(CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(links), std::move(options)));
  };
  CHECK(none(captures(0).links) == Errc::bad_channel_count);
  CHECK(none(captures(256).links) == Errc::bad_channel_count);
  CHECK(none(captures(1).links, {.depth = 1}) == Errc::bad_option);
  CHECK(none(captures(1).links, {.depth = 17}) == Errc::bad_option);
  CHECK(none(captures(1).links, {.peer = *find_peer_profile("qemu-11.0"), .digest = Digest::on}) == Errc::bad_option);
  CHECK(code_of(CaptureSender<NoComp, ZeroPagesNone>::open(RamMap{}, captures(1).links)) == Errc::bad_block_size);
  CHECK(code_of(CaptureSender<Zlib, ZeroPagesNone>::open(source.map, captures(1).links,
                                                         {.compressor = {.level = 10}})) == Errc::bad_option);
  CHECK(code_of(CaptureSender<Zstd, ZeroPagesNone>::open(source.map, captures(1).links,
                                                         {.compressor = {.level = 23}})) == Errc::bad_option);
}

TEST_CASE("Zero lists are refused towards peers that would drop them, and only towards those") {
  GuestRam source(1);
  for (const PeerProfile& peer : peer_profiles) {
    CAPTURE(std::string(peer.name));
    const bool old = peer.name.starts_with("qemu-7.") || peer.name.starts_with("qemu-8.");
    auto multifd_mode = CaptureSender<NoComp, ZeroPagesMultifd>::open(source.map, captures(1).links, {.peer = peer});
    CHECK(multifd_mode.has_value() != old);
    if (old) CHECK(code_of(multifd_mode) == Errc::peer_lacks_zero_lists);
    CHECK(CaptureSender<NoComp, ZeroPagesLegacy>::open(source.map, captures(1).links, {.peer = peer}).has_value());
    CHECK(CaptureSender<NoComp, ZeroPagesNone>::open(source.map, captures(1).links, {.peer = peer}).has_value());
  }
}

TEST_CASE("255 channels work") {
  const Watchdog watchdog("255 channels", 120s);
  GuestRam source(300);
  auto out = captures(255);
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links));
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  CHECK(tx->close_channels().has_value());
  for (std::size_t i = 0; i < 255; ++i) {
    CHECK(out.tapes[i]->finished);
    CHECK(get(out.tapes[i]->bytes, 24, 1) == i);
  }
  CHECK(total(tx->stats().channels).syncs == 255);
}

TEST_CASE("A bad range queues nothing, and the sender goes on") {
  GuestRam source(8);
  std::vector<std::byte> other(page);
  auto out = captures(1);
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links));
  REQUIRE(tx.has_value());
  const std::uint64_t size = 8 * page;
  const std::pair<std::uint64_t, std::uint64_t> ranges[] = {{1, page},
                                                            {0, 1},
                                                            {0, page - 1},
                                                            {page / 2, page},
                                                            {size, page},
                                                            {0, size + page},
                                                            {page, size},
                                                            {size - page, 2 * page},
                                                            {~std::uint64_t{0} - page + 1, page},
                                                            {page, ~std::uint64_t{0} - page + 1},
                                                            {0, ~std::uint64_t{0} - page + 1}};
  for (const auto& [offset, bytes] : ranges) {
    CAPTURE(offset);
    CAPTURE(bytes);
    CHECK(code_of(tx->queue_range(source.block, offset, bytes)) == Errc::bad_range);
  }
  CHECK(code_of(tx->queue_page(source.block, 3)) == Errc::bad_range);
  CHECK(code_of(tx->queue_page(source.block, size)) == Errc::bad_range);
  CHECK(code_of(tx->queue_page(BlockId{1}, 0)) == Errc::bad_range);
  CHECK(code_of(tx->queue_range(BlockId{77}, 0, page)) == Errc::bad_range);
  const std::uint64_t bit = 1;
  CHECK(code_of(tx->queue_dirty(BlockId{1}, std::span(&bit, 1))) == Errc::bad_range);
  CHECK(tx->stats().queued_pages == 0);
  CHECK(tx->queue_range(source.block, 0, 0)->queued == 0);
  CHECK(tx->queue_range(source.block, size, 0).has_value());
  CHECK(tx->queue_page(source.block, size - page) == Queued::queued);
  CHECK(tx->close_channels().has_value());
  const auto packets = packets_of(out.tapes[0]->bytes);
  REQUIRE(packets.size() == 2);
  CHECK(packets[0].offsets == std::vector<std::uint64_t>{size - page});
  CHECK(packets[1].flags == 1);
}

TEST_CASE("queue_dirty sends exactly the pages whose bits are set") {
  const Watchdog watchdog("queue_dirty");
  Rng rng(seed());
  constexpr std::size_t pages = 400;  // no multiple of 64
  GuestRam source(pages);
  const int runs = quick() ? 60 : 400;
  for (int run = 0; run < runs; ++run) {
    CAPTURE(run);
    CAPTURE(seed());
    const std::size_t first = below(rng, 4) == 0 ? 0 : below(rng, pages + 1);
    std::vector<std::uint64_t> bitmap(below(rng, 8));
    // From single bits to runs over several words.
    for (std::uint64_t& word : bitmap) switch (rng() % 6) {
        case 0: word = 0; break;
        case 1: word = ~std::uint64_t{0}; break;
        case 2: word = rng(); break;
        case 3: word = rng() & rng() & rng(); break;
        case 4: word = ~std::uint64_t{0} << rng() % 64; break;
        case 5: word = ~std::uint64_t{0} >> rng() % 64; break;
      }
    std::vector<std::uint64_t> expected;
    bool past_the_end = false;
    for (std::size_t i = 0; i < bitmap.size() * 64; ++i) {
      if ((bitmap[i / 64] >> (i % 64) & 1) == 0) continue;
      expected.push_back((first + i) * page);
      past_the_end |= first + i >= pages;
    }
    auto out = captures(1);
    auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links));
    REQUIRE(tx.has_value());
    auto done = tx->queue_dirty(source.block, bitmap, first);
    if (past_the_end) {
      CHECK(code_of(done) == Errc::bad_range);
      expected.clear();
    } else {
      REQUIRE_MESSAGE(done.has_value(), text(done));
      CHECK(done->queued == expected.size());
    }
    REQUIRE(tx->close_channels().has_value());
    std::vector<std::uint64_t> sent;
    for (const SeenPacket& packet : packets_of(out.tapes[0]->bytes))
      sent.insert(sent.end(), packet.offsets.begin(), packet.offsets.end());
    CHECK(sent == expected);  // one channel keeps the order
  }
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, captures(1).links);
  REQUIRE(tx.has_value());
  const std::uint64_t clear = 0;
  CHECK(code_of(tx->queue_dirty(source.block, std::span(&clear, 1), pages + 1)) == Errc::bad_range);
  CHECK(tx->queue_dirty(source.block, std::span(&clear, 1), pages).has_value());
  CHECK(tx->queue_dirty(source.block, {}).has_value());
}

TEST_CASE("What a sender writes is what the formats' text says") {
  Rng rng(seed());
  GuestRam source(300);
  Block rom(2 * page);
  rom.fill(std::byte{9});
  const auto rom_id = source.map.add_read_only("rom", rom.bytes());
  REQUIRE(rom_id.has_value());
  fill_page(source.memory.page(3, page), Fill::zero, rng);
  fill_page(source.memory.page(130, page), Fill::zero, rng);
  Uuid uuid;
  for (std::size_t i = 0; i < 16; ++i) uuid[i] = std::byte(i);
  auto out = captures(1);
  auto tx = CaptureSender<NoComp, ZeroPagesMultifd>::open(source.map, std::move(out.links),
                                                          {.uuid = uuid, .peer = *find_peer_profile("qemu-9.0")});
  REQUIRE(tx.has_value());
  CHECK(tx->queue_range(source.block, 0, source.memory.size())->queued == 300);
  CHECK(tx->queue_range(*rom_id, 0, rom.size())->queued == 2);
  REQUIRE(tx->close_channels().has_value());
  const Bytes& bytes = out.tapes[0]->bytes;
  Bytes hello(64);
  put(hello, 0, 0x11223344, 4);
  put(hello, 4, 1, 4);
  std::ranges::copy(uuid, hello.begin() + 8);
  CHECK(std::ranges::equal(std::span(bytes).first(64), hello));
  const auto packets = packets_of(bytes);
  REQUIRE(packets.size() == 5);  // 128 + 128 + 44 of the first block, 2 of the second, SYNC
  const std::uint32_t normal[] = {127, 127, 44, 2, 0};
  const std::uint32_t zero[] = {1, 1, 0, 0, 0};
  for (std::size_t i = 0; i < 5; ++i) {
    const SeenPacket& packet = packets[i];
    CAPTURE(i);
    CHECK(packet.normal == normal[i]);
    CHECK(packet.zero == zero[i]);
    CHECK(packet.size == normal[i] * page);
    CHECK(packet.flags == (i == 4 ? 1 : 0));
    CHECK(packet.idstr == (i < 3 ? "pc.ram" : i == 3 ? "rom" : ""));
    CHECK(get(bytes, packet.at + 12, 4) == (i == 4 ? 0 : 128));
    CHECK(get(bytes, packet.at + 24, 8) == i);
    // Nothing of ours and nothing stale towards QEMU: reserved bytes and unused slots are zero.
    const auto all_zero = [&](std::size_t from, std::size_t to) {
      return std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(packet.at + from),
                         bytes.begin() + static_cast<std::ptrdiff_t>(packet.at + to),
                         [](std::byte b) { return b == std::byte{}; });
    };
    CHECK(all_zero(36, 64));
    CHECK(all_zero(64 + packet.idstr.size(), 320));
    CHECK(all_zero(320 + 8 * packet.offsets.size(), 1344));
  }
  CHECK(packets[0].offsets.back() == 3 * page);
  CHECK(packets[1].offsets.back() == 130 * page);
}

TEST_CASE("With ZeroPagesLegacy zero pages go to the caller and not to a channel") {
  Rng rng(seed());
  GuestRam source(200);
  std::set<std::uint64_t> zero;
  for (const std::size_t p : {0u, 63u, 64u, 65u, 128u, 199u}) {
    fill_page(source.memory.page(p, page), Fill::zero, rng);
    zero.insert(p * page);
  }
  auto out = captures(1);
  auto tx = CaptureSender<NoComp, ZeroPagesLegacy>::open(source.map, std::move(out.links),
                                                         {.peer = *find_peer_profile("qemu-7.2")});
  REQUIRE(tx.has_value());
  std::set<std::uint64_t> reported;
  const auto on_zero = [&](std::uint64_t offset) { CHECK(reported.insert(offset).second); };
  const auto range = tx->queue_range(source.block, 0, source.memory.size(), on_zero);
  CHECK(range->queued == 194);
  CHECK(range->zero_on_main == 6);
  CHECK(reported == zero);
  reported.clear();
  std::vector<std::uint64_t> bitmap = {1, 3};
  CHECK(tx->queue_dirty(source.block, bitmap, 0, on_zero)->zero_on_main == 3);
  CHECK(reported == std::set<std::uint64_t>{0, 64 * page, 65 * page});
  CHECK(tx->queue_page(source.block, 0) == Queued::zero_on_main);
  CHECK(tx->queue_page(source.block, page) == Queued::queued);
  REQUIRE(tx->close_channels().has_value());
  CHECK(tx->stats().zero_on_main == 10);
  for (const SeenPacket& packet : packets_of(out.tapes[0]->bytes))
    for (const std::uint64_t offset : packet.offsets) CHECK_FALSE(zero.contains(offset));
}

TEST_CASE("close_epoch() counts epochs from 0 and does not wait, wait() does") {
  const Watchdog watchdog("sync and wait");
  GuestRam source(4);
  auto links = memory_links(1, 1 << 20);
  auto gate = std::make_shared<Gate>(false);
  auto tx = Sender<GatedTransport<MemoryTransport>, NoComp, ZeroPagesNone>::open(
      source.map, one(GatedTransport(std::move(links.sender[0]), gate)));
  REQUIRE(tx.has_value());
  CHECK(code_of(tx->wait(0)) == Errc::bad_range);
  REQUIRE(tx->queue_page(source.block, 0).has_value());
  for (std::uint64_t epoch = 0; epoch < 20; ++epoch)
    CHECK(tx->close_epoch() == epoch);  // many more than the queue is deep
  CHECK(tx->stats().epochs == 20);
  CHECK(tx->stats().channels[0].syncs == 0);
  CHECK(code_of(tx->wait(20)) == Errc::bad_range);
  std::atomic<bool> waited = false;
  std::thread waiter([&] {
    CHECK(tx->wait(19).has_value());
    CHECK(tx->stats().channels[0].syncs == 20);
    waited = true;
  });
  CHECK(gate->wait_for_visitor());
  CHECK_FALSE(waited);
  gate->open();
  waiter.join();
  CHECK(tx->close_epoch_and_wait() == std::uint64_t{20});
  CHECK(tx->close_channels().has_value());
  CHECK(code_of(tx->close_channels()) == Errc::already_closed);
  CHECK(code_of(tx->queue_page(source.block, 0)) == Errc::already_closed);
  CHECK(code_of(tx->close_epoch()) == Errc::already_closed);
  CHECK(code_of(tx->push_out()) == Errc::already_closed);
}

TEST_CASE("Blocked channels hold up their own packets only") {
  const Watchdog watchdog("blocked channels");
  constexpr std::size_t batches = 120;
  GuestRam source(batches * 128);
  const auto run = [&](unsigned channels, unsigned blocked) {
    CAPTURE(channels);
    CAPTURE(blocked);
    auto out = captures(channels);
    std::vector<std::shared_ptr<Gate>> gates;
    std::vector<GatedTransport<CaptureTransport>> links;
    for (unsigned i = 0; i < channels; ++i) {
      gates.push_back(std::make_shared<Gate>(i >= blocked));
      links.emplace_back(std::move(out.links[i]), gates.back());
    }
    auto tx = Sender<GatedTransport<CaptureTransport>, NoComp, ZeroPagesNone>::open(source.map, std::move(links));
    REQUIRE(tx.has_value());
    for (unsigned i = 0; i < blocked; ++i) REQUIRE(gates[i]->wait_for_visitor());
    // Returns, and the free channels have it all, but for what fits into the queues of the blocked ones.
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    REQUIRE(tx->push_out().has_value());
    CHECK(eventually([&] { return total(tx->stats().channels).packets >= batches - blocked * 4; }));
    for (unsigned i = 0; i < blocked; ++i) CHECK(tx->stats().channels[i].packets == 0);
    for (const auto& gate : gates) gate->open();
    CHECK(tx->close_channels().has_value());
    CHECK(total(tx->stats().channels).packets == batches);
  };
  run(2, 1);
  run(4, 1);
  run(8, 1);
  run(8, 4);
  run(8, 7);  // the last free channel returns fewer batches than a quarter of all
}

TEST_CASE("Pages keep their order within a channel and their epoch") {
  const Watchdog watchdog("order");
  Rng rng(seed());
  GuestRam source(2000);
  auto out = captures(3);
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links));
  REQUIRE(tx.has_value());
  std::map<std::uint64_t, std::uint64_t> epoch_of;
  std::uint64_t next = 0;
  for (std::uint64_t epoch = 0; epoch < 30; ++epoch) {
    for (std::size_t n = below(rng, 130); n > 0 && next < 2000; --n, ++next) {
      REQUIRE(tx->queue_page(source.block, next * page).has_value());
      epoch_of[next * page] = epoch;
    }
    CHECK(tx->close_epoch() == epoch);
  }
  CHECK(tx->close_channels().has_value());
  std::size_t pages = 0;
  for (const auto& tape : out.tapes) {
    std::uint64_t epoch = 0;
    std::uint64_t last = 0;
    for (const SeenPacket& packet : packets_of(tape->bytes)) {
      for (const std::uint64_t offset : packet.offsets) {
        CHECK(epoch_of[offset] == epoch);
        CHECK(offset >= last);
        last = offset;
        ++pages;
      }
      epoch += packet.flags & 1;
    }
    CHECK(epoch == 30);
  }
  CHECK(pages == next);
}

TEST_CASE("flush lets pages leave without a sync") {
  const Watchdog watchdog("flush");
  GuestRam source(4);
  auto out = captures(2);
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links));
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_page(source.block, 0).has_value());
  CHECK(tx->push_out().has_value());
  CHECK(eventually([&] { return total(tx->stats().channels).packets == 1; }));
  CHECK(total(tx->stats().channels).syncs == 0);
  CHECK(tx->close_channels().has_value());
  CHECK(total(tx->stats().channels).syncs == 2);  // close_channels() syncs what was queued since
}

TEST_CASE("stats may be asked for all the time, from another thread") {
  const Watchdog watchdog("stats");
  GuestRam source(4000);
  auto tx = CaptureSender<Zstd, ZeroPagesMultifd>::open(source.map, captures(3).links);
  REQUIRE(tx.has_value());
  std::atomic<bool> done = false;
  std::uint64_t asked = 0;
  std::thread watcher([&] {
    ChannelStats last;
    do {
      const SenderStats now = tx->stats();
      const ChannelStats sum = total(now.channels);
      CHECK(sum.packets >= last.packets);
      CHECK(sum.wire_bytes >= last.wire_bytes);
      CHECK(sum.normal_pages >= last.normal_pages);
      last = sum;
      ++asked;
    } while (!done);
  });
  for (int round = 0; round < 3; ++round) {
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    REQUIRE(tx->close_epoch().has_value());
  }
  CHECK(tx->close_channels().has_value());
  done = true;
  watcher.join();
  CHECK(asked > 0);
  CHECK(total(tx->stats().channels).normal_pages == 12000);
}

TEST_CASE("The bandwidth cap holds, and can be lifted") {
  const Watchdog watchdog("bandwidth");
  GuestRam source(1024);  // 4 MiB
  SUBCASE("holds") {
    auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, captures(2).links, {.bandwidth = 8 << 20});
    REQUIRE(tx.has_value());
    const Stopwatch watch;
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    CHECK(tx->close_channels().has_value());
    // 4 MiB at 8 MiB/s; the last packet (1/8 of all) need not wait for itself, and 20 ms are free.
    CHECK(watch.elapsed() >= 400ms);
    const ChannelStats sum = total(tx->stats().channels);
    CHECK(sum.capped_ns > 0);
  }
  SUBCASE("lifted") {
    Captures sent = captures(2);
    auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(sent.links), {.bandwidth = 1000});
    REQUIRE(tx.has_value());
    std::thread lifter([&] {
      CHECK(eventually([&] { return captured_bytes(sent.tapes) > 4 * page; }));
      tx->set_bandwidth(0);
    });
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    CHECK(tx->close_channels().has_value());  // over an hour with the cap
    lifter.join();
    CHECK(total(tx->stats().channels).normal_pages == 1024);
  }
  SUBCASE("set while running") {
    auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, captures(2).links);
    REQUIRE(tx.has_value());
    tx->set_bandwidth(16 << 20);
    const Stopwatch watch;
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    CHECK(tx->close_channels().has_value());
    CHECK(watch.elapsed() >= 190ms);
  }
}

TEST_CASE("zlib's level changes in the middle of a migration, and the stream still decodes") {
  const Watchdog watchdog("level");
  Rng rng(seed());
  GuestRam source(256);
  for (std::size_t p = 0; p < 256; ++p) fill_page(source.memory.page(p, page), Fill::words, rng);
  Block target(256 * page);
  RamMap target_map;
  REQUIRE(target_map.add("pc.ram", target.bytes()).has_value());
  auto links = memory_links(2);
  auto tx = Sender<MemoryTransport, Zlib, ZeroPagesNone>::open(source.map, std::move(links.sender));
  auto rx = Receiver<MemoryTransport, Zlib>::open(target_map, std::move(links.receiver));
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  std::vector<std::uint64_t> payload;
  std::uint64_t before = 0;
  for (const int level : {1, 9, 0, 6}) {
    CHECK(tx->set_level(level).has_value());
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    REQUIRE(tx->close_epoch_and_wait().has_value());
    const std::uint64_t all = total(tx->stats().channels).payload_bytes;
    payload.push_back(all - std::exchange(before, all));
  }
  CHECK(tx->close_channels().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(source.memory == target);
  CHECK(payload[1] < payload[0]);
  CHECK(payload[2] > source.memory.size());  // stored
  CHECK(payload[3] < payload[0]);
}

TEST_CASE("set_level: an impossible level fails the migration, zstd and none have no live level") {
  const Watchdog watchdog("set_level");
  GuestRam source(4);
  auto zlib = CaptureSender<Zlib, ZeroPagesNone>::open(source.map, captures(1).links);
  REQUIRE(zlib.has_value());
  CHECK(zlib->set_level(10).has_value());
  REQUIRE(zlib->queue_page(source.block, 0).has_value());
  CHECK(code_of(zlib->close_channels()) == Errc::bad_option);
  auto zstd = CaptureSender<Zstd, ZeroPagesNone>::open(source.map, captures(1).links);
  REQUIRE(zstd.has_value());
  CHECK(code_of(zstd->set_level(3)) == Errc::not_supported);
  CHECK(zstd->close_channels().has_value());
  auto none = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, captures(1).links);
  REQUIRE(none.has_value());
  CHECK(code_of(none->set_level(3)) == Errc::not_supported);
}

TEST_CASE("The thread hook runs once in each worker, before its first byte") {
  const Watchdog watchdog("thread hook");
  GuestRam source(4);
  auto out = captures(4);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::multiset<std::uint32_t> channels;
  const auto hook = [&](const ThreadInfo& info) {
    const std::scoped_lock lock(mutex);
    CHECK(std::string(info.role) == "send");
    CHECK(out.tapes[info.channel]->size() == 0);
    threads.insert(std::this_thread::get_id());
    channels.insert(info.channel);
  };
  auto tx = CaptureSender<NoComp, ZeroPagesNone>::open(source.map, std::move(out.links), {.thread_hook = hook});
  REQUIRE(tx.has_value());
  CHECK(tx->close_channels().has_value());
  CHECK(threads.size() == 4);
  CHECK_FALSE(threads.contains(std::this_thread::get_id()));
  CHECK(channels == std::multiset<std::uint32_t>{0, 1, 2, 3});
}

TEST_CASE("A sender whose peer is gone says so, on every later call") {
  const Watchdog watchdog("peer gone");
  GuestRam source(2048);
  auto links = tcp_links(2);
  auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
  REQUIRE(tx.has_value());
  links.receiver.clear();
  Result<void> failed;
  while (failed) {
    const auto queued = tx->queue_range(source.block, 0, source.memory.size());
    if (!queued) failed = std::unexpected(queued.error());
  }
  CHECK_MESSAGE(failed.error().code == Condition::peer_gone, text(failed));
  CHECK(failed.error().channel < 2);
  CHECK(failed.error().stage == Stage::write);
  CHECK(code_of(tx->close_epoch()) == failed.error().code);
  CHECK(code_of(tx->close_channels()) == failed.error().code);
  CHECK(code_of(tx->close_channels()) == failed.error().code);
}
