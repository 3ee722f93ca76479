// SPDX-License-Identifier: MIT
#include "multifd/memory/received_pages.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>

using multifd::BlockId;
using multifd::RamMap;
using multifd::ReceivedPages;

TEST_CASE("A page is new once, in its own block only") {
  std::vector<std::byte> one(70 * 4096);
  std::vector<std::byte> two(70 * 4096);
  RamMap map;
  const BlockId a = map.add("a", one).value();
  const BlockId b = map.add("b", two).value();
  auto pages = ReceivedPages::create(map);
  REQUIRE(pages);
  // First and last page of each word of the bitmap, and the last page of the block.
  for (const std::uint64_t page : {0u, 1u, 62u, 63u, 64u, 65u, 69u}) {
    CAPTURE(page);
    CHECK_FALSE(pages->test(a, page * 4096));
    CHECK_FALSE(pages->test_and_set(a, page * 4096));
    CHECK(pages->test(a, page * 4096));
    CHECK(pages->test_and_set(a, page * 4096));
    CHECK_FALSE(pages->test(b, page * 4096));
  }
  CHECK_FALSE(pages->test(a, 2 * 4096));
  CHECK_FALSE(pages->test(a, 66 * 4096));
}

TEST_CASE("Adjacent pages are marked in one call, and no others") {
  constexpr std::size_t most = 200;
  std::vector<std::byte> ram(most * 1024);
  RamMap map(1024);
  const BlockId id = map.add("a", ram).value();
  for (std::size_t first = 0; first < most; first += 7) {
    for (std::size_t count = 1; first + count <= most; ++count) {
      auto pages = ReceivedPages::create(map);
      REQUIRE(pages);
      pages->set(id, first * 1024, count);
      std::size_t wrong = 0;
      for (std::size_t page = 0; page < most; ++page)
        wrong += pages->test(id, page * 1024) != (page >= first && page < first + count);
      CAPTURE(first);
      CAPTURE(count);
      REQUIRE(wrong == 0);
    }
  }
}

TEST_CASE("The page size of the map counts, not 4096") {
  std::vector<std::byte> ram(4 * 65536);
  RamMap map(65536);
  const BlockId id = map.add("a", ram).value();
  auto pages = ReceivedPages::create(map);
  REQUIRE(pages);
  CHECK_FALSE(pages->test_and_set(id, 65536));
  CHECK_FALSE(pages->test(id, 0));
  CHECK(pages->test(id, 65536));
  CHECK_FALSE(pages->test(id, 2 * 65536));
}

TEST_CASE("What is no page of the map is not marked, whatever the numbers") {
  std::vector<std::byte> one(70 * 4096);
  std::vector<std::byte> two(64 * 4096);
  RamMap map;
  const BlockId a = map.add("a", one).value();
  const BlockId b = map.add("b", two).value();
  auto pages = ReceivedPages::create(map);
  REQUIRE(pages);
  pages->set(a, 0, 70);
  pages->set(b, 0, 64);
  CHECK(pages->test(a, 69 * 4096));
  CHECK(pages->test(a, 69 * 4096 + 4095));  // a byte of the last page
  for (const std::uint64_t past : {std::uint64_t{70 * 4096}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    CHECK_FALSE(pages->test(a, past));
    CHECK_FALSE(pages->test(b, past));
  }
  CHECK_FALSE(pages->test(b, 64 * 4096));
  for (const std::uint32_t other : {2u, 1000u, ~0u}) CHECK_FALSE(pages->test(BlockId{other}, 0));
}

TEST_CASE("Of several threads that mark the same pages, exactly one is first at each") {
  constexpr std::size_t page_count = 4000;  // neighbours share words, so threads collide
  constexpr std::size_t thread_count = 4;
  std::vector<std::byte> ram(page_count * 1024);
  RamMap map(1024);
  const BlockId id = map.add("a", ram).value();
  for (unsigned round = 0; round < 20; ++round) {
    auto pages = ReceivedPages::create(map);
    REQUIRE(pages);
    std::vector<std::vector<std::size_t>> first(thread_count);
    std::barrier start(thread_count);
    {
      std::vector<std::jthread> threads;
      for (std::size_t t = 0; t < thread_count; ++t) {
        threads.emplace_back([&, t] {
          // All run through the same words, each from another page of the word on.
          start.arrive_and_wait();
          for (std::size_t word = 0; word < page_count; word += 32)
            for (std::size_t i = 0; i < 32; ++i) {
              const std::size_t page = word + (i + 8 * t) % 32;
              if (!pages->test_and_set(id, page * 1024)) first[t].push_back(page);
            }
        });
      }
    }
    std::vector<unsigned> firsts(page_count);
    for (const auto& mine : first)
      for (const std::size_t page : mine) ++firsts[page];
    REQUIRE(std::ranges::count(firsts, 1u) == page_count);
    for (std::size_t page = 0; page < page_count; ++page)
      if (!pages->test(id, page * 1024)) FAIL("page ", page, " was lost");
  }
}

TEST_CASE("any() finds a mark in a range, and none beside it") {
  RamMap map;
  const auto block = map.add_elsewhere("pc.ram", 200 * 4096);
  REQUIRE(block.has_value());
  for (const std::uint64_t marked : {0u, 1u, 63u, 64u, 127u, 128u, 199u}) {
    CAPTURE(marked);
    auto pages = ReceivedPages::create(map);
    REQUIRE(pages.has_value());
    CHECK_FALSE(pages->any(*block, 0, 200));
    pages->set(*block, marked * 4096, 1);
    for (std::uint64_t first = 0; first < 200; ++first)
      for (const std::uint64_t count : {1u, 2u, 63u, 64u, 65u, 130u}) {
        if (first + count > 200) continue;
        const bool inside = first <= marked && marked < first + count;
        if (pages->any(*block, first * 4096, count) != inside) FAIL("first ", first, ", count ", count);
      }
    CHECK_FALSE(pages->any(*block, marked * 4096, 0));
  }
}
