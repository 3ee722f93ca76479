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
  REQUIRE((*tx)->close_epoch().has_value());
  REQUIRE((*rx)->release_epoch().has_value());
  CHECK(guests.source == guests.target);
  CHECK(total((*rx)->stats().channels).normal_pages == pages);
}

TEST_CASE("What a stack does not have is not_supported, and a name that no list has is unknown_policy") {
  Guests guests;
  auto links = links_over(true);
  auto tx = open_any_sender<FromCopies>(Compressors{}, ZeroPolicies{}, guests.source_map, std::move(links.sender));
  REQUIRE(tx.has_value());
  CHECK(code_of((*tx)->queue_range(guests.block, 0, page, {})) == Errc::not_supported);
  const std::uint64_t bitmap = 1;
  CHECK(code_of((*tx)->queue_dirty(guests.block, std::span(&bitmap, 1), {})) == Errc::not_supported);
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
