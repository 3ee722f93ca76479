// SPDX-License-Identifier: MIT
//
// However the wire cuts the bytes up, on either side, the result is the same.
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using Split = testing::FaultTransport<MemoryTransport>;

namespace {

constexpr std::size_t whole = std::numeric_limits<std::size_t>::max();

std::vector<Split> split(std::vector<MemoryTransport> links, std::size_t most) {
  std::vector<Split> result;
  for (auto& link : links) result.emplace_back(std::move(link), testing::FaultOptions{.max_io_bytes = most});
  return result;
}

template <class C>
void transfer(std::size_t write_at_most, std::size_t read_at_most, std::size_t capacity) {
  CAPTURE(write_at_most);
  CAPTURE(read_at_most);
  CAPTURE(capacity);
  constexpr std::size_t pages = 10;
  Rng rng(seed());
  Block a(pages * 4096), b(pages * 4096);
  for (std::size_t p = 0; p < pages; ++p) fill_page(a.page(p, 4096), any_fill(rng), rng);
  b.fill(std::byte{0xee});
  RamMap source, target;
  const auto block = source.add("pc.ram", a.bytes());
  REQUIRE(target.add("pc.ram", b.bytes()).has_value());
  auto links = memory_links(2, capacity);
  auto tx = Sender<Split, C, ZeroPagesMultifd>::open(source, split(std::move(links.sender), write_at_most),
                                                     {.digest = Digest::on});
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  auto rx = Receiver<Split, C>::open(target, split(std::move(links.receiver), read_at_most));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  for (unsigned round = 0; round < 2; ++round) {
    for (std::size_t p = 0; p < pages; p += 5) {
      REQUIRE(tx->queue_range(*block, p * 4096, 5 * 4096).has_value());
      REQUIRE(tx->push_out().has_value());
    }
    REQUIRE(tx->close_epoch_and_wait() == std::uint64_t{round});
    fill_page(a.page(round, 4096), Fill::words, rng);
    fill_page(a.page(7, 4096), Fill::zero, rng);
  }
  REQUIRE(tx->queue_range(*block, 0, a.size()).has_value());
  CHECK(tx->close_channels().has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
  CHECK(a == b);
  const ChannelStats out = total(tx->stats().channels);
  const ChannelStats in = total(rx->stats().channels);
  CHECK(out.wire_bytes == in.wire_bytes);
  CHECK(out.normal_pages == in.normal_pages);
  CHECK(out.zero_pages == in.zero_pages);
  CHECK(out.packets == in.packets);
  CHECK(rx->stats().pages_verified == in.normal_pages);
}

}  // namespace

TEST_CASE_TEMPLATE("Short reads and writes change nothing", C, NoComp, Zlib, Zstd) {
  const Watchdog watchdog("short reads and writes", 280s);
  // Around the sizes that matter: a hello (64), the part of a header that is looked at first (12), a header (1344),
  // a page, and both together.
  std::vector<std::size_t> sizes = {1,    2,    3,    7,    11,   12,   13,   63,   64,   65,   319,
                                    1343, 1344, 1345, 4095, 4096, 4097, 5439, 5440, 5441, whole};
  if (quick()) sizes = {2, 7, 63, 1343, 1345, 4097, whole};
  for (const std::size_t most : sizes) {
    transfer<C>(most, whole, 64 * 1024);
    transfer<C>(whole, most, 64 * 1024);
    transfer<C>(most, most, 64 * 1024);
  }
  for (const std::size_t capacity : {std::size_t{5}, std::size_t{1344}, std::size_t{4099}})
    transfer<C>(whole, whole, capacity);
}
