// SPDX-License-Identifier: MIT
//
// Which pages have arrived: one bit per page, set by all channels concurrently. A receiver keeps one for all pages and
// one for pages whose bytes have begun to come, which decides whether a listed zero page is written (format/packets.md section
// 5.2).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "multifd/memory/ram_map.hpp"

namespace multifd {

/// Received-page bitmaps for all blocks of a map. One bit per page: 32 KiB for a GiB of 4 KiB pages.
///
/// Threads: any number. Wait-free. A thread that finds a page marked also finds in memory what was written there before
///   the page was marked.
class ReceivedPages {
 public:
  /// Errors: ENOMEM. Cost: one bit per page of all blocks, zeroed.
  [[nodiscard]] static Result<ReceivedPages> create(const RamMap& map) {
    return catch_bad_alloc(Stage::setup, "allocate received-page bitmap", [&]() -> Result<ReceivedPages> {
      ReceivedPages pages;
      pages.page_bytes_ = map.page_bytes();
      for (const RamBlock& block : map.blocks()) {
        const std::uint64_t count = block.bytes / map.page_bytes();
        pages.blocks_.push_back({std::make_unique<Word[]>((count + 63) / 64), count});
      }
      return pages;
    });
  }

  /// Marks a page. Returns whether it had been marked before.
  ///
  /// Params: `block`, `offset`: a page of the map, here and in set() (contract).
  bool test_and_set(BlockId block, std::uint64_t offset) noexcept {
    const std::uint64_t page = offset / page_bytes_;
    const std::uint64_t bit = std::uint64_t{1} << (page % 64);
    // Acquire: meets set(), as test() does; release: meets test().
    return (blocks_[index(block)].words[page / 64].fetch_or(bit, std::memory_order_acq_rel) & bit) != 0;
  }

  /// Marks `pages` adjacent pages.
  void set(BlockId block, std::uint64_t offset, std::size_t pages) noexcept {
    each_word(block, offset, pages, [](Word& word, std::uint64_t bits) {
      // The pages' content comes before their marks: meets test().
      word.fetch_or(bits, std::memory_order_release);
      return false;
    });
  }

  /// Whether any of `pages` adjacent pages has been marked.
  bool any(BlockId block, std::uint64_t offset, std::size_t pages) const noexcept {
    return each_word(block, offset, pages, [](const Word& word, std::uint64_t bits) {
      return (word.load(std::memory_order_acquire) & bits) != 0;  // meets set()
    });
  }

  /// Whether a page has been marked. What is no page of the map has not.
  bool test(BlockId block, std::uint64_t offset) const noexcept {
    const std::uint64_t page = offset / page_bytes_;
    if (index(block) >= blocks_.size() || page >= blocks_[index(block)].pages) return false;
    // Meets set().
    return (blocks_[index(block)].words[page / 64].load(std::memory_order_acquire) >> (page % 64) & 1) != 0;
  }

 private:
  using Word = std::atomic<std::uint64_t>;

  /// Calls `visit(word, bits)` for the words of adjacent pages, until it returns true. Returns whether it did.
  template <class Visit>
  bool each_word(BlockId block, std::uint64_t offset, std::size_t pages, Visit&& visit) const noexcept {
    Word* const words = blocks_[index(block)].words.get();
    std::uint64_t page = offset / page_bytes_;
    for (const std::uint64_t end = page + pages; page < end;) {
      const std::uint64_t shift = page % 64;
      const std::uint64_t count = std::min(64 - shift, end - page);
      if (visit(words[page / 64], ~std::uint64_t{0} >> (64 - count) << shift)) return true;
      page += count;
    }
    return false;
  }

  struct OfBlock {
    std::unique_ptr<Word[]> words;
    std::uint64_t pages;
  };
  std::size_t page_bytes_ = 4096;
  std::vector<OfBlock> blocks_;
};

}  // namespace multifd
