// SPDX-License-Identifier: MIT
//
// A sender whose policy knows memory that was never touched: what arrives is right over two rounds, also where the guest
// wrote between the snapshot and the first round, and the source's memory stays untouched.
#include "multifd/zero/residency.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <cstring>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t page_bytes = 4096;
constexpr std::size_t pages = 2000;

/// Anonymous memory that nobody has touched.
struct Untouched {
  Untouched()
      : data(static_cast<std::byte*>(
            ::mmap(nullptr, pages * page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(data != MAP_FAILED);
    ::madvise(data, pages * page_bytes, MADV_NOHUGEPAGE);
  }
  Untouched(const Untouched&) = delete;
  Untouched& operator=(const Untouched&) = delete;
  ~Untouched() { ::munmap(data, pages * page_bytes); }

  std::span<std::byte> bytes() const { return {data, pages * page_bytes}; }
  void write(std::size_t page, unsigned char value) const { std::memset(data + page * page_bytes, value, page_bytes); }
  std::size_t resident() const {
    std::vector<unsigned char> in_core(pages);
    REQUIRE(::mincore(data, pages * page_bytes, in_core.data()) == 0);
    std::size_t sum = 0;
    for (const unsigned char each : in_core) sum += each & 1;
    return sum;
  }

  std::byte* data;
};

}  // namespace

TEST_CASE_TEMPLATE(
    "two rounds with ResidencyAware: the receiver has the source's memory, the source reads none of what "
    "was never touched",
    Inner, ZeroPagesLegacy, ZeroPagesMultifd) {
  const Watchdog watchdog("residency");
  const Untouched source_memory;
  Block target_memory(pages * page_bytes);
  for (std::size_t page = 0; page < pages; page += 17) source_memory.write(page, 1);
  RamMap source, target;
  const auto block = source.add("pc.ram", source_memory.bytes());
  REQUIRE(block.has_value());
  REQUIRE(target.add("pc.ram", target_memory.bytes()).has_value());

  // From here on the dirty log would know of every write.
  const auto untouched = UntouchedPages::snapshot(source);
  REQUIRE(untouched.has_value());
  std::vector<std::uint64_t> dirty((pages + 63) / 64);
  const auto guest_writes = [&](std::size_t page, unsigned char value) {
    source_memory.write(page, value);
    dirty[page / 64] |= std::uint64_t{1} << page % 64;
  };
  guest_writes(100, 2);  // the snapshot calls it untouched, and so will the first round
  const std::size_t resident = source_memory.resident();

  auto links = memory_links(3);
  using Zeros = ResidencyAware<Inner>;
  Result<Receiver<MemoryTransport, NoComp>> rx = std::unexpected(Error{});
  std::thread opening([&] { rx = Receiver<MemoryTransport, NoComp>::open(target, std::move(links.receiver)); });
  auto tx = Sender<MemoryTransport, NoComp, Zeros>::open(source, std::move(links.sender),
                                                         {.zero_pages = {.untouched = *untouched, .next = {}}});
  opening.join();
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());

  // With ZeroPagesLegacy the main stream tells the target; here it is this function.
  const auto on_zero = [&](std::uint64_t offset) { std::memset(target_memory.bytes().data() + offset, 0, page_bytes); };
  REQUIRE(tx->queue_range(*block, 0, source_memory.bytes().size(), on_zero).has_value());
  REQUIRE(tx->close_epoch_and_wait().has_value());
  CHECK(source_memory.resident() == resident);
  CHECK(untouched->count() == 0);  // each page was asked about

  untouched->forget();
  guest_writes(101, 3);
  guest_writes(102, 0);
  REQUIRE(tx->queue_dirty(*block, dirty, 0, on_zero).has_value());
  REQUIRE(tx->close_channels().has_value());
  REQUIRE(rx->finish().has_value());
  CHECK(first_difference(source_memory.bytes(), target_memory.bytes()) == source_memory.bytes().size());
  CHECK(target_memory.bytes()[100 * page_bytes] == std::byte{2});
}
