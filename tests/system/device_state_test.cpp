// SPDX-License-Identifier: MIT
//
// Device-state packets (format/packets.md section 13) among RAM packets, both ways. Their header is shorter than a RAM
// packet's, and the receiver reads ahead: every way in which the wire can cut the bytes up is a case of its own.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
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
#include "support/feed.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
constexpr std::size_t whole = std::numeric_limits<std::size_t>::max();

struct State {
  std::string idstr;
  std::uint32_t instance_id = 0;
  Bytes bytes;
  friend bool operator==(const State& a, const State& b) {
    return a.idstr == b.idstr && a.instance_id == b.instance_id && same_bytes(a.bytes, b.bytes);
  }
};

/// A packet by the table of section 13; every field can be wrong.
struct RawState {
  std::uint32_t magic = 0x11223344;
  std::uint32_t version = 1;
  std::uint32_t flags = 0x40;
  std::string idstr = "vfio";
  std::uint32_t instance_id = 0;
  std::uint32_t next_packet_size = 4;
};
Bytes raw_header(const RawState& state) {
  Bytes bytes(276);
  put(bytes, 0, state.magic, 4);
  put(bytes, 4, state.version, 4);
  put(bytes, 8, state.flags, 4);
  std::memcpy(&bytes[12], state.idstr.data(), std::min<std::size_t>(state.idstr.size(), 256));
  put(bytes, 268, state.instance_id, 4);
  put(bytes, 272, state.next_packet_size, 4);
  return bytes;
}
Bytes raw(const State& state) {
  Bytes bytes = raw_header({.idstr = state.idstr,
                            .instance_id = state.instance_id,
                            .next_packet_size = static_cast<std::uint32_t>(state.bytes.size())});
  append(bytes, state.bytes);
  return bytes;
}

/// Bytes that differ from place to place and from packet to packet.
Bytes pattern(std::size_t size, std::uint32_t salt) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = std::byte((i * 131 + i / 251 + salt * 29) & 0xff);
  return bytes;
}
/// A page's content; its ends are marked.
Bytes page_of(std::size_t p, std::size_t page_bytes) {
  Bytes bytes(page_bytes, std::byte(p + 1));
  put(bytes, 0, 0x1234, 2);
  put(bytes, page_bytes - 2, 0x5678, 2);
  return bytes;
}
State state_of(std::size_t size, std::uint32_t instance_id) {
  return {"0000:00:05.0/vfio", instance_id, pattern(size, instance_id)};
}

/// Reads bytes that are all there, in pieces: no read gets past the next cut. Then the end, or silence.
class CutStream {
 public:
  CutStream(Bytes bytes, std::vector<std::size_t> cuts, std::size_t most = whole, Then then = Then::end_of_stream)
      : self_(std::make_unique<Self>()) {
    self_->bytes = std::move(bytes);
    self_->cuts = std::move(cuts);
    self_->most = most;
    self_->then = then;
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    Self& s = *self_;
    if (s.at == s.bytes.size()) {
      if (s.then == Then::silence) {
        s.cut.wait(false);
        return multifd::fail(Errc::cancelled, Stage::read, "cut");
      }
      return std::size_t{0};
    }
    std::size_t end = std::min(s.bytes.size(), s.at + std::min(s.most, s.bytes.size()));
    for (const std::size_t cut : s.cuts)
      if (cut > s.at) end = std::min(end, cut);
    const std::size_t before = s.at;
    for (const iovec& buffer : buffers) {
      const std::size_t count = std::min(buffer.iov_len, end - s.at);
      if (count > 0) std::memcpy(buffer.iov_base, &s.bytes[s.at], count);
      s.at += count;
    }
    return s.at - before;
  }
  Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return total_bytes(buffers); }
  Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {
    self_->cut = true;
    self_->cut.notify_all();
  }

 private:
  struct Self {
    Bytes bytes;
    std::vector<std::size_t> cuts;
    std::size_t most = whole;
    Then then = Then::end_of_stream;
    std::size_t at = 0;
    std::atomic<bool> cut = false;
  };
  std::unique_ptr<Self> self_;
};

/// A destination that keeps the device state that it is given.
struct Target {
  explicit Target(std::size_t page_bytes = page) : memory(pages * page_bytes), map(page_bytes) {
    std::memset(memory.data(), 0xee, memory.size());
    REQUIRE(map.add("pc.ram", memory.bytes()).has_value());
  }
  ReceiverOptions<NoComp> options(std::size_t limit = 16 << 20) {
    ReceiverOptions<NoComp> all{.hello_timeout = 5s, .barrier_timeout = 5s};
    all.on_device_state.limit_bytes = limit;
    all.on_device_state.take = [this](const DeviceState& state) -> Result<void> {
      const std::scoped_lock lock(mutex);
      states.push_back({std::string(state.idstr), state.instance_id, Bytes(state.bytes.begin(), state.bytes.end())});
      return {};
    };
    return all;
  }
  /// Receives streams to their ends.
  Outcome receive(std::vector<CutStream> links, ReceiverOptions<NoComp> all) {
    const Stopwatch watch;
    auto rx = Receiver<CutStream, NoComp>::open(map, std::move(links), std::move(all));
    if (!rx) return {std::unexpected(rx.error()), {}, watch.elapsed()};
    auto finished = rx->finish();
    return {finished, rx->stats(), watch.elapsed()};
  }
  Outcome receive(CutStream link) { return receive(one(std::move(link)), options()); }

  static constexpr std::size_t pages = 4;
  Block memory;
  RamMap map;
  std::mutex mutex;
  std::vector<State> states;
};

/// A channel's stream with all kinds of neighbours, what is in it, and where its parts begin.
class Script {
 public:
  explicit Script(unsigned channel = 0, std::size_t page_bytes = page) : page_(page_bytes), stream_(page_bytes) {
    mark();
    stream_.hello(channel);
  }
  Script& state(State state) {
    mark();
    borders.push_back(stream_.size() + 12);
    borders.push_back(stream_.size() + 276);
    stream_.raw(raw(state));
    states.push_back(std::move(state));
    return *this;
  }
  Script& data(std::size_t p) {
    mark();
    borders.push_back(stream_.size() + stream_.header_bytes());
    stream_.packet({.normal = {p * page_}, .payload = page_of(p, page_)});
    pages.push_back(p);
    return *this;
  }
  Script& sync() {
    mark();
    stream_.sync();
    ++syncs;
    return *this;
  }
  const Bytes& bytes() const { return stream_.bytes(); }

  /// Whether everything arrived, and only that.
  void check(const Outcome& outcome, const Target& target) const {
    REQUIRE_MESSAGE(outcome.result.has_value(), text(outcome.result));
    CHECK((target.states == states));
    for (std::size_t p = 0; p < Target::pages; ++p) {
      const bool sent = std::ranges::find(pages, p) != pages.end();
      CHECK(same_bytes(target.memory.page(p, page_), sent ? page_of(p, page_) : Bytes(page_, std::byte{0xee})));
    }
    const ChannelStats stats = total(outcome.stats.channels);
    CHECK(stats.packets == states.size() + pages.size());
    CHECK(stats.normal_pages == pages.size());
    CHECK(stats.syncs == syncs);
    CHECK(stats.wire_bytes == bytes().size());
  }

  std::vector<State> states;
  std::vector<std::size_t> pages;
  std::vector<std::size_t> borders;
  unsigned syncs = 0;

 private:
  void mark() { borders.push_back(stream_.size()); }

  std::size_t page_;
  RawStream stream_;
};

/// One of everything next to one of everything.
Script everything(std::size_t page_bytes = page) {
  Script script(0, page_bytes);
  script.state(state_of(1, 1)).state(state_of(20, 2)).data(0).state(state_of(1068, 3)).state(state_of(3, 4)).sync();
  script.state(state_of(700, 5)).data(1).data(2).state(state_of(5, 6)).sync().sync().state(state_of(2000, 7));
  return script;
}

}  // namespace

TEST_CASE("Device state of every size reaches the hook, among RAM packets, at every page size") {
  const Watchdog watchdog("sizes of device state");
  for (const std::size_t page_bytes : {4096u, 1024u, 65536u}) {
    CAPTURE(page_bytes);
    const std::size_t header = 320 + 8 * (524288 / page_bytes);
    std::vector<std::size_t> sizes = {1, 2, 3, 11, 12, 13, 108, 1 << 20};
    for (const std::size_t around : {std::size_t{276}, header, header - 276, 2 * header - 276, 2 * header})
      for (std::size_t d = 0; d < 7; ++d) sizes.push_back(around - 3 + d);
    for (const std::size_t size : sizes) {
      CAPTURE(size);
      for (const std::size_t most : {whole, header, std::size_t{100}}) {
        if (size == 1 << 20 && most == 100) continue;
        CAPTURE(most);
        Target target(page_bytes);
        Script script(0, page_bytes);
        script.state(state_of(size, 1)).data(0).state(state_of(size, 2)).state(state_of(size, 0xffffffff)).sync();
        script.state(state_of(size, 4)).data(1).sync().state(state_of(size, 5));
        script.check(target.receive(CutStream(script.bytes(), {}, most)), target);
      }
    }
  }
}

TEST_CASE("Many small packets that arrive in one read are all taken") {
  Target target;
  Script script;
  for (std::uint32_t i = 0; i < 40; ++i) {
    script.state(state_of(1 + i, i));
    if (i % 13 == 5) script.data(i / 13);
    if (i % 17 == 9) script.sync();
  }
  script.sync();
  script.check(target.receive(CutStream(script.bytes(), {})), target);
}

TEST_CASE("However the wire cuts a stream with device state, everything arrives") {
  const Watchdog watchdog("cuts");
  for (const std::size_t page_bytes : {4096u, 65536u}) {
    CAPTURE(page_bytes);
    const Script script = everything(page_bytes);
    const auto check = [&](std::vector<std::size_t> cuts, std::size_t most = whole) {
      CAPTURE(cuts);
      CAPTURE(most);
      Target target(page_bytes);
      script.check(target.receive(CutStream(script.bytes(), std::move(cuts), most)), target);
    };
    // Pieces of one size: around the sizes that matter.
    const std::size_t header = 320 + 8 * (524288 / page_bytes);
    for (const std::size_t most :
         {std::size_t{1}, std::size_t{2}, std::size_t{11}, std::size_t{12}, std::size_t{13}, std::size_t{275},
          std::size_t{276}, std::size_t{277}, header - 1, header, header + 1})
      if (!quick() || most > 100) check({}, most);
    // One cut, near every border; two, on both sides of one.
    std::vector<std::size_t> near;
    for (const std::size_t border : script.borders)
      for (std::size_t d = 0; d < 7; ++d) near.push_back(border + d - std::min<std::size_t>(border, 3));
    const std::size_t step = quick() ? 11 : 1;
    for (std::size_t i = 0; i < near.size(); i += step) check({near[i]});
    for (const std::size_t border : script.borders)
      if (border > 0 && (!quick() || border % 4 == 0)) check({border - 1, border + 1});
    // Anywhere.
    Rng rng(seed());
    for (int run = 0; run < (quick() ? 20 : 100); ++run) {
      std::vector<std::size_t> cuts;
      for (std::size_t n = 1 + below(rng, 20); n > 0; --n) cuts.push_back(below(rng, script.bytes().size()));
      check(std::move(cuts));
    }
  }
}

TEST_CASE("Several channels carry device state, each in its own order, over SYNCs that hold them all") {
  const Watchdog watchdog("channels with device state");
  for (std::uint64_t run = 0; run < (quick() ? 5 : 30); ++run) {
    CAPTURE(seed() + run);
    Rng rng(seed() + run);
    constexpr unsigned channels = 4;
    constexpr unsigned syncs = 5;
    Target target;
    std::vector<std::vector<State>> sent(channels);
    std::vector<CutStream> links;
    for (unsigned channel = 0; channel < channels; ++channel) {
      Script script(channel);
      std::uint32_t number = 0;
      for (unsigned sync = 0; sync <= syncs; ++sync) {
        for (std::size_t n = below(rng, 6); n > 0; --n) {
          if (below(rng, 3) == 0 && sync < syncs) {
            script.data(channel);  // what comes after the last SYNC is device state only
          } else {
            script.state(
                {"dev" + std::to_string(channel), channel << 16 | number, pattern(1 + below(rng, 3000), number)});
            ++number;
          }
        }
        if (sync < syncs) script.sync();
      }
      sent[channel] = script.states;
      links.emplace_back(script.bytes(), std::vector<std::size_t>{}, 1 + below(rng, 3000));
    }
    const auto outcome = target.receive(std::move(links), target.options());
    REQUIRE_MESSAGE(outcome.result.has_value(), text(outcome.result));
    CHECK(outcome.stats.epochs == syncs);
    for (unsigned channel = 0; channel < channels; ++channel) {
      std::vector<State> got;
      for (const State& state : target.states)
        if (state.instance_id >> 16 == channel) got.push_back(state);
      CHECK((got == sent[channel]));
    }
  }
}

TEST_CASE("A payload of the limit is taken, one byte more is refused before it is read") {
  for (const std::size_t limit : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20}) {
    CAPTURE(limit);
    Target target;
    Script script;
    script.state(state_of(limit, 1)).state(state_of(1, 2));
    script.check(target.receive(one(CutStream(script.bytes(), {})), target.options(limit)), target);

    Target other;
    for (const std::size_t size : {limit + 1, std::size_t{0xffffffff}}) {
      RawStream stream;
      stream.hello(0).raw(raw_header({.next_packet_size = static_cast<std::uint32_t>(size)}));
      const auto refused =
          other.receive(one(CutStream(stream.bytes(), {}, whole, Then::silence)), other.options(limit));
      CHECK_MESSAGE(code_of(refused.result) == Errc::payload_too_large, text(refused.result));
      CHECK(refused.result.error().detail == size);
      CHECK(refused.elapsed < no_hang);
    }
    CHECK(other.states.empty());
  }
  Target none;
  RawStream stream;
  stream.hello(0).raw(raw(state_of(1, 0)));
  CHECK(code_of(none.receive(one(CutStream(stream.bytes(), {})), none.options(0)).result) == Errc::payload_too_large);
}

TEST_CASE("A malformed device-state header is refused as soon as it is there, and names its channel and packet") {
  struct Row {
    const char* what;
    RawState state;
    Errc expected;
    std::uint64_t detail;
  };
  const Row rows[] = {
      {"version", {.version = 2}, Errc::bad_version, 2},
      {"with SYNC", {.flags = 0x41}, Errc::bad_device_state, 0x41},
      {"empty idstr", {.idstr = ""}, Errc::bad_device_state, 0},
      {"idstr without end", {.idstr = std::string(256, 'v')}, Errc::bad_device_state, 256},
      {"no payload", {.next_packet_size = 0}, Errc::bad_device_state, 0},
  };
  for (const Row& row : rows) {
    CAPTURE(row.what);
    for (const std::size_t most : {whole, std::size_t{1}, std::size_t{13}}) {
      Target target;
      RawStream stream;
      stream.hello(1).raw(raw(state_of(9, 1))).raw(raw_header(row.state));
      std::vector<CutStream> links;
      links.emplace_back(RawStream().hello(0).bytes(), std::vector<std::size_t>{}, whole, Then::silence);
      links.emplace_back(stream.bytes(), std::vector<std::size_t>{}, most, Then::silence);
      const auto refused = target.receive(std::move(links), target.options());
      REQUIRE_MESSAGE(code_of(refused.result) == row.expected, text(refused.result));
      CHECK(refused.result.error().detail == row.detail);
      CHECK(refused.result.error().stage == Stage::parse);
      CHECK(refused.result.error().channel == 1);
      CHECK(refused.result.error().packet == 1);
      CHECK(refused.elapsed < no_hang);
      CHECK(target.states.size() == 1);
    }
  }
}

TEST_CASE("A stranger among the packets is told by 12 bytes, although they look like device state") {
  Target target;
  const Bytes packet = raw_header({.magic = 0x11223345});
  RawStream stream;
  stream.hello(0).raw(std::span(packet).first(12));
  const auto refused = target.receive(CutStream(stream.bytes(), {}, whole, Then::silence));
  CHECK_MESSAGE(code_of(refused.result) == Errc::bad_magic, text(refused.result));
  CHECK(refused.elapsed < no_hang);
}

TEST_CASE("A stream that ends at any byte of a device-state packet is truncated there") {
  const Watchdog watchdog("truncated device state");
  const Bytes packet = raw(state_of(50, 1));
  for (const bool after_data : {false, true}) {
    RawStream before;
    before.hello(0);
    // Then a part of the next header has been read with the payload.
    if (after_data) before.packet({.normal = {0}, .payload = Bytes(page)}).sync().raw(raw(state_of(7, 9)));
    for (std::size_t end = 0; end <= packet.size(); ++end) {
      CAPTURE(end);
      Target target;
      Bytes bytes = before.bytes();
      append(bytes, std::span(packet).first(end));
      const auto outcome = target.receive(CutStream(bytes, {}));
      if (end == 0 || end == packet.size()) {
        CHECK_MESSAGE(outcome.result.has_value(), text(outcome.result));
      } else {
        CHECK_MESSAGE(code_of(outcome.result) == (end < 276 ? Errc::truncated_header : Errc::truncated_payload),
                      text(outcome.result));
      }
      CHECK(target.states.size() == (end == packet.size() ? 1u : 0u) + (after_data ? 1u : 0u));
    }
  }
}

TEST_CASE("Without a hook device state is refused by its first 12 bytes") {
  Target target;
  const Bytes packet = raw_header({});
  RawStream stream;
  stream.hello(0).sync().raw(std::span(packet).first(12));
  const auto refused = target.receive(one(CutStream(stream.bytes(), {}, whole, Then::silence)),
                                      {.hello_timeout = 5s, .barrier_timeout = 5s});
  CHECK_MESSAGE(code_of(refused.result) == Errc::device_state_refused, text(refused.result));
  CHECK(refused.elapsed < no_hang);
}

TEST_CASE("An error of the device-state hook is the receiver's first error") {
  Target target;
  Script script;
  script.state(state_of(3, 1)).state(state_of(4, 2)).state(state_of(5, 3)).data(0).sync();
  std::atomic<bool> opened = false;  // before that, open() itself would return the error
  auto all = target.options();
  all.on_device_state.take = [&, keep = all.on_device_state.take](const DeviceState& state) -> Result<void> {
    opened.wait(false);
    if (state.instance_id == 2)
      return std::unexpected(Error{.code = std::make_error_code(std::errc::no_space_on_device), .op = "hook"});
    return keep(state);
  };
  auto rx = Receiver<CutStream, NoComp>::open(target.map, one(CutStream(script.bytes(), {})), std::move(all));
  REQUIRE(rx.has_value());
  opened = true;
  opened.notify_all();
  const auto finished = rx->finish();
  REQUIRE_FALSE(finished.has_value());
  CHECK(finished.error().code == std::errc::no_space_on_device);
  CHECK(finished.error().channel == 0);
  CHECK(finished.error().packet == 1);
  CHECK(target.states.size() == 1);
  CHECK(target.memory.bytes()[0] == std::byte{0xee});
}

TEST_CASE("A channel's memory for device state grows to its largest packet and stays") {
  Target target;
  Script script;
  const std::size_t sizes[] = {100, 5000, 5000, 4999, 1, 5000};
  std::uint32_t number = 0;
  for (const std::size_t size : sizes) script.state(state_of(size, number++));
  std::vector<std::uint64_t> counts;
  counts.reserve(10);
  auto all = target.options();
  all.on_device_state.take = [&](const DeviceState&) -> Result<void> {
    counts.push_back(allocations_of_this_thread());
    return {};
  };
  REQUIRE(target.receive(one(CutStream(script.bytes(), {})), std::move(all)).result.has_value());
  REQUIRE(counts.size() == 6);
  CHECK(counts[1] == counts[0] + 1);
  for (const std::size_t later : {2u, 3u, 4u, 5u}) CHECK(counts[later] == counts[1]);
}

TEST_CASE("A sender writes device state as the formats' text says, from a copy, and it needs no SYNC") {
  const Watchdog watchdog("bytes of device state");
  Block memory(8 * page);
  RamMap ram;
  const BlockId block = *ram.add("pc.ram", memory.bytes());
  auto links = memory_links(1, 1 << 20);
  Bytes stream;
  {
    auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links.sender));
    REQUIRE(tx.has_value());
    Bytes bytes = {std::byte{0xde}, std::byte{0xad}, std::byte{0xbe}};
    std::string idstr = "0000:00:05.0/vfio";
    REQUIRE(tx->queue_device_state({idstr, 0x01020304, bytes}).has_value());
    // Both are the caller's again.
    std::ranges::fill(bytes, std::byte{});
    std::ranges::fill(idstr, 'x');
    CHECK(tx->close_channels().has_value());
    CHECK(total(tx->stats().channels).packets == 1);
    CHECK(total(tx->stats().channels).syncs == 0);
    CHECK(total(tx->stats().channels).wire_bytes == 64 + 279);
    stream = read_to_end(links.receiver[0]);
    CHECK(code_of(tx->queue_device_state({"vfio", 0, Bytes(1)})) == Errc::already_closed);
  }
  std::string hex;
  for (const std::byte byte : std::span(stream).subspan(64)) {
    hex += "0123456789abcdef"[std::to_integer<unsigned>(byte) >> 4];
    hex += "0123456789abcdef"[std::to_integer<unsigned>(byte) & 15];
  }
  CHECK(hex ==
        "11223344"
        "00000001"
        "00000040"
        "303030303a30303a30352e302f7666696f" +
            std::string(2 * (256 - 17), '0') +  // 0000:00:05.0/vfio
            "01020304"
            "00000003"
            "deadbe");

  // Among pages: what was queued before goes before it on a channel, and the epoch's SYNC behind.
  links = memory_links(1, 1 << 20);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links.sender));
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_page(block, 0).has_value());
  REQUIRE(tx->queue_device_state({"vfio", 0, Bytes(10)}).has_value());
  REQUIRE(tx->queue_page(block, page).has_value());
  CHECK(tx->close_channels().has_value());
  stream = read_to_end(links.receiver[0]);
  REQUIRE(stream.size() == 64 + (1344 + page) + (276 + 10) + (1344 + page) + 1344);
  std::size_t at = 64;
  CHECK(get(stream, at + 8, 4) == 0);
  CHECK(get(stream, at + 320, 8) == 0);
  at += 1344 + page;
  CHECK(get(stream, at + 8, 4) == 0x40);
  at += 276 + 10;
  CHECK(get(stream, at + 8, 4) == 0);
  CHECK(get(stream, at + 320, 8) == page);
  at += 1344 + page;
  CHECK(get(stream, at + 8, 4) == 1);
}

TEST_CASE("queue_device_state refuses what cannot be sent, and the sender goes on") {
  const Watchdog watchdog("refused device state");
  Block memory(page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  const Bytes bytes(4);
  auto links = memory_links(1);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links.sender));
  REQUIRE(tx.has_value());
  CHECK(code_of(tx->queue_device_state({"", 0, bytes})) == Errc::bad_range);
  CHECK(code_of(tx->queue_device_state({std::string(256, 'v'), 0, bytes})) == Errc::bad_range);
  CHECK(code_of(tx->queue_device_state({std::string_view("a\0b", 3), 0, bytes})) == Errc::bad_range);
  CHECK(code_of(tx->queue_device_state({"vfio", 0, {}})) == Errc::bad_range);
  // Never read: refused by its size.
  const std::span<const std::byte> huge(bytes.data(), std::size_t{1} << 32);
  CHECK(code_of(tx->queue_device_state({"vfio", 0, huge})) == Errc::bad_range);
  CHECK(tx->queue_device_state({std::string(255, 'v'), 0, bytes}).has_value());
  CHECK(tx->close_channels().has_value());
  CHECK(total(tx->stats().channels).packets == 1);
}

TEST_CASE("Only peers that know device state are sent any") {
  const Watchdog watchdog("peers without device state");
  Block memory(page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  unsigned without = 0;
  for (const PeerProfile& peer : peer_profiles) {
    CAPTURE(peer.name);
    auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(ram, captures(1).links, {.peer = peer});
    REQUIRE(tx.has_value());
    const auto queued = tx->queue_device_state({"vfio", 0, Bytes(1)});
    CHECK(code_of(queued) == (peer.device_state ? std::error_code() : make_error_code(Errc::peer_lacks_device_state)));
    without += !peer.device_state;
    CHECK(tx->close_channels().has_value());
  }
  CHECK(without >= 4);  // QEMU up to 9
}

TEST_CASE_TEMPLATE("Compressed channels carry no device state", C, Zlib, Zstd) {
  const Watchdog watchdog("device state and compression");
  Block memory(page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  auto out = captures(1);
  auto tx = Sender<CaptureTransport, C, ZeroPagesNone>::open(ram, std::move(out.links));
  REQUIRE(tx.has_value());
  CHECK(code_of(tx->queue_device_state({"vfio", 0, Bytes(1)})) == Errc::not_supported);
  CHECK(tx->close_channels().has_value());
  CHECK(out.tapes[0]->bytes.size() == 64);
}

TEST_CASE("Sender and receiver agree about device state of all sizes, among pages and epochs") {
  const Watchdog watchdog("device state both ways");
  Rng rng(seed());
  Block memory(Target::pages * page);
  RamMap ram;
  const BlockId block = *ram.add("pc.ram", memory.bytes());
  for (std::size_t p = 0; p < Target::pages; ++p) fill_page(memory.page(p, page), Fill::noise, rng);
  Target target;
  auto links = memory_links(3);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links.sender));
  REQUIRE(tx.has_value());
  auto rx = Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver), target.options(3 << 20));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  std::vector<State> sent;
  for (const std::size_t size : {std::size_t{1}, std::size_t{276}, std::size_t{1067}, std::size_t{1068},
                                 std::size_t{1069}, std::size_t{1344}, std::size_t{1} << 20, std::size_t{3} << 20}) {
    for (std::uint32_t i = 0; i < 3; ++i) {
      sent.push_back(state_of(size, static_cast<std::uint32_t>(sent.size())));
      REQUIRE(tx->queue_device_state({sent.back().idstr, sent.back().instance_id, sent.back().bytes}).has_value());
      REQUIRE(tx->queue_range(block, 0, memory.size()).has_value());
      REQUIRE(tx->close_epoch().has_value());
    }
  }
  CHECK(tx->close_channels().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  std::ranges::sort(target.states, {}, &State::instance_id);
  CHECK((target.states == sent));
  CHECK(memory == target.memory);
  CHECK(total(tx->stats().channels).wire_bytes == total(rx->stats().channels).wire_bytes);
  CHECK(total(tx->stats().channels).packets == total(rx->stats().channels).packets);
}

TEST_CASE("Device state leaves at once: nothing says that a sync follows soon") {
  const Watchdog watchdog("lonely device state");
  Block memory(Target::pages * page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  for (const unsigned channels : {1u, 3u}) {
    Target target;
    auto links = memory_links(channels);
    auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(ram, std::move(links.sender));
    REQUIRE(tx.has_value());
    auto rx = Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver), target.options());
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    for (std::uint32_t i = 0; i < 3; ++i) {
      // Nothing tells that the workers have gone to sleep, so a pause has to do.
      std::this_thread::sleep_for(20ms);
      REQUIRE(tx->queue_device_state({"vfio", i, Bytes(3)}).has_value());
      CHECK(eventually([&] {
        const std::scoped_lock lock(target.mutex);
        return target.states.size() == i + 1;
      }));
    }
    CHECK(tx->close_channels().has_value());
    CHECK(rx->finish().has_value());
  }
}

TEST_CASE("Device state counts against the bandwidth cap, and a cancelled sender does not wait for it") {
  const Watchdog watchdog("device state at the cap");
  Block memory(page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  const Bytes half(512 * 1024);
  {
    auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(ram, captures(1).links, {.bandwidth = 4 << 20});
    REQUIRE(tx.has_value());
    const Stopwatch watch;
    for (int i = 0; i < 4; ++i) REQUIRE(tx->queue_device_state({"vfio", 0, half}).has_value());
    CHECK(tx->close_channels().has_value());
    CHECK(watch.elapsed() >= 350ms);  // what goes out last is paid by the next; 20 ms may go at once
  }
  auto tape = captures(1);
  auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(ram, std::move(tape.links), {.bandwidth = 1});
  REQUIRE(tx.has_value());
  for (int i = 0; i < 2; ++i) REQUIRE(tx->queue_device_state({"vfio", 0, half}).has_value());
  // The first part has left; the next one is due in hours.
  CHECK(eventually([&] { return tape.tapes[0]->size() > 512; }));
  CHECK(tape.tapes[0]->size() < half.size());
  const Stopwatch watch;
  tx->cancel();
  CHECK(code_of(tx->close_channels()) == Errc::cancelled);
  CHECK(watch.elapsed() < no_hang);
}
