// SPDX-License-Identifier: MIT
#include "multifd/memory/dirty_bitmap.hpp"

#include <doctest/doctest.h>

#include <random>
#include <vector>

TEST_CASE("A word's offsets are exactly those of its set bits, in order, and the bitmap ends behind the last") {
  std::mt19937_64 random(1);
  for (std::size_t round = 0; round < 500; ++round) {
    std::vector<std::uint64_t> bitmap(1 + round % 5);
    for (std::uint64_t& word : bitmap) {
      switch (random() % 5) {
        case 0: word = 0; break;
        case 1: word = ~std::uint64_t{0}; break;
        case 2: word = random() & random() & random(); break;
        case 3: word = random() | random() | random(); break;
        default: word = ~std::uint64_t{0} << random() % 64; break;
      }
    }
    const std::size_t page_bytes = std::size_t{1024} << round % 7;
    std::vector<std::uint64_t> expected;
    std::vector<std::uint64_t> found;
    for (std::size_t w = 0; w < bitmap.size(); ++w) {
      for (unsigned bit = 0; bit < 64; ++bit)
        if ((bitmap[w] >> bit & 1) != 0) expected.push_back((w * 64 + bit) * page_bytes);
      std::array<std::uint64_t, 64> offsets;
      const auto some = multifd::dirty_offsets(bitmap[w], w * 64 * page_bytes, page_bytes, offsets);
      found.insert(found.end(), some.begin(), some.end());
    }
    CHECK(found == expected);
    CHECK(multifd::end_of_dirty(bitmap) == (expected.empty() ? 0 : expected.back() / page_bytes + 1));
  }
}
