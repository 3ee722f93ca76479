// SPDX-License-Identifier: MIT
#include "multifd/ends/populate_ahead.hpp"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <ostream>
#include <thread>
#include <vector>

using multifd::BlockId;
using multifd::PopulateAhead;
using multifd::RamMap;

namespace {

constexpr std::size_t region = PopulateAhead::region_bytes;
constexpr std::size_t pages_of_region = region / 4096;

/// Fresh memory that begins in the middle of a huge page.
struct Fresh {
  explicit Fresh(std::size_t bytes) : size(bytes + region) {
    whole = static_cast<std::byte*>(
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    REQUIRE(whole != MAP_FAILED);
    block = map.add("pc.ram", std::span(whole + 4096, bytes)).value();
  }
  ~Fresh() { ::munmap(whole, size); }

  /// Whether the middle of a region is in memory.
  bool resident(std::size_t r) const {
    auto* const page = whole + (r * region + region / 2);
    unsigned char state = 0;
    REQUIRE(::mincore(page, 4096, &state) == 0);
    return (state & 1) != 0;
  }
  std::size_t resident_regions() const {
    std::size_t count = 0;
    for (std::size_t r = 0; r < map.block(block).bytes / region; ++r) count += resident(r) ? 1u : 0u;
    return count;
  }

  RamMap map;
  BlockId block{};
  std::byte* whole = nullptr;
  std::size_t size = 0;
};

/// The helper, running; stopped and joined at the end.
struct Helper {
  explicit Helper(const RamMap& map) : ahead(PopulateAhead::create(map).value()), thread([this] { ahead->run(); }) {}
  ~Helper() { ahead->stop(); }
  std::unique_ptr<PopulateAhead> ahead;
  std::jthread thread;
};

template <class Condition>
bool eventually(Condition&& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace

TEST_CASE("Memory behind dense data is populated up to the window, and no further") {
  constexpr std::size_t window = PopulateAhead::window_bytes / region;
  Fresh fresh((window + 8) * region);
  {
    const Helper helper(fresh.map);
    helper.ahead->note(fresh.block, 127 * 4096, 128);
    CHECK(eventually([&] { return fresh.resident(window - 1); }));
    helper.ahead->note(fresh.block, region + 127 * 4096, 128);  // wakes it again: the window moves by one
    CHECK(eventually([&] { return fresh.resident(window); }));
  }
  // One region more may be in memory as the huge page across a border.
  for (std::size_t r = window + 3; r < window + 8; ++r) CHECK_FALSE(fresh.resident(r));
}

TEST_CASE("Sparse data is not followed") {
  Fresh fresh(32 * region);
  {
    const Helper helper(fresh.map);
    for (std::size_t r = 0; r < 8; ++r) helper.ahead->note(fresh.block, r * region, pages_of_region / 5);
    // It has looked at all of that when it has populated behind this, at the latest.
    helper.ahead->note(fresh.block, 20 * region, 4 * pages_of_region);
    CHECK(eventually([&] { return fresh.resident(22); }));
  }
  for (std::size_t r = 1; r < 20; ++r) CHECK_FALSE(fresh.resident(r));
}

TEST_CASE("The end of a block, and a block smaller than a huge page, are no places to run over") {
  Fresh fresh(3 * region + 5 * 4096);
  std::vector<std::byte> small(4096);
  const BlockId other = fresh.map.add("rom", small).value();
  {
    const Helper helper(fresh.map);
    helper.ahead->note(other, 0, 1);
    helper.ahead->note(fresh.block, 0, pages_of_region);
    CHECK(eventually([&] { return fresh.resident(2); }));
    helper.ahead->note(fresh.block, 3 * region, pages_of_region);
  }
  CHECK(fresh.resident_regions() >= 2);
}

TEST_CASE("stop() ends the helper, before it runs and while it populates") {
  Fresh fresh(16 * region);
  const auto ahead = PopulateAhead::create(fresh.map).value();
  ahead->stop();
  ahead->run();  // returns
  for (int i = 0; i < 20; ++i) {
    Fresh again(16 * region);
    const Helper helper(again.map);
    helper.ahead->note(again.block, 0, pages_of_region);
  }
}
