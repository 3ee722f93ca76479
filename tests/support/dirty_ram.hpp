// SPDX-License-Identifier: MIT
//
// Guest memory for tests of dirty sources: a map of two blocks with sizes at which errors show, and a guest that is a
// function of the test.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/testing/contract_report.hpp"
#include "support/memory.hpp"

namespace test {

/// By default 304 and 80 pages of 4 KiB: no multiple of 64 in pages of 4 KiB, a whole number of pages of 64 KiB.
struct DirtyRam {
  explicit DirtyRam(std::size_t page_bytes = 4096, std::size_t pages = 304) : map(page_bytes) {
    for (const auto& [name, count] : {std::pair{"pc.ram", pages}, std::pair{"vga.vram", std::size_t{80}}}) {
      memory.emplace_back(count * 4096);
      REQUIRE(map.add(name, memory.back().bytes()).has_value());
    }
  }
  DirtyRam(const DirtyRam&) = delete;  // the map is of this memory
  DirtyRam& operator=(const DirtyRam&) = delete;

  std::uint64_t* word(multifd::BlockId block, std::uint64_t offset) const {
    return reinterpret_cast<std::uint64_t*>(memory[index(block)].data() + offset);
  }
  /// As a thread of this process writes.
  void store(multifd::BlockId block, std::uint64_t offset, std::uint64_t value) const {
    std::atomic_ref(*word(block, offset)).store(value, std::memory_order_relaxed);
  }

  std::vector<Block> memory;
  multifd::RamMap map;
};

inline void check(const multifd::ContractReport& report) { CHECK_MESSAGE(report.ok(), report.text()); }

/// An empty bitmap of a block.
inline std::vector<std::uint64_t> bitmap_of(const multifd::RamMap& map, multifd::BlockId block) {
  return std::vector<std::uint64_t>(multifd::bitmap_words(map.pages(block)));
}

/// The numbers of the pages whose bit is set.
inline std::vector<std::uint64_t> pages_of(const std::vector<std::uint64_t>& bitmap) {
  std::vector<std::uint64_t> pages;
  for (std::uint64_t page = 0; page < bitmap.size() * 64; ++page)
    if ((bitmap[page / 64] >> page % 64 & 1) != 0) pages.push_back(page);
  return pages;
}

/// What a fetch reports.
template <class Source>
std::vector<std::uint64_t> fetched(Source& source, const multifd::RamMap& map, multifd::BlockId block) {
  auto bitmap = bitmap_of(map, block);
  const auto done = source.fetch(block, bitmap);
  CHECK_MESSAGE(done.has_value(), text(done));
  return pages_of(bitmap);
}

}  // namespace test
