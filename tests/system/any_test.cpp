// SPDX-License-Identifier: MIT
//
// AnySender and AnyReceiver: stacks by name, over transports chosen at run time.
#include "multifd/any.hpp"

#include <doctest/doctest.h>

#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/transport/any_transport.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 300;
constexpr unsigned channels = 2;
using Link = AnyTransport<FdTransport, MemoryTransport>;
using Compressors = PolicyList<NoComp, Zlib, Zstd>;
using ZeroPolicies = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;

struct Guests {
  Guests() {
    Rng rng(seed());
    for (std::size_t p = 0; p < pages; ++p) fill_page(source.page(p, page), any_fill(rng), rng);
    target.fill(std::byte{0});
    block = *source_map.add("pc.ram", source.bytes());
    REQUIRE(target_map.add("pc.ram", target.bytes()).has_value());
  }
  Block source{pages * page};
  Block target{pages * page};
  RamMap source_map, target_map;
  BlockId block{};
};

Links<Link> links_over(bool sockets) {
  if (!sockets) {
    auto pair = memory_links(channels);
    return {Link::all_of(std::move(pair.sender)), Link::all_of(std::move(pair.receiver))};
  }
  auto pair = unix_links(channels);
  return {Link::all_of(std::move(pair.sender)), Link::all_of(std::move(pair.receiver))};
}

using OpenSender = Result<std::unique_ptr<AnySender>>;
using OpenReceiver = Result<std::unique_ptr<AnyReceiver>>;

std::pair<OpenSender, OpenReceiver> open_both(Guests& guests, AnySenderOptions options, bool sockets) {
  auto links = links_over(sockets);
  const std::string_view compression = options.compression;
  OpenSender tx = open_any_sender(Compressors{}, ZeroPolicies{}, guests.source_map, std::move(links.sender), options);
  OpenReceiver rx = open_any_receiver(Compressors{}, guests.target_map, std::move(links.receiver),
                                      AnyReceiverOptions<>{.compression = compression, .barrier = Barrier::manual});
  return {std::move(tx), std::move(rx)};
}

}  // namespace

TEST_CASE("Every stack of the lists moves a guest by its names, over either transport") {
  const Watchdog watchdog("any");
  for (const bool sockets : {true, false})
    for (const std::string_view compression : Compressors::names)
      for (const std::string_view zero_pages : ZeroPolicies::names) {
        CAPTURE(sockets);
        CAPTURE(compression);
        CAPTURE(zero_pages);
        Guests guests;
        auto [tx, rx] = open_both(guests, {.compression = compression, .level = 1, .zero_pages = zero_pages}, sockets);
        REQUIRE_MESSAGE(tx.has_value(), text(tx));
        REQUIRE_MESSAGE(rx.has_value(), text(rx));
        std::vector<std::uint64_t> on_main;
        const auto queued = (*tx)->queue_range(guests.block, 0, guests.source.size(), [&](std::uint64_t offset) {
          on_main.push_back(offset);
          return on_main.size() % 2 == 1;  // every second page travels as bytes
        });
        REQUIRE_MESSAGE(queued.has_value(), text(queued));
        CHECK(on_main.empty() == (zero_pages != "legacy"));
        REQUIRE((*tx)->close_epoch().has_value());
        for (std::size_t i = 0; i < on_main.size(); i += 2)
          REQUIRE((*rx)->apply_zero(guests.block, on_main[i]).has_value());
        const auto epoch = (*rx)->release_epoch();
        REQUIRE_MESSAGE(epoch.has_value(), text(epoch));
        CHECK(guests.source == guests.target);
        CHECK((*rx)->received(guests.block, page * (pages - 1)));
        REQUIRE((*tx)->close_channels().has_value());
        const auto finished = (*rx)->finish();
        CHECK_MESSAGE(finished.has_value(), text(finished));
        const ChannelStats sum = total((*rx)->stats().channels);
        CHECK(sum.normal_pages + sum.zero_pages + (on_main.size() + 1) / 2 == pages);
      }
}

TEST_CASE("An AnySender without anybody for zero pages sends them as bytes, or says that it needs somebody") {
  const Watchdog watchdog("any");
  Guests guests;
  auto [tx, rx] = open_both(guests, {.zero_pages = "legacy"}, true);
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  REQUIRE((*tx)->queue_range(guests.block, 0, guests.source.size(), {}).has_value());
  CHECK(code_of((*tx)->queue_zeros(guests.block, 0, page, {})) == Errc::bad_option);
  CHECK((*tx)->stats().zero_on_main == 0);  // nobody was there to take the page
  REQUIRE((*tx)->close_epoch().has_value());
  REQUIRE((*rx)->release_epoch(AnyReceiver::WhileHeld()).has_value());  // nothing to do while they are held
  CHECK(guests.source == guests.target);
  CHECK(total((*rx)->stats().channels).normal_pages == pages);
}

TEST_CASE("An Interrupt cancels an AnySender that waits for room, for an epoch, or for the end") {
  for (const int call : {0, 1, 2}) {
    CAPTURE(call);
    const Watchdog watchdog("any: interrupt");
    Guests guests;
    auto links = memory_links(1, page);  // nobody reads, and there is no room for a packet
    Interrupt interrupt = Interrupt::create().value();
    auto tx = open_any_sender(Compressors{}, ZeroPolicies{}, guests.source_map, Link::all_of(std::move(links.sender)),
                              {.zero_pages = "none", .depth = 2, .interrupt = &interrupt});
    REQUIRE_MESSAGE(tx.has_value(), text(tx));
    std::thread trigger([&] {
      std::this_thread::sleep_for(20ms);  // nothing tells that a call waits; one that comes early must do as well
      interrupt.trigger();
    });
    const auto cancelled = [&]() -> Result<void> {
      for (;;) {
        const auto queued = (*tx)->queue_range(guests.block, 0, guests.source.size(), {});
        if (!queued) return std::unexpected(queued.error());
        if (call == 2) return (*tx)->close_channels();
        const auto epoch = (*tx)->close_epoch();
        if (!epoch) return std::unexpected(epoch.error());
        if (call == 1) return (*tx)->wait(*epoch);
      }
    }();
    trigger.join();
    CHECK_MESSAGE(code_of(cancelled) == Errc::cancelled, text(cancelled));
    CHECK(code_of((*tx)->close_channels()) == Errc::cancelled);
  }
}

TEST_CASE("queue_zeros takes whole pages of a block, and refuses any other range before it begins") {
  const Watchdog watchdog("any");
  constexpr std::uint64_t all = ~std::uint64_t{0};
  constexpr std::uint64_t size = pages * page;
  for (const std::string_view zero_pages : ZeroPolicies::names) {
    CAPTURE(zero_pages);
    Guests guests;
    guests.source.fill(std::byte{0});
    guests.target.fill(std::byte{0xee});
    auto [tx, rx] = open_both(guests, {.zero_pages = zero_pages}, true);
    REQUIRE(tx.has_value());
    REQUIRE(rx.has_value());
    std::vector<std::uint64_t> on_main;
    const auto on_zero = [&](std::uint64_t offset) {
      on_main.push_back(offset);
      return true;
    };
    const std::pair<std::uint64_t, std::uint64_t> ranges[] = {{0, 1},
                                                              {0, page - 1},
                                                              {page / 2, page},
                                                              {1, 0},
                                                              {size, page},
                                                              {0, size + page},
                                                              {size - page, 2 * page},
                                                              {page, all - page + 1},
                                                              {size - page, all - size + 2 * page + 1},
                                                              {all - page + 1, page},
                                                              {all - page + 1, 2 * page},
                                                              {all, all}};
    for (const auto& [offset, bytes] : ranges) {
      CAPTURE(offset);
      CAPTURE(bytes);
      const auto queued = (*tx)->queue_zeros(guests.block, offset, bytes, on_zero);
      REQUIRE_MESSAGE(code_of(queued) == Errc::bad_range, text(queued));
      CHECK(queued.error().detail == offset);
      CHECK(queued.error().subject.view() == "pc.ram");
    }
    CHECK(code_of((*tx)->queue_zeros(BlockId{1}, 0, page, on_zero)) == Errc::bad_range);
    CHECK((*tx)->stats().queued_pages + (*tx)->stats().zero_on_main == 0);
    CHECK((*tx)->queue_zeros(guests.block, 0, 0, on_zero).has_value());
    CHECK((*tx)->queue_zeros(guests.block, size, 0, {}).has_value());
    CHECK((*tx)->stats().queued_pages + (*tx)->stats().zero_on_main == 0);
    CHECK((*tx)->queue_zeros(guests.block, page, size - page, on_zero).has_value());
    CHECK((*tx)->queue_zeros(guests.block, 0, page, on_zero).has_value());
    CHECK((*tx)->stats().queued_pages + (*tx)->stats().zero_on_main == pages);
    CHECK(on_main.size() == (zero_pages == "legacy" ? pages : 0));
    REQUIRE((*tx)->close_epoch().has_value());
    for (const std::uint64_t offset : on_main) REQUIRE((*rx)->apply_zero(guests.block, offset).has_value());
    REQUIRE((*rx)->release_epoch().has_value());
    CHECK(guests.source == guests.target);
  }
}

TEST_CASE("What a stack does not have is not_supported, and a name that no list has is unknown_policy") {
  Guests guests;
  auto links = links_over(true);
  auto tx = open_any_sender<FromCopies>(Compressors{}, ZeroPolicies{}, guests.source_map, std::move(links.sender));
  REQUIRE(tx.has_value());
  CHECK(code_of((*tx)->queue_range(guests.block, 0, page, {})) == Errc::not_supported);
  const std::uint64_t bitmap = 1;
  CHECK(code_of((*tx)->queue_dirty(guests.block, std::span(&bitmap, 1), 0, {})) == Errc::not_supported);
  auto rx = open_any_receiver(Compressors{}, guests.target_map, std::move(links.receiver),
                              AnyReceiverOptions<IntoHook>{.into = {[](ReceivedPacket&) { return Result<void>{}; }}});
  REQUIRE(rx.has_value());
  CHECK(code_of((*rx)->apply_zero(guests.block, 0)) == Errc::not_supported);
  CHECK(code_of((*rx)->apply_page(guests.block, 0, guests.source.page(0, page))) == Errc::not_supported);
  CHECK_FALSE((*rx)->received(guests.block, 0));
  (*tx)->cancel();
  (*rx)->cancel();
  for (const auto& options : {AnySenderOptions{.compression = "lzo"}, AnySenderOptions{.zero_pages = "some"}}) {
    auto some = links_over(true);
    CHECK(code_of(open_any_sender(Compressors{}, ZeroPolicies{}, guests.source_map, std::move(some.sender), options)) ==
          Errc::unknown_policy);
  }
  auto other = links_over(true);
  CHECK(code_of(open_any_receiver(Compressors{}, guests.target_map, std::move(other.receiver),
                                  AnyReceiverOptions<>{.compression = "lzo"})) == Errc::unknown_policy);
}
