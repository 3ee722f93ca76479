// SPDX-License-Identifier: MIT
#include "multifd/memory/page_runs.hpp"

#include <doctest/doctest.h>

#include <random>
#include <vector>

using multifd::PageRuns;

namespace {

constexpr std::size_t page_bytes = 4096;

}  // namespace

TEST_CASE("Neighbouring pages become one run, others do not") {
  std::vector<std::byte> ram(8 * page_bytes);
  auto runs = PageRuns::create(8);
  REQUIRE(runs);
  CHECK(runs->view().empty());
  for (const std::size_t page : {1u, 2u, 3u, 5u, 7u, 6u}) runs->add(ram.data() + page * page_bytes, page_bytes);
  const std::span<const iovec> view = runs->view();
  REQUIRE(view.size() == 4);
  CHECK(view[0].iov_base == ram.data() + page_bytes);
  CHECK(view[0].iov_len == 3 * page_bytes);
  CHECK(view[1].iov_base == ram.data() + 5 * page_bytes);
  CHECK(view[1].iov_len == page_bytes);
  CHECK(view[2].iov_base == ram.data() + 7 * page_bytes);
  CHECK(view[3].iov_base == ram.data() + 6 * page_bytes);  // a page before the last one is no continuation
}

TEST_CASE("The same page twice is two runs: every page that was added is sent") {
  std::vector<std::byte> ram(page_bytes);
  auto runs = PageRuns::create(2);
  REQUIRE(runs);
  runs->add(ram.data(), page_bytes);
  runs->add(ram.data(), page_bytes);
  CHECK(runs->view().size() == 2);
}

TEST_CASE("clear() starts anew, also at the page that would have continued the last run") {
  std::vector<std::byte> ram(2 * page_bytes);
  auto runs = PageRuns::create(2);
  REQUIRE(runs);
  runs->add(ram.data(), page_bytes);
  runs->clear();
  CHECK(runs->view().empty());
  runs->add(ram.data() + page_bytes, page_bytes);
  REQUIRE(runs->view().size() == 1);
  CHECK(runs->view()[0].iov_base == ram.data() + page_bytes);
  CHECK(runs->view()[0].iov_len == page_bytes);
}

TEST_CASE("Runs read as exactly the pages that were added, in their order, with no two runs that could be one") {
  constexpr std::size_t page_count = 64;
  std::vector<std::byte> ram(page_count * page_bytes);
  auto runs = PageRuns::create(page_count);
  REQUIRE(runs);
  std::mt19937 random(8);
  for (int round = 0; round < 200; ++round) {
    runs->clear();
    std::vector<std::byte*> pages;
    std::size_t page = random() % page_count;
    for (std::size_t i = 0; i < page_count; ++i) {
      page = random() % 3 == 0 ? random() % page_count : (page + 1) % page_count;
      pages.push_back(ram.data() + page * page_bytes);
      runs->add(pages.back(), page_bytes);
    }
    std::vector<std::byte*> read;
    const std::byte* end = nullptr;
    for (const iovec& run : runs->view()) {
      REQUIRE(run.iov_base != end);
      for (std::size_t at = 0; at < run.iov_len; at += page_bytes)
        read.push_back(static_cast<std::byte*>(run.iov_base) + at);
      end = static_cast<std::byte*>(run.iov_base) + run.iov_len;
    }
    REQUIRE(read == pages);
  }
}
