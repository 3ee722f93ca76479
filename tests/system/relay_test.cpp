// SPDX-License-Identifier: MIT
//
// A relay: a Receiver that puts no page into memory but hands whole packets on to a Sender of copies, joined as
// examples/qemu_relay joins them. Epochs, contents and counts must survive the way, whatever changes on it: channels,
// compression, and the form of zero pages.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/allocation_count.hpp"
#include "support/drain.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
/// What the relays read from: channels run far apart.
using Slow = JitterTransport<MemoryTransport>;
using Taken = std::vector<std::pair<std::string, std::uint64_t>>;  ///< idstr, offset

std::vector<Slow> slow(std::vector<MemoryTransport> links, Rng& rng, unsigned most_us) {
  std::vector<Slow> result;
  for (auto& link : links) result.emplace_back(std::move(link), rng(), 1 + static_cast<unsigned>(below(rng, most_us)));
  return result;
}

/// Streams made by hand, one a channel, all there from the beginning.
std::vector<Slow> ready(const std::vector<Bytes>& streams, std::vector<MemoryTransport>& senders) {
  std::vector<Slow> result;
  for (const Bytes& stream : streams) {
    auto pair = memory_links(1, stream.size() + 1);
    REQUIRE(write_all(pair.sender[0], std::span<const std::byte>(stream)).has_value());
    REQUIRE(pair.sender[0].finish().has_value());
    senders.push_back(std::move(pair.sender[0]));
    result.emplace_back(std::move(pair.receiver[0]), 1, 1);
  }
  return result;
}

struct RelayOptions {
  Digest digest = Digest::off;
  ThreadHook thread_hook{};
  ErrorHook on_error{};
};

/// The library's part of examples/qemu_relay: one producer fed by many channels, under a mutex.
template <Compressor In, Compressor Out, ZeroPagePolicy Z, Transport To = MemoryTransport>
class Relay {
 public:
  Relay(const RamMap& ram, std::vector<Slow> in, std::vector<To> out, RelayOptions options = {}) : ram_(ram) {
    zeros_.reserve(100'000);
    auto tx = Sender<To, Out, Z, FromCopies>::open(
        ram, std::move(out), {.depth = 2, .digest = options.digest, .thread_hook = options.thread_hook});
    REQUIRE_MESSAGE(tx.has_value(), text(tx));
    tx_.emplace(std::move(*tx));
    auto rx = Receiver<Slow, In, IntoHook>::open(ram, std::move(in),
                                                 {.barrier = Barrier::manual,
                                                  .into = {[this](ReceivedPacket& packet) { return take(packet); }},
                                                  .on_device_state = {.take =
                                                                          [this](const DeviceState& state) {
                                                                            const std::scoped_lock lock(mutex_);
                                                                            return tx_->queue_device_state(state);
                                                                          }},
                                                  .thread_hook = options.thread_hook,
                                                  .on_error = options.on_error});
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    rx_.emplace(std::move(*rx));
  }
  /// A worker of the receiver may be blocked in the sender.
  ~Relay() {
    if (!finished_) tx_->cancel();
  }

  /// Closes the outgoing epoch while the source's channels are held. Zero pages for the main stream go to `zeros`.
  Result<std::uint64_t> close_epoch(Taken& zeros) {
    return rx_->release_epoch([&]() -> Result<void> {
      const std::scoped_lock lock(mutex_);
      for (const auto& [block, offset] : zeros_) zeros.emplace_back(ram_.block(block).idstr, offset);
      zeros_.clear();
      const auto synced = tx_->close_epoch();
      return synced ? Result<void>{} : std::unexpected(synced.error());
    });
  }
  /// The same too late: when the source's channels are in the next epoch already.
  template <class Later>
  Result<std::uint64_t> close_epoch_late(Later&& when) {
    if (auto passed = rx_->release_epoch(); !passed) return passed;
    when();
    const std::scoped_lock lock(mutex_);
    return tx_->close_epoch();
  }

  Result<void> finish() {
    if (auto finished = rx_->finish(); !finished) return finished;
    finished_ = true;
    return tx_->close_channels();
  }

  Sender<To, Out, Z, FromCopies>& tx() { return *tx_; }
  Receiver<Slow, In, IntoHook>& rx() { return *rx_; }
  std::uint64_t packets() const { return packets_; }
  std::uint64_t buffers_kept() const { return buffers_kept_; }
  std::uint64_t wrong_counts() const { return wrong_counts_; }

 private:
  /// Every second zero page is not wanted on the main stream.
  bool wants(std::uint64_t offset) const { return offset / ram_.page_bytes() % 2 == 0; }

  Result<void> take(ReceivedPacket& packet) {
    const std::scoped_lock lock(mutex_);
    ++packets_;
    const std::byte* const buffer = packet.pages.data();
    const std::size_t before = zeros_.size();
    const auto queued =
        tx_->queue_copies(packet.block, packet.offsets, packet.normal_pages, packet.pages, [&](std::uint64_t offset) {
          if (!wants(offset)) return false;
          zeros_.emplace_back(packet.block, offset);
          return true;
        });
    if (!queued) return std::unexpected(queued.error());
    buffers_kept_ += packet.pages.data() == buffer || packet.pages.data() == nullptr;
    wrong_counts_ += queued->queued + queued->zero_on_main != packet.offsets.size() ||
                     queued->zero_on_main != zeros_.size() - before;
    return {};
  }

  const RamMap ram_;
  std::mutex mutex_;
  std::vector<std::pair<BlockId, std::uint64_t>> zeros_;
  std::optional<Sender<To, Out, Z, FromCopies>> tx_;
  std::atomic<std::uint64_t> packets_{0}, buffers_kept_{0}, wrong_counts_{0};
  bool finished_ = false;
  std::optional<Receiver<Slow, In, IntoHook>> rx_;
};

/// A source, a destination, and the names and sizes between them; ids differ from map to map.
struct Guests {
  explicit Guests(std::size_t bytes_per_page)
      : page_bytes(bytes_per_page),
        source(bytes_per_page),
        target(bytes_per_page),
        between(bytes_per_page),
        source_memory{Block(pages[0] * page_bytes), Block(pages[1] * page_bytes)},
        target_memory{Block(pages[0] * page_bytes), Block(pages[1] * page_bytes)} {
    for (const std::size_t b : {0u, 1u}) {
      REQUIRE(source.add(names[b], source_memory[b].bytes()).has_value());
      REQUIRE(target.add(names[b], target_memory[b].bytes()).has_value());
      REQUIRE(between.add_elsewhere(names[1 - b], source_memory[1 - b].size()).has_value());
      target_memory[b].fill(std::byte{0xee});  // a zero page that does not come shows
    }
  }
  static constexpr std::size_t pages[2] = {150, 9};
  static constexpr const char* names[2] = {"pc.ram", "vga.vram"};
  std::size_t page_bytes;
  RamMap source, target, between;
  Block source_memory[2];
  Block target_memory[2];
};

/// Rewrites pages over and over and sends them: `queued` and `zeros` count what was sent. `after(epoch)` follows each.
template <class Tx>
bool send_epochs(Tx& tx, Guests& guests, unsigned epochs, Rng& rng, std::uint64_t& queued, std::uint64_t& zeros) {
  bool good = true;
  for (unsigned epoch = 0; epoch < epochs && good; ++epoch) {
    for (std::uint32_t b = 0; b < 2; ++b)
      for (std::size_t p = 0; p < Guests::pages[b] && good; ++p) {
        if (epoch > 0 && below(rng, 3) == 0) continue;
        const Fill fill = any_fill(rng);
        fill_page(guests.source_memory[b].page(p, guests.page_bytes), fill, rng);
        good &= tx.queue_page(BlockId{b}, p * guests.page_bytes).has_value();
        if (below(rng, 10) == 0) good &= tx.push_out().has_value();  // small packets too, so every channel gets some
        ++queued;
        zeros += fill == Fill::zero;
      }
    // Written, so that the next round cannot change what is on its way. Nothing says that it has arrived.
    good &= tx.close_epoch_and_wait() == std::uint64_t{epoch};
  }
  return good && tx.close_channels().has_value();
}

template <Compressor In, ZeroPagePolicy InZeros, Compressor Out, ZeroPagePolicy Z>
void pass_on(std::size_t page_bytes, std::uint64_t run_seed, Digest digest) {
  CAPTURE(page_bytes);
  CAPTURE(run_seed);
  const Watchdog watchdog("a migration through a relay");
  const unsigned epochs = quick() ? 4 : 8;
  Rng rng(run_seed);
  Guests guests(page_bytes);
  auto in = memory_links(3, 4 << 20);  // wide enough that the source runs ahead
  auto out = memory_links(2, 100'000);
  auto source = Sender<MemoryTransport, In, InZeros>::open(guests.source, std::move(in.sender), {.digest = digest});
  REQUIRE(source.has_value());
  Relay<In, Out, Z> relay(guests.between, slow(std::move(in.receiver), rng, 800), std::move(out.sender),
                          {.digest = digest});
  auto target =
      Receiver<MemoryTransport, Out>::open(guests.target, std::move(out.receiver), {.barrier = Barrier::manual});
  REQUIRE_MESSAGE(target.has_value(), text(target));

  std::uint64_t queued = 0;
  std::uint64_t zeros = 0;
  bool sent = false;
  std::thread sending([&] { sent = send_epochs(*source, guests, epochs, rng, queued, zeros); });
  std::uint64_t on_main = 0;
  for (unsigned epoch = 0; epoch < epochs; ++epoch) {
    Taken records;
    const auto closed = relay.close_epoch(records);
    CHECK_MESSAGE(closed == std::uint64_t{epoch}, text(closed));
    if (!closed) break;
    // What the main stream says of an epoch comes before its end.
    for (const auto& [idstr, offset] : records) {
      const auto block = guests.target.find(idstr);
      REQUIRE(block.has_value());
      REQUIRE(guests.target.check(*block, offset).has_value());
      std::memset(guests.target_memory[index(*block)].data() + offset, 0, page_bytes);
    }
    on_main += records.size();
    const auto arrived = target->release_epoch();
    CHECK_MESSAGE(arrived == std::uint64_t{epoch}, text(arrived));
  }
  sending.join();
  CHECK(sent);
  const auto finished = relay.finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  const auto received = target->finish();
  CHECK_MESSAGE(received.has_value(), text(received));

  for (const std::size_t b : {0u, 1u})
    CHECK_MESSAGE(guests.source_memory[b] == guests.target_memory[b], "block ", b, " differs at byte ",
                  first_difference(guests.source_memory[b].bytes(), guests.target_memory[b].bytes()));

  const ChannelStats taken = total(relay.rx().stats().channels);
  const ChannelStats given = total(relay.tx().stats().channels);
  const ChannelStats arrived = total(target->stats().channels);
  CHECK(taken.normal_pages + taken.zero_pages == queued);
  CHECK(taken.packets == relay.packets());
  CHECK(given.normal_pages + given.zero_pages + on_main == queued);
  CHECK(relay.tx().stats().zero_on_main == on_main);
  CHECK(relay.tx().stats().queued_pages == queued - on_main);
  CHECK(given.normal_pages == arrived.normal_pages);
  CHECK(given.zero_pages == arrived.zero_pages);
  CHECK(given.packets == arrived.packets);
  CHECK(given.wire_bytes == arrived.wire_bytes);
  CHECK(given.syncs == 2 * epochs);
  CHECK(relay.wrong_counts() == 0);
  CHECK(relay.buffers_kept() == 0);
  if (Z::stage == ZeroStage::channel) CHECK(arrived.zero_pages == zeros);
  if (Z::stage != ZeroStage::channel) CHECK(arrived.zero_pages == 0);
  // Those of odd pages travelled as bytes.
  if (Z::stage == ZeroStage::producer) CHECK(on_main > zeros / 4);
  if (Z::stage == ZeroStage::producer) CHECK(on_main < zeros);
  if (Z::stage != ZeroStage::producer) CHECK(on_main == 0);
  if (digest == Digest::on) {
    CHECK(relay.rx().stats().pages_verified == taken.normal_pages);
    CHECK(target->stats().pages_verified == arrived.normal_pages);
  }
}

/// A packet of one page whose bytes are all `value`.
Packet one_page(std::uint64_t offset, unsigned value) {
  return {.normal = {offset}, .payload = Bytes(page, std::byte(value))};
}

/// Two channels of two epochs, whose pages hold 1 and 2; channel 1 comes first. Returns what the pages in the first
/// outgoing epoch hold.
std::set<int> first_epoch_of_a_relay(bool held) {
  const Watchdog watchdog("a relay's epochs");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  auto out = memory_links(1, 1 << 20);
  std::vector<MemoryTransport> senders;
  RawStream streams[2];
  for (const unsigned channel : {0u, 1u})
    streams[channel]
        .hello(channel)
        .packet(one_page(channel * page, 1))
        .sync()
        .packet(one_page(channel * page, 2))
        .packet(one_page((2 + channel) * page, 2))
        .sync();
  {
    Relay<NoComp, NoComp, ZeroPagesNone> relay(ram, ready({streams[0].bytes(), streams[1].bytes()}, senders),
                                               std::move(out.sender));
    for (unsigned epoch = 0; epoch < 2; ++epoch) {
      if (held) {
        Taken none;
        REQUIRE(relay.close_epoch(none) == std::uint64_t{epoch});
      } else {
        REQUIRE(relay.close_epoch_late([&] { CHECK(eventually([&] { return relay.packets() == 6; })); }) ==
                std::uint64_t{epoch});
      }
    }
    CHECK(relay.finish().has_value());
  }
  const Bytes sent = read_to_end(out.receiver[0]);
  std::set<int> seen;
  unsigned syncs = 0;
  for (const SeenPacket& packet : packets_of(sent)) {
    syncs += packet.flags & 1;
    if (syncs > 0 || packet.normal == 0) continue;
    for (std::size_t p = 0; p < packet.normal; ++p)
      seen.insert(std::to_integer<int>(sent[packet.at + 1344 + p * page]));
  }
  CHECK(syncs == 2);
  return seen;
}

}  // namespace

TEST_CASE("A migration through a relay ends with equal memory and counts that agree") {
  // In each: pages that turn zero and back, 3 channels into 2, ids of blocks that differ.
  SUBCASE("lists from lists, compressed") {
    for (const std::size_t page_bytes : {4096u, 1024u})
      pass_on<NoComp, ZeroPagesMultifd, Zstd, ZeroPagesMultifd>(page_bytes, seed(), Digest::on);
  }
  SUBCASE("lists from bytes") {
    for (const std::size_t page_bytes : {4096u, 1024u})
      pass_on<NoComp, ZeroPagesNone, Zstd, ZeroPagesMultifd>(page_bytes, seed() + 1, Digest::off);
  }
  SUBCASE("main stream from lists, decompressed") {
    for (const std::size_t page_bytes : {4096u, 65536u})
      pass_on<Zlib, ZeroPagesMultifd, NoComp, ZeroPagesLegacy>(page_bytes, seed() + 2, Digest::off);
  }
  SUBCASE("main stream from bytes") {
    for (const std::size_t page_bytes : {4096u, 1024u})
      pass_on<NoComp, ZeroPagesNone, NoComp, ZeroPagesLegacy>(page_bytes, seed() + 3, Digest::on);
  }
  SUBCASE("bytes from lists, decompressed") {
    for (const std::size_t page_bytes : {4096u, 1024u})
      pass_on<Zlib, ZeroPagesMultifd, NoComp, ZeroPagesNone>(page_bytes, seed() + 4, Digest::off);
  }
}

TEST_CASE("Nothing of the next epoch leaves a relay before the SYNC of this one") {
  for (int run = 0; run < 20; ++run) CHECK(first_epoch_of_a_relay(true) == std::set{1});
}

TEST_CASE("A relay that closes its epoch when the channels are released lets the next one into it") {
  CHECK(first_epoch_of_a_relay(false) == std::set{1, 2});
}

TEST_CASE("Through channels that run far apart, every packet leaves in the epoch that it came in") {
  const unsigned runs = quick() ? 2 : 6;
  for (unsigned run = 0; run < runs; ++run) {
    const std::uint64_t run_seed = seed() + run;
    CAPTURE(run_seed);
    const Watchdog watchdog("epochs through a relay");
    constexpr unsigned epochs = 10;
    constexpr std::size_t pages = 40;
    Rng rng(run_seed);
    Block memory(pages * page);
    RamMap ram, between;
    const auto block = ram.add("pc.ram", memory.bytes());
    REQUIRE(between.add_elsewhere("pc.ram", memory.size()).has_value());
    auto in = memory_links(4, 4 << 20);
    auto out = memory_links(3, 8 << 20);
    auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(in.sender));
    REQUIRE(tx.has_value());
    std::uint64_t queued = 0;
    {
      Relay<NoComp, NoComp, ZeroPagesNone> relay(between, slow(std::move(in.receiver), rng, 2500),
                                                 std::move(out.sender));
      // The whole migration is on its way before the relay closes its first epoch.
      for (unsigned epoch = 0; epoch < epochs; ++epoch) {
        memory.fill(std::byte(epoch + 1));
        for (std::size_t p = 0; p < pages; ++p) {
          if (below(rng, 4) == 0) continue;
          REQUIRE(tx->queue_page(*block, p * page).has_value());
          if (below(rng, 4) == 0) REQUIRE(tx->push_out().has_value());
          ++queued;
        }
        REQUIRE(tx->close_epoch_and_wait() == std::uint64_t{epoch});
      }
      CHECK(tx->close_channels().has_value());
      Taken none;
      for (unsigned epoch = 0; epoch < epochs; ++epoch) REQUIRE(relay.close_epoch(none) == std::uint64_t{epoch});
      const auto finished = relay.finish();
      CHECK_MESSAGE(finished.has_value(), text(finished));
    }
    std::uint64_t misplaced = 0;
    for (MemoryTransport& link : out.receiver) {
      const Bytes sent = read_to_end(link);
      unsigned epoch = 0;
      for (const SeenPacket& packet : packets_of(sent)) {
        for (std::size_t p = 0; p < packet.normal; ++p, --queued)
          misplaced += sent[packet.at + 1344 + p * page] != std::byte(epoch + 1);
        epoch += packet.flags & 1;
      }
      CHECK(epoch == epochs);
    }
    CHECK(misplaced == 0);
    CHECK(queued == 0);
  }
}

TEST_CASE("A relay allocates nothing for the packets that pass it") {
  const Watchdog watchdog("allocations of a relay");
  const unsigned epochs = 4;
  Rng rng(seed());
  Guests guests(page);
  auto in = memory_links(3);
  auto out = memory_links(2);
  auto source = Sender<MemoryTransport, Zlib, ZeroPagesMultifd>::open(guests.source, std::move(in.sender));
  REQUIRE(source.has_value());
  Relay<Zlib, NoComp, ZeroPagesLegacy> relay(guests.between, slow(std::move(in.receiver), rng, 10),
                                             std::move(out.sender),
                                             {.thread_hook = [](const ThreadInfo&) { watch_this_thread(true); }});
  auto target = Receiver<MemoryTransport, NoComp>::open(guests.target, std::move(out.receiver));
  REQUIRE(target.has_value());
  Taken records;
  records.reserve(1000);  // strings of these idstrs need no memory of their own
  std::uint64_t queued = 0;
  std::uint64_t zeros = 0;
  bool good = false;
  std::thread sending([&] { good = send_epochs(*source, guests, epochs, rng, queued, zeros); });
  // From the first packet on: the hellos have been exchanged, nothing else.
  const std::uint64_t before = allocations_of_watched_threads();
  watch_this_thread(true);
  bool passed = true;
  for (unsigned epoch = 0; epoch < epochs; ++epoch) passed &= relay.close_epoch(records).has_value();
  passed &= relay.finish().has_value();
  watch_this_thread(false);
  const std::uint64_t counted = allocations_of_watched_threads() - before;
  sending.join();
  CHECK(good);
  CHECK(passed);
  CHECK(target->finish().has_value());
  CHECK(relay.packets() > 10);
  CHECK(records.size() > 10);
  CHECK(counted == 0);
}

TEST_CASE("An error of the packet hook is the receiver's first error") {
  const Watchdog watchdog("hook fails");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  const Error reason{.code = std::make_error_code(std::errc::no_space_on_device), .op = "hook", .detail = 7};
  for (const bool by_sync : {false, true}) {
    CAPTURE(by_sync);
    std::vector<MemoryTransport> senders;
    auto streams = ready({RawStream().hello(0).sync().bytes(),
                          RawStream().hello(1).packet(one_page(0, 1)).packet(one_page(page, 2)).sync().bytes()},
                         senders);
    std::atomic<bool> opened = false;  // before that, open() itself would return the error
    std::atomic<unsigned> calls = 0;
    std::atomic<unsigned> told = 0;
    auto rx =
        Receiver<Slow, NoComp, IntoHook>::open(ram, std::move(streams),
                                               {.barrier = by_sync ? Barrier::manual : Barrier::automatic,
                                                .into = {[&](ReceivedPacket& packet) -> Result<void> {
                                                  if (++calls == 1) return {};
                                                  opened.wait(false);
                                                  CHECK(packet.channel == 1);
                                                  return std::unexpected(reason);
                                                }},
                                                .on_error = [&](const Error& error) { told += error.detail == 7; }});
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    opened = true;
    opened.notify_all();
    for (int again = 0; again < 2; ++again) {
      const auto passed = by_sync ? rx->release_epoch() : Result<std::uint64_t>{};
      const auto ended = by_sync && !passed ? Result<void>(std::unexpected(passed.error())) : rx->finish();
      REQUIRE_FALSE(ended.has_value());
      CHECK(ended.error().code == std::errc::no_space_on_device);
      CHECK(std::string(ended.error().op) == "hook");
      CHECK(ended.error().detail == 7);
      CHECK(ended.error().channel == 1);
      CHECK(ended.error().packet == 1);
    }
    CHECK(calls == 2);
    CHECK(eventually([&] { return told == 1; }));  // by the worker, which may come after those that it has stopped
  }
}

TEST_CASE("A sender that is cancelled while a packet hook waits for it ends the whole relay") {
  const Watchdog watchdog("cancel a relay's sender");
  RamMap ram;
  constexpr std::size_t pages = 128;
  REQUIRE(ram.add_elsewhere("pc.ram", pages * page).has_value());
  RawStream streams[3];
  Packet full{.payload = Bytes(pages * page, std::byte{1})};
  for (std::size_t p = 0; p < pages; ++p) full.normal.push_back(p * page);
  for (unsigned channel = 0; channel < 3; ++channel) {
    streams[channel].hello(channel);
    for (int i = 0; i < 4; ++i) streams[channel].packet(full);
    streams[channel].sync();
  }
  std::vector<MemoryTransport> senders;
  // Nobody reads the other ends.
  auto out = unix_links(2);
  Relay<NoComp, NoComp, ZeroPagesNone, FdTransport> relay(
      ram, ready({streams[0].bytes(), streams[1].bytes(), streams[2].bytes()}, senders), std::move(out.sender));
  REQUIRE(eventually([&] { return relay.tx().stats().producer_waits > 0; }));
  // One hook waits in the sender, the others at the mutex; the caller at the barrier.
  std::atomic<bool> waiting = false;
  std::optional<Error> error;
  std::thread caller([&] {
    Taken none;
    waiting = true;
    if (const auto closed = relay.close_epoch(none); !closed) error = closed.error();
  });
  CHECK(eventually([&] { return waiting.load(); }));
  std::this_thread::sleep_for(20ms);
  const Stopwatch watch;
  relay.tx().cancel();
  caller.join();
  CHECK(watch.elapsed() < no_hang);
  REQUIRE(error.has_value());
  CHECK_MESSAGE(error->code == Errc::cancelled, text(*error));
  CHECK(code_of(relay.rx().finish()) == Errc::cancelled);
  CHECK(code_of(relay.tx().close_channels()) == Errc::cancelled);
}

TEST_CASE("An error of while_held is what sync returns, and no channel gets into the next epoch") {
  const Watchdog watchdog("while_held fails");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  std::vector<MemoryTransport> senders;
  std::vector<Bytes> streams;
  for (const unsigned channel : {0u, 1u})
    streams.push_back(RawStream()
                          .hello(channel)
                          .packet(one_page(channel * page, 1))
                          .sync()
                          .packet(one_page(channel * page, 2))
                          .sync()
                          .bytes());
  std::atomic<unsigned> packets = 0;
  std::atomic<unsigned> told = 0;
  {
    auto rx = Receiver<Slow, NoComp, IntoHook>::open(ram, ready(streams, senders),
                                                     {.barrier = Barrier::manual,
                                                      .into = {[&](ReceivedPacket&) -> Result<void> {
                                                        ++packets;
                                                        return {};
                                                      }},
                                                      .on_error = [&](const Error&) { ++told; }});
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    const auto failed =
        rx->release_epoch([]() -> Result<void> { return fail(Errc::bad_range, Stage::produce, "held", 7); });
    REQUIRE_FALSE(failed.has_value());
    CHECK(failed.error().code == Errc::bad_range);
    CHECK(failed.error().detail == 7);
    CHECK(code_of(rx->release_epoch()) == Errc::bad_range);
    CHECK(code_of(rx->finish()) == Errc::bad_range);
    CHECK(rx->stats().epochs == 0);
  }
  CHECK(packets == 2);
  CHECK(told == 1);
}

TEST_CASE("while_held does not run with an automatic barrier, nor after an error") {
  const Watchdog watchdog("while_held is not called");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  const auto never = []() -> Result<void> {
    FAIL_CHECK("while_held was called");
    return {};
  };
  for (const Barrier barrier : {Barrier::automatic, Barrier::manual}) {
    std::vector<MemoryTransport> senders;
    auto rx = Receiver<Slow, NoComp, IntoHook>::open(
        ram, ready({RawStream().hello(0).sync().bytes()}, senders),
        {.barrier = barrier, .into = {[](ReceivedPacket&) { return Result<void>(); }}});
    REQUIRE(rx.has_value());
    if (barrier == Barrier::manual) rx->cancel();
    CHECK(code_of(rx->release_epoch(never)) == (barrier == Barrier::manual ? Errc::cancelled : Errc::not_supported));
  }
}

TEST_CASE("Device state passes a relay among the pages, whole and in the order of its channel") {
  const Watchdog watchdog("device state through a relay");
  Rng rng(seed());
  Guests guests(page);
  auto in = memory_links(2, 4 << 20);  // all of it
  auto out = memory_links(1, 4 << 20);
  auto source = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(guests.source, std::move(in.sender));
  REQUIRE(source.has_value());
  Relay<NoComp, NoComp, ZeroPagesNone> relay(guests.between, slow(std::move(in.receiver), rng, 50),
                                             std::move(out.sender));
  std::vector<std::pair<std::string, Bytes>> states;  // one channel's thread adds to it
  auto target = Receiver<MemoryTransport, NoComp>::open(
      guests.target, std::move(out.receiver),
      {.on_device_state = {.take = [&](const DeviceState& state) -> Result<void> {
         states.emplace_back(std::string(state.idstr) + '/' + std::to_string(state.instance_id),
                             Bytes(state.bytes.begin(), state.bytes.end()));
         return {};
       }}});
  REQUIRE(target.has_value());
  std::vector<std::pair<std::string, Bytes>> sent;
  for (std::uint32_t i = 0; i < 30; ++i) {
    Bytes bytes(1 + below(rng, 3000), std::byte(i));
    REQUIRE(source->queue_device_state({"vfio", i, bytes}).has_value());
    sent.emplace_back("vfio/" + std::to_string(i), std::move(bytes));
    REQUIRE(source->queue_range(BlockId{0}, (i % 10) * 10 * page, 3 * page).has_value());
    if (i % 10 == 9) REQUIRE(source->close_epoch().has_value());
  }
  CHECK(source->close_channels().has_value());
  Taken none;
  for (int epoch = 0; epoch < 3; ++epoch) CHECK(relay.close_epoch(none).has_value());
  CHECK(relay.finish().has_value());
  CHECK(target->finish().has_value());
  // Two channels feed the relay: their order is their own.
  std::ranges::sort(states);
  std::ranges::sort(sent);
  CHECK(states == sent);
}
