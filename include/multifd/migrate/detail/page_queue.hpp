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
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/rearm_chunks.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/zero/untouched_pages.hpp"

namespace multifd::migrate::detail {

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

/// A bit for each page that was never touched, at this moment. Where /proc is missing, as in a jail, no page is known to be.
[[nodiscard]] inline DirtyBitmaps untouched_in(const RamMap& ram) {
  DirtyBitmaps pages(ram);
  const auto untouched = UntouchedPages::snapshot(ram);
  for (std::uint32_t b = 0; untouched && b < pages.blocks(); ++b) untouched->take_all(BlockId{b}, pages[BlockId{b}]);
  return pages;
}

/// Adds what a guest says of its zero pages, if it has the member. Errors: its own.
template <class G>
[[nodiscard]] Result<void> add_known_zeros(G& guest, DirtyBitmaps& zeros) {
  if constexpr (HasKnownZeros<G>) {
    for (std::uint32_t b = 0; b < zeros.blocks(); ++b) {
      MULTIFD_TRY(guest.known_zeros(BlockId{b}, zeros[BlockId{b}]));
    }
  }
  return {};
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
