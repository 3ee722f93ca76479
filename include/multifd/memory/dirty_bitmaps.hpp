// SPDX-License-Identifier: MIT
//
// A bit for each page of a whole map: what is dirty, was sent, is lost.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd {

/// A dirty bitmap for each block of a map. Threads: one at a time.
class DirtyBitmaps {
 public:
  explicit DirtyBitmaps(const RamMap& ram) {
    for (const RamBlock& block : ram.blocks()) words_.emplace_back(bitmap_words(block.bytes / ram.page_bytes()));
  }
  std::span<std::uint64_t> operator[](BlockId block) noexcept { return words_[index(block)]; }
  std::span<const std::uint64_t> operator[](BlockId block) const noexcept { return words_[index(block)]; }
  std::uint32_t blocks() const noexcept { return static_cast<std::uint32_t>(words_.size()); }

  std::uint64_t count() const noexcept {
    std::uint64_t sum = 0;
    for (const auto& words : words_) sum += count_dirty(words);
    return sum;
  }
  void clear() noexcept {
    for (auto& words : words_) std::ranges::fill(words, 0);
  }
  /// Sets the bit of every page.
  void fill(const RamMap& ram) noexcept {
    for (std::uint32_t b = 0; b < blocks(); ++b) {
      const std::uint64_t pages = ram.pages(BlockId{b});
      std::ranges::fill(words_[b], ~std::uint64_t{0});
      if (pages % 64 != 0) words_[b].back() = (std::uint64_t{1} << pages % 64) - 1;
    }
  }
  /// How many pages are in both.
  std::uint64_t in_both(const DirtyBitmaps& other) const noexcept {
    std::uint64_t sum = 0;
    for (std::uint32_t b = 0; b < blocks(); ++b)
      for (std::size_t w = 0; w < words_[b].size(); ++w)
        sum += static_cast<unsigned>(std::popcount(words_[b][w] & other.words_[b][w]));
    return sum;
  }
  void add(const DirtyBitmaps& other) noexcept {
    for (std::uint32_t b = 0; b < blocks(); ++b)
      for (std::size_t w = 0; w < words_[b].size(); ++w) words_[b][w] |= other.words_[b][w];
  }
  /// Keeps what is in both.
  void keep(const DirtyBitmaps& other) noexcept {
    for (std::uint32_t b = 0; b < blocks(); ++b)
      for (std::size_t w = 0; w < words_[b].size(); ++w) words_[b][w] &= other.words_[b][w];
  }
  void remove(const DirtyBitmaps& other) noexcept {
    for (std::uint32_t b = 0; b < blocks(); ++b)
      for (std::size_t w = 0; w < words_[b].size(); ++w) words_[b][w] &= ~other.words_[b][w];
  }

 private:
  std::vector<std::vector<std::uint64_t>> words_;
};

}  // namespace multifd
