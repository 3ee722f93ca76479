// SPDX-License-Identifier: MIT
#include "multifd/memory/dirty_runs.hpp"

#include <doctest/doctest.h>

#include <ostream>
#include <random>
#include <vector>

namespace {

std::vector<bool> bits_of_runs(std::span<const std::uint64_t> bitmap) {
  std::vector<bool> bits(bitmap.size() * 64, false);
  std::uint64_t free_from = 0;
  const auto walked = multifd::for_each_dirty_run(bitmap, [&](std::uint64_t first, std::uint64_t pages) {
    CHECK(pages > 0);
    CHECK((first == 0 || first > free_from || free_from == 0));  // runs that touch are one run
    for (std::uint64_t i = first; i < first + pages; ++i) bits[i] = true;
    free_from = first + pages;
    return multifd::Result<void>{};
  });
  CHECK(walked.has_value());
  return bits;
}

}  // namespace

TEST_CASE("Runs cover exactly the set bits, over word boundaries too") {
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
    std::uint64_t end = 0;
    const std::vector<bool> bits = bits_of_runs(bitmap);
    bool equal = true;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const bool set = (bitmap[i / 64] >> i % 64 & 1) != 0;
      if (set) end = i + 1;
      equal &= bits[i] == set;
    }
    CHECK(equal);
    CHECK(multifd::end_of_dirty(bitmap) == end);
  }
}

TEST_CASE("An error of the body ends the walk and is what the walk returns") {
  const std::uint64_t bitmap[] = {0b1011, 1};
  int calls = 0;
  const auto walked = multifd::for_each_dirty_run(bitmap, [&](std::uint64_t, std::uint64_t) -> multifd::Result<void> {
    if (++calls == 2) return multifd::fail(multifd::Errc::cancelled, multifd::Stage::produce);
    return {};
  });
  REQUIRE(!walked.has_value());
  CHECK(walked.error().code == multifd::Errc::cancelled);
  CHECK(calls == 2);
}
