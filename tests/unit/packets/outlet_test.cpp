// SPDX-License-Identifier: MIT
#include "multifd/packets/outlet.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <cstddef>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

/// How often an outlet writes, and how much.
struct Calls {
  std::vector<std::size_t> bytes;
  std::chrono::milliseconds each{0};  ///< how long a call takes
};

class CountedWrites {
 public:
  explicit CountedWrites(Calls& calls) : calls_(&calls) {}
  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    const auto end = std::chrono::steady_clock::now() + calls_->each;
    while (std::chrono::steady_clock::now() < end) {
    }
    calls_->bytes.push_back(total_bytes(buffers));
    return total_bytes(buffers);
  }
  Result<std::size_t> read_some(MutableBuffers) noexcept { return std::size_t{0}; }
  Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}

 private:
  Calls* calls_;
};

/// One channel's outlet, and what it has written since the last look.
struct OneOutlet {
  using Outlet = packets::Outlet<CountedWrites, NoComp>;

  explicit OneOutlet(Digest digest = Digest::off) : shared(4096, {}, digest) {
    outlet.emplace(Outlet::create(shared, 0, CountedWrites(calls), {}).value());
    REQUIRE(outlet->begin().has_value());
    (void)written();
  }
  /// Sends page number `page` of the block, and the page behind it but one: two runs.
  void send(std::size_t page, bool in_guest) {
    const std::uint64_t offsets[] = {page * 4096, (page + 2) * 4096};
    const iovec runs[] = {const_buffer(ram.map.block(BlockId{0}).host.subspan(offsets[0], 4096)),
                          const_buffer(ram.map.block(BlockId{0}).host.subspan(offsets[1], 4096))};
    meter.checked();
    const auto sent = outlet->send({.id = BlockId{0},
                                    .block = ram.map.block(BlockId{0}),
                                    .offsets = offsets,
                                    .normal_pages = 2,
                                    .runs = runs,
                                    .in_guest = in_guest},
                                   meter);
    REQUIRE(sent.has_value());
    CHECK(sent->wire_bytes == packet);
  }
  std::vector<std::size_t> written() { return std::exchange(calls.bytes, {}); }

  static constexpr std::size_t header = 64 + 256 + 8 * 128;
  static constexpr std::size_t packet = header + 2 * 4096;
  using Sizes = std::vector<std::size_t>;

  GuestRam ram{16};
  Calls calls;
  packets::OutletShared shared;
  engine::ChannelCounters counters;
  engine::RateLimiter limiter{0};
  engine::Meter meter{counters, limiter};
  std::optional<Outlet> outlet;
};

}  // namespace

TEST_CASE("Four packets of guest memory leave in one call where the link is fast, and fewer before the worker waits") {
  OneOutlet one;
  using Sizes = OneOutlet::Sizes;
  one.send(0, true);  // nothing is known of the link
  CHECK(one.written() == Sizes{one.packet});
  for (std::size_t i = 1; i <= 3; ++i) one.send(i, true);
  CHECK(one.written().empty());
  one.send(4, true);
  CHECK(one.written() == Sizes{4 * one.packet});
  one.send(5, true);
  REQUIRE(one.outlet->push_out(one.meter).has_value());
  CHECK(one.written() == Sizes{one.packet});
  one.send(6, true);
  REQUIRE(one.outlet->close_epoch(0, one.meter).has_value());
  CHECK(one.written() == Sizes{one.packet + one.header});
  REQUIRE(one.outlet->push_out(one.meter).has_value());
  CHECK(one.written().empty());
}

TEST_CASE("A packet whose bytes the engine takes back leaves at once, with what waits before it") {
  OneOutlet one;
  using Sizes = OneOutlet::Sizes;
  one.send(0, true);
  one.send(1, true);
  (void)one.written();
  one.send(2, false);
  CHECK(one.written() == Sizes{2 * one.packet});
  one.send(3, false);
  CHECK(one.written() == Sizes{one.packet});
}

TEST_CASE("A packet with a digest leaves at once: its pages are a copy") {
  OneOutlet one(Digest::on);
  for (std::size_t i = 0; i < 3; ++i) {
    one.send(i, true);
    CHECK(one.written() == OneOutlet::Sizes{one.packet});
  }
}

TEST_CASE("Packets leave one by one on a slow link and under a cap") {
  OneOutlet one;
  SUBCASE("a slow link") { one.calls.each = std::chrono::milliseconds(3); }
  SUBCASE("a cap") { one.limiter.set_rate(400'000); }
  for (std::size_t i = 0; i < 3; ++i) {
    one.send(i, true);
    const std::vector<std::size_t> calls = one.written();
    CHECK(std::accumulate(calls.begin(), calls.end(), std::size_t{0}) == one.packet);
  }
}
