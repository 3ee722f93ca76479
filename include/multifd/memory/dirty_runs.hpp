// SPDX-License-Identifier: MIT
//
// A dirty bitmap as runs of pages: bit i % 64 of word i / 64 stands for page i, as KVM_GET_DIRTY_LOG fills it. The
// cost is per run and per word, not per page.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "multifd/result.hpp"

namespace multifd {

/// One past the highest page whose bit is set; 0 when none is.
inline std::uint64_t end_of_dirty(std::span<const std::uint64_t> bitmap) noexcept {
  for (std::size_t w = bitmap.size(); w-- > 0;)
    if (bitmap[w] != 0) return w * 64 + 64 - static_cast<unsigned>(std::countl_zero(bitmap[w]));
  return 0;
}

/// Calls `body(first, pages)` for each run of set bits, in order; runs go on over word boundaries.
///
/// Errors: the first that `body` returns, which ends the walk.
template <class Body>
Result<void> for_each_dirty_run(std::span<const std::uint64_t> bitmap, Body&& body) {
  std::uint64_t start = 0;
  std::uint64_t length = 0;  // of the run that is not reported yet
  for (std::size_t w = 0; w < bitmap.size(); ++w) {
    std::uint64_t word = bitmap[w];
    while (word != 0) {
      const auto skip = static_cast<unsigned>(std::countr_zero(word));
      const auto ones = static_cast<unsigned>(std::countr_one(word >> skip));
      const std::uint64_t at = w * 64 + skip;
      if (length == 0 || start + length != at) {
        if (length > 0) {
          if (Result<void> done = body(start, std::exchange(length, 0)); !done) return done;
        }
        start = at;
      }
      length += ones;
      if (skip + ones == 64) break;
      word &= ~std::uint64_t{0} << (skip + ones);
    }
  }
  if (length > 0) return body(start, length);
  return {};
}

}  // namespace multifd
