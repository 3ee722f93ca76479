// SPDX-License-Identifier: MIT
//
// The exemplar of a PageSource: guest memory that is slow at the first touch, as memory behind CXL is.
#pragma once

#include <cstddef>

#include "multifd/ends/page_source.hpp"

namespace exemplar {

/// As FromGuest, and asks the CPU for the next page while this one is looked at.
struct FromSlowMemory {
  static constexpr bool guest = true;
  static constexpr bool copies = false;

  static std::byte* page(const multifd::RamBlock& block, const multifd::PageBatch& batch, std::size_t i,
                         std::size_t) noexcept {
    const auto offsets = batch.offsets();
    // Offsets behind number i are still as they were queued; what is asked for in vain does no harm.
    if (i + 1 < offsets.size()) __builtin_prefetch(block.host.data() + offsets[i + 1]);
    return block.host.data() + offsets[i];
  }
};
static_assert(multifd::check_page_source<FromSlowMemory>());

}  // namespace exemplar
