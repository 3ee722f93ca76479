// SPDX-License-Identifier: MIT
#include "multifd/packets/distinct_pages.hpp"

#include <doctest/doctest.h>

#include <ostream>  // lets doctest print a std::error_code
#include <random>
#include <set>
#include <vector>

using multifd::Errc;
using multifd::Result;
using multifd::packets::DistinctPages;

namespace {

Result<void> check_all(DistinctPages& pages, const std::vector<std::uint64_t>& offsets) {
  pages.clear();
  for (const std::uint64_t offset : offsets) pages.add(offset);
  return pages.check();
}

void check_refused(const Result<void>& result, std::uint64_t offset) {
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == Errc::duplicate_page);
  CHECK(result.error().detail == offset);
  CHECK(result.error().stage == multifd::Stage::parse);
}

}  // namespace

TEST_CASE("Distinct offsets pass in any order") {
  auto pages = DistinctPages::create(8);
  REQUIRE(pages);
  CHECK(check_all(*pages, {}));
  CHECK(check_all(*pages, {0}));
  CHECK(check_all(*pages, {0, 4096, 8192}));
  CHECK(check_all(*pages, {8192, 4096, 0}));
  CHECK(check_all(*pages, {4096, 0, 12288, 8192}));
}

TEST_CASE("An offset that comes twice is refused and named, next to each other or not") {
  auto pages = DistinctPages::create(8);
  REQUIRE(pages);
  check_refused(check_all(*pages, {0, 0}), 0);
  check_refused(check_all(*pages, {4096, 8192, 8192, 12288}), 8192);
  check_refused(check_all(*pages, {4096, 8192, 12288, 4096}), 4096);
  check_refused(check_all(*pages, {12288, 8192, 4096, 8192}), 8192);
}

TEST_CASE("clear() forgets the packet before") {
  auto pages = DistinctPages::create(8);
  REQUIRE(pages);
  check_refused(check_all(*pages, {8192, 8192}), 8192);
  CHECK(check_all(*pages, {8192, 12288}));
  CHECK(check_all(*pages, {4096, 8192}));
}

TEST_CASE("It agrees with std::set on random packets") {
  constexpr std::size_t most = 128;
  auto pages = DistinctPages::create(most);
  REQUIRE(pages);
  std::mt19937_64 random(12);
  unsigned refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::vector<std::uint64_t> offsets(random() % (most + 1));
    for (std::uint64_t& offset : offsets) offset = 4096 * (random() % 4000);
    if (round % 3 == 0) std::ranges::sort(offsets);
    const std::set<std::uint64_t> distinct(offsets.begin(), offsets.end());
    const Result<void> result = check_all(*pages, offsets);
    REQUIRE(result.has_value() == (distinct.size() == offsets.size()));
    if (!result) {
      ++refused;
      REQUIRE(std::ranges::count(offsets, result.error().detail) > 1);
    }
  }
  CHECK(refused > 100);
  CHECK(refused < 4900);
}
