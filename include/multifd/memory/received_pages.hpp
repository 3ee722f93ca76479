// SPDX-License-Identifier: MIT
//
// Which pages have arrived: one bit per page, set by all channels concurrently. A receiver keeps one for all pages and
// one for pages that came as bytes, which decides whether a listed zero page is written (format/packets.md section
// 5.2).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "multifd/memory/ram_map.hpp"

namespace multifd {

/// Received-page bitmaps for all blocks of a map. One bit per page: 32 KiB for a GiB of 4 KiB pages.
///
/// Threads: any number. Wait-free.
class ReceivedPages {
 public:
  /// Errors: ENOMEM. Cost: one bit per page of all blocks, zeroed.
  [[nodiscard]] static Result<ReceivedPages> create(const RamMap& map) {
    ReceivedPages pages;
    pages.page_bytes_ = map.page_bytes();
    for (const RamBlock& block : map.blocks()) {
      const std::size_t words = (block.bytes / map.page_bytes() + 63) / 64;
      std::unique_ptr<Word[]> bits(new (std::nothrow) Word[words]{});
      if (!bits) return fail_errno(Stage::setup, "allocate received-page bitmap", ENOMEM);
      pages.blocks_.push_back(std::move(bits));
    }
    return pages;
  }

  /// Marks a page. Returns whether it had been marked before.
  bool test_and_set(BlockId block, std::uint64_t offset) noexcept {
    const std::uint64_t page = offset / page_bytes_;
    const std::uint64_t bit = std::uint64_t{1} << (page % 64);
    // Relaxed: the bit guards no other data; the order of two epochs comes from the barrier between them.
    return (blocks_[index(block)][page / 64].fetch_or(bit, std::memory_order_relaxed) & bit) != 0;
  }

  /// Marks `pages` adjacent pages.
  void set(BlockId block, std::uint64_t offset, std::size_t pages) noexcept {
    Word* const words = blocks_[index(block)].get();
    std::uint64_t page = offset / page_bytes_;
    for (const std::uint64_t end = page + pages; page < end;) {
      const std::uint64_t shift = page % 64;
      const std::uint64_t count = std::min(64 - shift, end - page);
      words[page / 64].fetch_or(~std::uint64_t{0} >> (64 - count) << shift, std::memory_order_relaxed);  // as above
      page += count;
    }
  }

  bool test(BlockId block, std::uint64_t offset) const noexcept {
    const std::uint64_t page = offset / page_bytes_;
    return (blocks_[index(block)][page / 64].load(std::memory_order_relaxed) >> (page % 64) & 1) != 0;
  }

 private:
  using Word = std::atomic<std::uint64_t>;
  std::size_t page_bytes_ = 4096;
  std::vector<std::unique_ptr<Word[]>> blocks_;
};

}  // namespace multifd
