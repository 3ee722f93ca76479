// SPDX-License-Identifier: MIT
//
// What a relay is made of, one call at a time: a Sender of copies, zero pages that the caller knows of, and a Receiver
// that hands packets to a hook. Both together are tests/system/relay_test.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/drain.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
constexpr std::size_t header = 1344;

PageBuffer buffer_of(std::byte value) {
  auto buffer = PageBuffer::create();
  REQUIRE(buffer.has_value());
  std::memset(buffer->data(), std::to_integer<int>(value), multifd::batch_bytes);
  return std::move(*buffer);
}

constexpr auto never_asked = [](std::uint64_t) {
  FAIL_CHECK("on_zero was asked");
  return true;
};

/// A sender of one channel, and all that it wrote.
template <class Z, class From = FromCopies>
struct Sending {
  using Tx = Sender<MemoryTransport, NoComp, Z, From>;
  explicit Sending(const RamMap& ram) : links(memory_links(1, 16 << 20)) {
    auto opened = Tx::open(ram, std::move(links.sender), {.depth = 2});
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    tx.emplace(std::move(*opened));
  }
  Bytes close() {
    const auto closed = tx->close_channels();
    REQUIRE_MESSAGE(closed.has_value(), text(closed));
    return read_to_end(links.receiver[0]);
  }
  Links<MemoryTransport> links;
  std::optional<Tx> tx;
};

/// Where a page travelled and what it was there: -1 in a zero list, else the value of all its bytes, 1000 if they
/// differ.
using Place = std::pair<std::string, std::uint64_t>;
struct Sent {
  explicit Sent(const Bytes& stream) {
    for (const SeenPacket& packet : packets_of(stream)) {
      for (std::size_t i = 0; i < packet.offsets.size(); ++i) {
        int value = -1;
        if (i < packet.normal) {
          const auto bytes = std::span(stream).subspan(packet.at + header + i * page, page);
          const bool same = std::ranges::all_of(bytes, [&](std::byte byte) { return byte == bytes[0]; });
          value = same ? std::to_integer<int>(bytes[0]) : 1000;
        }
        if (epochs.size() <= syncs) epochs.resize(syncs + 1);
        CHECK(epochs[syncs].emplace(Place(packet.idstr, packet.offsets[i]), value).second);  // once an epoch
      }
      packets += !packet.offsets.empty();
      syncs += packet.flags & 1;
    }
  }
  std::vector<std::map<Place, int>> epochs;
  unsigned packets = 0;
  unsigned syncs = 0;
};

/// A transport that says where the bytes were that it was given.
class AddressTape {
 public:
  explicit AddressTape(std::shared_ptr<std::vector<const void*>> seen) : seen_(std::move(seen)) {}
  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    for (const iovec& buffer : buffers) seen_->push_back(buffer.iov_base);
    return total_bytes(buffers);
  }
  Result<std::size_t> read_some(MutableBuffers) noexcept { return std::size_t{0}; }
  Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}

 private:
  std::shared_ptr<std::vector<const void*>> seen_;
};

/// A packet as a hook saw it.
struct Seen {
  std::uint32_t channel;
  BlockId block;
  std::vector<std::uint64_t> offsets;
  std::size_t normal;
  Bytes bytes;
};

/// Collects packets; may be called by several channels.
struct Collector {
  PacketHook hook() {
    return [this](ReceivedPacket& packet) -> Result<void> {
      const std::scoped_lock lock(mutex);
      const std::byte* const from = packet.pages.data();
      seen.push_back({packet.channel,
                      packet.block,
                      {packet.offsets.begin(), packet.offsets.end()},
                      packet.normal_pages,
                      Bytes(from, from + packet.normal_pages * page)});
      return {};
    };
  }
  std::mutex mutex;
  std::vector<Seen> seen;
};

Bytes page_of(unsigned value) { return Bytes(page, std::byte(value)); }

}  // namespace

TEST_CASE_TEMPLATE("queue_zero() sends a zero page in the policy's form, from guest memory and among copies", Z,
                   ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd) {
  const Watchdog watchdog("queue_zero");
  constexpr bool on_main = Z::stage == ZeroStage::producer;
  constexpr bool listed = Z::stage == ZeroStage::channel;
  Block memory(400 * page), other(4 * page);
  // Nobody looks at the page: it may hold anything, unless it travels as it lies.
  if (Z::stage != ZeroStage::none) memory.fill(std::byte{9});
  for (const std::size_t p : {1u, 4u, 5u}) std::ranges::fill(memory.page(p, page), std::byte(p));
  const auto check = [&]<class From>() {
    constexpr bool copies = From::copies;
    CAPTURE(copies);
    RamMap ram;
    const auto add = [&](const char* idstr, const Block& block) {
      return copies ? *ram.add_elsewhere(idstr, block.size()) : *ram.add(idstr, block.bytes());
    };
    const BlockId block = add("pc.ram", memory);
    const BlockId second = add("vga", other);
    Sending<Z, From> sending(ram);
    auto& tx = *sending.tx;
    const Queued expected = on_main ? Queued::zero_on_main : Queued::queued;
    const auto queue_zero = [&](BlockId where, std::size_t p) { CHECK(tx.queue_zero(where, p * page) == expected); };
    const auto queue_data = [&](std::size_t p) {
      if constexpr (copies) {
        PageBuffer pages = buffer_of(std::byte(p));
        const std::uint64_t offset = p * page;
        CHECK(tx.queue_copies(block, std::span(&offset, 1), 1, pages, never_asked).has_value());
      } else {
        CHECK(tx.queue_page(block, p * page) == Queued::queued);
      }
    };
    if constexpr (copies) {
      // Every buffer of the hand-off has been used: a zero page that travels as bytes must be written there.
      std::vector<std::uint64_t> all(128);
      for (std::size_t p = 0; p < all.size(); ++p) all[p] = (200 + p) * page;
      for (int i = 0; i < 8; ++i) {
        PageBuffer pages = buffer_of(std::byte{0xff});
        REQUIRE(tx.queue_copies(block, all, all.size(), pages, never_asked).has_value());
        CHECK(tx.close_epoch().has_value());
      }
    }
    std::map<Place, int> epoch;
    const int zero = listed ? -1 : 0;
    const auto note_zero = [&](const char* idstr, std::size_t p) {
      if (!on_main) epoch[{idstr, p * page}] = zero;
    };
    queue_zero(block, 0);
    note_zero("pc.ram", 0);
    queue_data(1);
    queue_zero(block, 3);
    queue_zero(block, 2);
    note_zero("pc.ram", 2);
    note_zero("pc.ram", 3);
    queue_zero(second, 3);
    note_zero("vga", 3);
    queue_data(4);
    queue_data(5);
    for (const unsigned p : {1u, 4u, 5u}) epoch[{"pc.ram", p * page}] = static_cast<int>(p);
    for (std::size_t p = 10; p < 210; ++p) {
      queue_zero(block, p);
      note_zero("pc.ram", p);
    }
    CHECK(tx.close_epoch().has_value());
    // close_channels() ends an epoch of nothing else.
    queue_zero(second, 0);
    const Sent sent(sending.close());
    const std::size_t first = copies ? 8 : 0;
    CHECK(sent.syncs == first + 2);
    REQUIRE(sent.epochs.size() == (on_main ? first + 1 : first + 2));
    CHECK(sent.epochs[first] == epoch);
    if (!on_main) CHECK(sent.epochs[first + 1] == std::map<Place, int>{{Place("vga", 0), zero}});
    CHECK(tx.stats().zero_on_main == (on_main ? 205 : 0));
    CHECK(total(tx.stats().channels).zero_pages == (listed ? 205 : 0));
    CHECK(tx.stats().queued_pages == (copies ? 8 * 128 : 0) + 3 + (on_main ? 0 : 205));
    // 200 zero pages in a row need two packets, not 200.
    CHECK(sent.packets - (copies ? 8 : 0) <= 10);
  };
  check.template operator()<FromGuest>();
  check.template operator()<FromCopies>();
}

TEST_CASE("queue_zero refuses places that are no page, and the sender goes on") {
  const Watchdog watchdog("queue_zero refuses");
  const auto check = [&]<class From>() {
    Block memory(4 * page);
    RamMap ram;
    REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
    Sending<ZeroPagesMultifd, From> sending(ram);
    auto& tx = *sending.tx;
    for (const std::uint64_t offset : {std::uint64_t{1}, 4 * page, std::uint64_t{0} - page, ~std::uint64_t{0}})
      CHECK(code_of(tx.queue_zero(BlockId{0}, offset)) == Errc::bad_range);
    CHECK(code_of(tx.queue_zero(BlockId{1}, 0)) == Errc::bad_range);
    CHECK(code_of(tx.queue_zeros(BlockId{0}, 3 * page, 2 * page)) == Errc::bad_range);
    CHECK(code_of(tx.queue_zeros(BlockId{0}, page, std::uint64_t{0} - page)) == Errc::bad_range);
    CHECK(code_of(tx.queue_zeros(BlockId{0}, 0, page / 2)) == Errc::bad_range);
    CHECK(tx.queue_zeros(BlockId{0}, 4 * page, 0)->queued == 0);
    CHECK(tx.queue_zero(BlockId{0}, 3 * page) == Queued::queued);
    const Sent sent(sending.close());
    CHECK(sent.epochs == std::vector{std::map<Place, int>{{Place("pc.ram", 3 * page), -1}}});
    CHECK(code_of(tx.queue_zero(BlockId{0}, 0)) == Errc::already_closed);
  };
  check.template operator()<FromGuest>();
  check.template operator()<FromCopies>();
}

TEST_CASE_TEMPLATE("queue_copies sends each page's bytes to its place, and zero pages in the policy's form", Z,
                   ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd) {
  const Watchdog watchdog("queue_copies");
  constexpr bool legacy = Z::stage == ZeroStage::producer;
  constexpr bool listed = Z::stage == ZeroStage::channel;
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 200 * page).has_value());
  Sending<Z> sending(ram);
  auto& tx = *sending.tx;
  // Normal pages in no order, some of them zero; then zero pages.
  const std::vector<std::uint64_t> offsets = {90 * page, 2 * page,  3 * page,  50 * page, 4 * page,
                                              5 * page,  70 * page, 10 * page, 11 * page, 12 * page};
  const std::vector<int> values = {1, 0, 2, 0, 0, 3, 4};
  std::vector<std::uint64_t> asked;
  const auto on_zero = [&](std::uint64_t offset) {
    if constexpr (!legacy) FAIL_CHECK("on_zero was asked");
    asked.push_back(offset);
    return offset != 3 * page && offset != 50 * page && offset != 11 * page;
  };
  for (int round = 0; round < 6; ++round) {  // more than there are buffers: old bytes lie in them
    asked.clear();
    PageBuffer pages = buffer_of(std::byte{0xff});
    for (std::size_t i = 0; i < values.size(); ++i) std::memset(pages.data() + i * page, values[i], page);
    const auto queued = tx.queue_copies(BlockId{0}, offsets, values.size(), pages, on_zero);
    REQUIRE_MESSAGE(queued.has_value(), text(queued));
    CHECK(queued->zero_on_main == (legacy ? 4 : 0));
    CHECK(queued->queued == (legacy ? 6 : 10));
    if (legacy) CHECK(asked == std::vector{2 * page, 50 * page, 4 * page, 10 * page, 11 * page, 12 * page});
    CHECK(tx.close_epoch().has_value());
  }
  const Sent sent(sending.close());
  std::map<Place, int> expected;
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    const int value = i < values.size() ? values[i] : 0;
    expected[{"pc.ram", offsets[i]}] = listed && value == 0 ? -1 : value;
  }
  if (legacy)
    for (const unsigned p : {2u, 4u, 10u, 12u}) expected.erase({"pc.ram", p * page});
  REQUIRE(sent.epochs.size() == 6);
  for (const auto& epoch : sent.epochs) CHECK(epoch == expected);
  CHECK(sent.syncs == 6);
  CHECK(sent.packets == 6);
}

TEST_CASE("A packet of copies whose pages all go to the main stream leaves no packet, but a SYNC") {
  const Watchdog watchdog("nothing but zero pages");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  Sending<ZeroPagesLegacy> sending(ram);
  PageBuffer pages = buffer_of(std::byte{0});
  const std::vector<std::uint64_t> offsets = {0, page, 2 * page};
  const auto queued = sending.tx->queue_copies(BlockId{0}, offsets, 2, pages, [](std::uint64_t) { return true; });
  REQUIRE(queued.has_value());
  CHECK(queued->zero_on_main == 3);
  CHECK(queued->queued == 0);
  CHECK(pages.data() != nullptr);
  const Sent sent(sending.close());
  CHECK(sent.packets == 0);
  CHECK(sent.syncs == 1);
}

TEST_CASE("Copies of the largest packet pass at every page size") {
  for (const std::size_t page_bytes : {1024u, 4096u, 65536u}) {
    CAPTURE(page_bytes);
    const Watchdog watchdog("full packets");
    RamMap ram(page_bytes);
    REQUIRE(ram.add_elsewhere("pc.ram", std::uint64_t{1} << 50).has_value());
    Sending<ZeroPagesMultifd> sending(ram);
    std::vector<std::uint64_t> offsets(524288 / page_bytes);
    for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = (std::uint64_t{1} << 49) + i * page_bytes;
    PageBuffer pages = buffer_of(std::byte{3});
    CHECK(sending.tx->queue_copies(BlockId{0}, offsets, offsets.size(), pages, never_asked).has_value());
    const auto packets = packets_of(sending.close(), page_bytes);
    REQUIRE(packets.size() == 2);
    CHECK(packets[0].offsets == offsets);
    CHECK(packets[0].size == 524288);
  }
}

TEST_CASE("queue_copies refuses bad counts, places and buffers: nothing is queued or swapped, and the sender goes on") {
  const Watchdog watchdog("queue_copies refuses");
  RamMap ram;
  const BlockId block = *ram.add_elsewhere("pc.ram", 200 * page);
  Sending<ZeroPagesNone> sending(ram);
  auto& tx = *sending.tx;
  PageBuffer pages = buffer_of(std::byte{1});
  const std::byte* const before = pages.data();
  const auto refused = [&](BlockId where, const std::vector<std::uint64_t>& offsets, std::size_t normal) {
    const auto queued = tx.queue_copies(where, offsets, normal, pages, never_asked);
    CHECK(pages.data() == before);
    return code_of(queued);
  };
  std::vector<std::uint64_t> many(129);
  for (std::size_t p = 0; p < many.size(); ++p) many[p] = p * page;
  CHECK(refused(block, {}, 0) == Errc::bad_range);
  CHECK(refused(block, many, 129) == Errc::bad_range);
  CHECK(refused(block, many, 0) == Errc::bad_range);
  CHECK(refused(block, {0, page}, 3) == Errc::bad_range);
  CHECK(refused(block, {0}, ~std::size_t{0}) == Errc::bad_range);
  CHECK(refused(BlockId{1}, {0}, 1) == Errc::bad_range);
  for (const std::size_t normal : {0u, 1u, 2u}) {  // the bad one among both kinds
    CHECK(refused(block, {0, 1}, normal) == Errc::offset_misaligned);
    CHECK(refused(block, {0, 200 * page}, normal) == Errc::offset_past_block);
    CHECK(refused(block, {0, std::uint64_t{0} - page}, normal) == Errc::offset_past_block);
  }
  PageBuffer none;
  for (const std::size_t normal : {0u, 1u}) {
    const std::uint64_t offset = 0;
    CHECK(code_of(tx.queue_copies(block, std::span(&offset, 1), normal, none, never_asked)) == Errc::bad_option);
    CHECK(none.data() == nullptr);
  }
  many.resize(128);
  CHECK(tx.queue_copies(block, many, 128, pages, never_asked).has_value());
  CHECK(pages.data() != before);
  const Sent sent(sending.close());
  REQUIRE(sent.epochs.size() == 1);
  CHECK(sent.epochs[0].size() == 128);
  CHECK(sent.packets == 1);
}

// A sender of copies has no call that reads guest memory, and one of guest memory none that takes copies.
template <class Tx>
concept TakesPages = requires(Tx& tx) { tx.queue_page(BlockId{0}, 0); };
template <class Tx>
concept TakesRanges = requires(Tx& tx) { tx.queue_range(BlockId{0}, 0, 0); };
template <class Tx>
concept TakesBitmaps = requires(Tx& tx, std::span<const std::uint64_t> bitmap) { tx.queue_dirty(BlockId{0}, bitmap); };
template <class Tx>
concept TakesCopies =
    requires(Tx& tx, PageBuffer& pages) { tx.queue_copies(BlockId{0}, std::span<const std::uint64_t>(), 0, pages); };
using FromMemory = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
using FromBuffers = Sender<MemoryTransport, NoComp, ZeroPagesNone, FromCopies>;
static_assert(TakesPages<FromMemory> && TakesRanges<FromMemory> && TakesBitmaps<FromMemory> &&
              !TakesCopies<FromMemory>);
static_assert(!TakesPages<FromBuffers> && !TakesRanges<FromBuffers> && !TakesBitmaps<FromBuffers> &&
              TakesCopies<FromBuffers>);

TEST_CASE("Blocks without memory are for senders of copies and receivers with a hook, and nobody else") {
  Block memory(8 * page);
  RamMap ram;
  REQUIRE(ram.add("pc.ram", memory.bytes()).has_value());
  REQUIRE(ram.add_elsewhere("vga", 8 * page).has_value());
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  CHECK(code_of(Tx::open(ram, memory_links(1).sender)) == Errc::block_without_memory);
  auto copies = memory_links(1);
  CHECK(Sender<MemoryTransport, NoComp, ZeroPagesNone, FromCopies>::open(ram, std::move(copies.sender)).has_value());

  const std::vector<Bytes> hello = {RawStream().hello(0).bytes()};
  CHECK(code_of(feed<NoComp>(ram, hello, Then::end_of_stream).result) == Errc::block_without_memory);
  Collector collector;
  CHECK(feed<NoComp, IntoHook>(ram, hello, Then::end_of_stream, {.into = {collector.hook()}}).result.has_value());
  CHECK(collector.seen.empty());
}

TEST_CASE("Pages of a relay are not copied: the sender writes from the buffer that the hook was given") {
  const Watchdog watchdog("no copies of copies");
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  auto seen = std::make_shared<std::vector<const void*>>();
  std::vector<const void*> handed;
  {
    auto tx = Sender<AddressTape, NoComp, ZeroPagesNone, FromCopies>::open(ram, one(AddressTape(seen)), {.depth = 2});
    REQUIRE(tx.has_value());
    RawStream stream;
    stream.hello(0);
    for (int i = 0; i < 20; ++i) stream.packet({.normal = {page, 3 * page}, .payload = Bytes(2 * page)});
    stream.sync();
    const auto outcome = feed<NoComp, IntoHook>(
        ram, {stream.bytes()}, Then::end_of_stream,
        {.into = {[&](ReceivedPacket& packet) -> Result<void> {
           handed.push_back(packet.pages.data());
           auto queued = tx->queue_copies(packet.block, packet.offsets, packet.normal_pages, packet.pages, never_asked);
           CHECK(packet.pages.data() != nullptr);
           CHECK(packet.pages.data() != handed.back());
           return queued ? Result<void>() : std::unexpected(queued.error());
         }}});
    CHECK_MESSAGE(outcome.result.has_value(), text(outcome.result));
    CHECK(tx->close_channels().has_value());
  }
  REQUIRE(handed.size() == 20);
  // Each write is a header and the pages, which lie next to each other.
  std::vector<const void*> pages;
  for (std::size_t i = 2; i < seen->size(); i += 2) pages.push_back((*seen)[i]);
  pages.resize(std::min<std::size_t>(pages.size(), 20));
  CHECK(pages == handed);
  // They go round: three batches and the receiver's own.
  CHECK(std::set(handed.begin(), handed.end()).size() <= 4);
}

TEST_CASE_TEMPLATE("A packet hook gets each packet checked and decoded, normal pages first", C, NoComp, Zlib) {
  RamMap ram;
  Block untouched(200 * page);
  untouched.fill(std::byte{0xee});
  REQUIRE(ram.add_elsewhere("vga", 200 * page).has_value());
  REQUIRE(ram.add("pc.ram", untouched.bytes(), Access::read_only).has_value());  // with a hook nobody writes to it
  Encoded<C> encoded;
  const auto payload = [&](std::initializer_list<unsigned> values) {
    Bytes bytes;
    for (const unsigned value : values) append(bytes, page_of(value));
    return encoded(bytes);
  };
  RawStream stream;
  // Close together, so that the next header is read with the payload before it.
  stream.hello(0)
      .packet({.flags = C::method, .normal = {7 * page, 2 * page}, .zero = {page}, .payload = payload({1, 2})})
      .packet({.flags = C::method, .idstr = "vga", .normal = {199 * page}, .payload = payload({3})})
      .packet({.flags = C::method, .zero = {0, 5 * page}})
      .packet({.flags = C::method, .idstr = ""})  // of no pages: not for the hook
      .sync()
      .packet({.flags = C::method | 1, .normal = {0}, .payload = payload({4})})  // with its SYNC, as QEMU 7.2 sends it
      .packet({.flags = C::method, .idstr = "vga", .zero = {0}})
      .sync();
  Collector collector;
  const auto outcome = feed<C, IntoHook>(ram, {stream.bytes(), RawStream().hello(1).sync().sync().sync().bytes()},
                                         Then::end_of_stream, {.into = {collector.hook()}});
  CHECK_MESSAGE(outcome.result.has_value(), text(outcome.result));
  const auto is = [&](const Seen& seen, std::uint32_t block, const std::vector<std::uint64_t>& offsets,
                      std::initializer_list<unsigned> values) {
    CHECK(seen.channel == 0);
    CHECK(index(seen.block) == block);
    CHECK(seen.offsets == offsets);
    CHECK(seen.normal == values.size());
    Bytes bytes;
    for (const unsigned value : values) append(bytes, page_of(value));
    CHECK((seen.bytes == bytes));
  };
  REQUIRE(collector.seen.size() == 5);
  is(collector.seen[0], 1, {7 * page, 2 * page, page}, {1, 2});
  is(collector.seen[1], 0, {199 * page}, {3});
  is(collector.seen[2], 1, {0, 5 * page}, {});
  is(collector.seen[3], 1, {0}, {4});
  is(collector.seen[4], 0, {0}, {});
  CHECK(std::ranges::all_of(untouched.bytes(), [](std::byte byte) { return byte == std::byte{0xee}; }));
  CHECK(total(outcome.stats.channels).normal_pages == 4);
  CHECK(total(outcome.stats.channels).zero_pages == 4);
  CHECK(outcome.stats.zeros_written == 0);
}

TEST_CASE("A packet that is refused does not reach the hook") {
  RamMap ram;
  REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
  struct Row {
    const char* what;
    Packet packet;
    Errc expected;
  };
  const Row rows[] = {
      {"past the block", {.normal = {0, 8 * page}, .payload = Bytes(2 * page)}, Errc::offset_past_block},
      {"zero page past the block",
       {.normal = {0}, .zero = {8 * page}, .payload = Bytes(page)},
       Errc::offset_past_block},
      {"wraps", {.zero = {std::uint64_t{0} - page}}, Errc::offset_past_block},
      {"no page's start", {.zero = {page + 1}}, Errc::offset_misaligned},
      {"unknown block", {.idstr = "vga", .zero = {0}}, Errc::unknown_block},
      {"twice", {.normal = {0, 0}, .payload = Bytes(2 * page)}, Errc::duplicate_page},
      {"zero and not", {.normal = {page}, .zero = {page}, .payload = Bytes(page)}, Errc::duplicate_page},
      {"too many", {.normal_pages = 129, .zero = {0}}, Errc::too_many_pages},
      {"short payload", {.normal = {0, page}, .payload = Bytes(page)}, Errc::bad_payload_size},
      {"truncated payload", {.next_packet_size = 4096, .normal = {0}, .payload = Bytes(100)}, Errc::truncated_payload},
  };
  for (const Row& row : rows) {
    CAPTURE(row.what);
    Collector collector;
    const auto outcome = feed<NoComp, IntoHook>(ram, {RawStream().hello(0).packet(row.packet).bytes()},
                                                Then::end_of_stream, {.into = {collector.hook()}});
    CHECK_MESSAGE(code_of(outcome.result) == row.expected, text(outcome.result));
    CHECK(collector.seen.empty());
  }
  // Its bytes do not match their digest.
  RawStream stream;
  stream.hello(0).packet({.normal = {0}, .payload = page_of(1)});
  Bytes bytes = stream.bytes();
  put(bytes, 64 + 36, 0x6d664458, 4);
  Collector collector;
  CHECK(code_of(feed<NoComp, IntoHook>(ram, {bytes}, Then::end_of_stream, {.into = {collector.hook()}}).result) ==
        Errc::digest_mismatch);
  CHECK(collector.seen.empty());
  // Nor do they decode.
  CHECK(code_of(feed<Zlib, IntoHook>(
                    ram, {RawStream().hello(0).packet({.flags = 2, .normal = {0}, .payload = Bytes(9)}).bytes()},
                    Then::end_of_stream, {.into = {collector.hook()}})
                    .result) == Errc::corrupt_payload);
  CHECK(collector.seen.empty());
}

TEST_CASE("A packet hook that leaves no buffer ends the migration, by the names of the block and the channel") {
  for (const std::size_t normal : {1u, 3u, 0u}) {
    CAPTURE(normal);
    const Watchdog watchdog("a hook that keeps the buffer");
    RamMap ram;
    REQUIRE(ram.add_elsewhere("vga.vram", 8 * page).has_value());
    REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
    Packet packet{.zero = {7 * page}, .payload = Bytes(normal * page, std::byte{3})};
    for (std::size_t p = 0; p < normal; ++p) packet.normal.push_back(p * page);
    // A second packet with pages: its buffer would be missing.
    const Bytes stream = RawStream()
                             .hello(1)
                             .packet(packet)
                             .packet({.normal = {0}, .payload = Bytes(page, std::byte{4})})
                             .sync()
                             .bytes();
    PageBuffer kept;
    unsigned calls = 0;
    auto outcome = feed<NoComp, IntoHook>(ram, {stream, RawStream().hello(0).sync().bytes()}, Then::end_of_stream,
                                          {.into = {[&](ReceivedPacket& received) -> Result<void> {
                                             ++calls;
                                             kept = std::move(received.pages);
                                             return {};
                                           }}});
    REQUIRE_MESSAGE(code_of(outcome.result) == Errc::bad_option, text(outcome.result));
    CHECK(outcome.result.error().subject.view() == "pc.ram");
    CHECK(outcome.result.error().channel == 1);
    CHECK(outcome.result.error().packet == 0);
    CHECK(text(outcome.result).contains("on_packet"));
    CHECK(calls == 1);
    CHECK(kept.data() != nullptr);
  }
}

TEST_CASE("With a packet hook nothing is kept of which pages arrived") {
  const Watchdog watchdog("received with a hook");
  RamMap ram;
  // A bit for each of its pages would need more memory than there is.
  REQUIRE(ram.add_elsewhere("pc.ram", std::uint64_t{1} << 60).has_value());
  Collector collector;
  auto links = memory_links(1);
  const Bytes stream = RawStream().hello(0).packet({.zero = {std::uint64_t{1} << 59}}).sync().bytes();
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream)).has_value());
  REQUIRE(links.sender[0].finish().has_value());
  auto rx =
      Receiver<MemoryTransport, NoComp, IntoHook>::open(ram, std::move(links.receiver), {.into = {collector.hook()}});
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  CHECK(rx->finish().has_value());
  REQUIRE(collector.seen.size() == 1);
  CHECK(collector.seen[0].offsets == std::vector{std::uint64_t{1} << 59});
}
