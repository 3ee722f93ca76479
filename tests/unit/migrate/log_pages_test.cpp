// SPDX-License-Identifier: MIT
#include "multifd/migrate/dirty/detail/log_pages.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using migrate::detail::LogPages;
using Words = std::vector<std::uint64_t>;

namespace {

bool has(const Words& words, std::uint64_t bit) { return (words[bit / 64] >> bit % 64 & 1) != 0; }
void set(Words& words, std::uint64_t bit) { words[bit / 64] |= std::uint64_t{1} << bit % 64; }

/// Empty words, full words, and words with any bits.
Words any_words(test::Rng& rng, std::size_t count) {
  Words words(count);
  for (std::uint64_t& word : words) word = rng() % 3 == 0 ? 0 : rng() % 2 == 0 ? ~std::uint64_t{0} : rng() & rng();
  return words;
}

}  // namespace

TEST_CASE("runs of bits are found in words of all kinds") {
  test::Rng rng(test::seed());
  for (int round = 0; round < 200; ++round) {
    const Words words = any_words(rng, 4);
    const std::uint64_t end = 1 + rng() % 256, at = rng() % end;
    std::uint64_t first_set = at, first_clear = at;
    while (first_set < end && !has(words, first_set)) ++first_set;
    while (first_clear < end && has(words, first_clear)) ++first_clear;
    CHECK(migrate::detail::next_set(words, at, end) == first_set);
    CHECK(migrate::detail::next_clear(words, at, end) == first_clear);
    Words marked(4);
    migrate::detail::set_bits(marked, at, end);
    for (std::uint64_t bit = 0; bit < 256; ++bit) CHECK(has(marked, bit) == (bit >= at && bit < end));
  }
  CHECK(migrate::detail::next_set({}, 0, 0) == 0);
}

TEST_CASE("a log's pages are reported as all pages of the map that they touch, wherever the piece of log begins") {
  test::Rng rng(test::seed());
  for (const std::size_t map_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{16384}, std::size_t{65536}})
    for (int round = 0; round < 60; ++round) {
      CAPTURE(map_bytes);
      CAPTURE(round);
      const LogPages pages(map_bytes, 4096);
      const std::uint64_t block_bytes = 512 * 4096, map_pages = block_bytes / map_bytes;
      const std::uint64_t count = 1 + rng() % 300, first = round % 3 == 0 ? rng() % 3 * 64 : rng() % (512 - count);
      // Garbage behind the piece, which is not of the piece.
      const Words log = any_words(rng, bitmap_words(count));
      Words before(bitmap_words(map_pages)), expected;
      set(before, rng() % map_pages);
      expected = before;
      for (std::uint64_t page = 0; page < count; ++page)
        if (has(log, page))
          for (std::uint64_t byte = (first + page) * 4096; byte < (first + page + 1) * 4096; byte += 1024)
            set(expected, byte / map_bytes);
      pages.report(log, count, first * 4096, before);
      CHECK(before == expected);
    }
}

TEST_CASE("a log's page is covered when all of its bytes are in pages whose bit is set") {
  test::Rng rng(test::seed());
  for (const std::size_t map_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{16384}, std::size_t{65536}})
    for (int round = 0; round < 100; ++round) {
      CAPTURE(map_bytes);
      CAPTURE(round);
      const LogPages pages(map_bytes, 4096);
      const std::uint64_t first_page = rng() % 4 * 64, at = rng() % 400 * 4096, count = 1 + rng() % 300;
      const Words bitmap = any_words(rng, rng() % 4);
      Words found(bitmap_words(count) + 1), expected(bitmap_words(count) + 1);
      for (std::uint64_t page = 0; page < count; ++page) {
        bool all = true;
        for (std::uint64_t byte = at + page * 4096; byte < at + (page + 1) * 4096; byte += 1024) {
          const std::uint64_t of_map = byte / map_bytes;
          all = all && of_map >= first_page && of_map < first_page + bitmap.size() * 64 &&
                has(bitmap, of_map - first_page);
        }
        if (all) set(expected, page);
      }
      std::uint64_t last = 0;
      pages.for_each_covered_run(bitmap, first_page, at, count * 4096, [&](std::uint64_t begin, std::uint64_t end) {
        CHECK(begin >= last);
        CHECK(begin < end);
        REQUIRE(end <= count);
        migrate::detail::set_bits(found, begin, end);
        last = end;
      });
      CHECK(found == expected);
    }
}
