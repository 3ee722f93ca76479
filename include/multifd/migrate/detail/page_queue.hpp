// SPDX-License-Identifier: MIT
//
// What a round has to send, and the way from there to the channels: each chunk of a dirty bitmap is re-armed, then queued.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/rearm_chunks.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/zero/untouched_pages.hpp"

namespace multifd::migrate::detail {

/// A dirty bitmap for each block of a map.
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
  void clear(BlockId block, std::uint64_t first_page, std::uint64_t pages) noexcept {
    auto& words = words_[index(block)];
    for (std::uint64_t page = first_page; page < first_page + pages;) {
      if (page % 64 == 0 && first_page + pages - page >= 64) {
        words[page / 64] = 0;
        page += 64;
      } else {
        words[page / 64] &= ~(std::uint64_t{1} << page % 64);
        ++page;
      }
    }
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
  void remove(const DirtyBitmaps& other) noexcept {
    for (std::uint32_t b = 0; b < blocks(); ++b)
      for (std::size_t w = 0; w < words_[b].size(); ++w) words_[b][w] &= ~other.words_[b][w];
  }

 private:
  std::vector<std::vector<std::uint64_t>> words_;
};

/// Calls `on_run(first_page, pages)` for each run of pages whose bit is set in both bitmaps, up to the first error.
template <class OnRun>
[[nodiscard]] Result<void> for_each_run_in_both(std::span<const std::uint64_t> one,
                                                std::span<const std::uint64_t> other, OnRun&& on_run) {
  std::uint64_t begin = 0;
  std::uint64_t pages = 0;  // of the run that ends where the next bit is looked at
  const auto end_run = [&](std::uint64_t at) -> Result<void> {
    if (pages > 0) {
      MULTIFD_TRY(on_run(begin, pages));
    }
    pages = 0;
    begin = at;
    return {};
  };
  for (std::uint64_t w = 0; w < one.size(); ++w) {
    const std::uint64_t word = one[w] & other[w];
    for (unsigned bit = 0; bit < 64;) {
      const auto unset = static_cast<unsigned>(std::countr_zero(word >> bit));
      if (unset > 0) {
        MULTIFD_TRY(end_run(w * 64 + std::min(bit + unset, 64u)));
        bit += unset;
        continue;
      }
      const auto set = static_cast<unsigned>(std::countr_one(word >> bit));
      pages += set;
      bit += set;
    }
  }
  return end_run(one.size() * 64);
}

/// Fetches the marks of all blocks. Errors: the source's.
template <DirtySource S>
[[nodiscard]] Result<void> fetch_all(S& source, DirtyBitmaps& into) noexcept {
  for (std::uint32_t b = 0; b < into.blocks(); ++b) {
    MULTIFD_TRY(source.fetch(BlockId{b}, into[BlockId{b}]));
  }
  return {};
}

/// Re-arms the pages of all blocks whose bit is set, which are not read now. Errors: the source's.
template <DirtySource S>
[[nodiscard]] Result<void> rearm_all(S& source, const DirtyBitmaps& pages, std::uint64_t chunk_pages) {
  if (!source.needs_rearm()) return {};
  for (std::uint32_t b = 0; b < pages.blocks(); ++b) {
    MULTIFD_TRY(rearm_chunks(source, BlockId{b}, pages[BlockId{b}], chunk_pages,
                             [](std::uint64_t, auto) -> Result<void> { return {}; }));
  }
  return {};
}

}  // namespace multifd::migrate::detail
