// SPDX-License-Identifier: MIT
//
// A dirty bitmap as KVM_GET_DIRTY_LOG fills it: bit i % 64 of word i / 64 stands for page i.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace multifd {

/// Words of a dirty bitmap of `pages` pages.
constexpr std::size_t bitmap_words(std::uint64_t pages) noexcept { return (pages + 63) / 64; }

/// Pages whose bit is set.
inline std::uint64_t count_dirty(std::span<const std::uint64_t> bitmap) noexcept {
  std::uint64_t sum = 0;
  for (const std::uint64_t word : bitmap) sum += static_cast<unsigned>(std::popcount(word));
  return sum;
}

/// Whether a page's bit is set. A bitmap that is too short has none for it.
inline bool has_page(std::span<const std::uint64_t> bitmap, std::uint64_t page) noexcept {
  return page / 64 < bitmap.size() && (bitmap[page / 64] >> page % 64 & 1) != 0;
}

/// One past the highest page whose bit is set; 0 when none is.
inline std::uint64_t end_of_dirty(std::span<const std::uint64_t> bitmap) noexcept {
  for (std::size_t w = bitmap.size(); w-- > 0;)
    if (bitmap[w] != 0) return w * 64 + 64 - static_cast<unsigned>(std::countl_zero(bitmap[w]));
  return 0;
}

/// The offsets of the pages that a word's set bits stand for, in order; bit 0 is the page at `first`.
///
/// Returns: a span of `offsets`.
/// Cost: one mispredicted branch per word, where the loop over its set bits ends. A search for runs of pages would cost
///   one at the end of each run, because these ends cannot be predicted.
inline std::span<std::uint64_t> dirty_offsets(std::uint64_t word, std::uint64_t first, std::size_t page_bytes,
                                              std::array<std::uint64_t, 64>& offsets) noexcept {
  if (word == ~std::uint64_t{0}) {
    for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = first + i * page_bytes;
    return offsets;
  }
  std::size_t count = 0;
  for (; word != 0; word &= word - 1)
    offsets[count++] = first + static_cast<unsigned>(std::countr_zero(word)) * page_bytes;
  return std::span(offsets).first(count);
}

}  // namespace multifd
