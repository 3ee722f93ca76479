// SPDX-License-Identifier: MIT
//
// Where a sender's pages lie. A policy, because the question arises for every page.
#pragma once

#include <concepts>
#include <cstddef>

#include "multifd/memory/page_batch.hpp"
#include "multifd/memory/ram_block.hpp"

namespace multifd {

/// Says where the bytes of a queued page are. `S::copies`: they are in the batch's buffer, which queue_copies() swaps
/// in; otherwise they are in the map's memory.
///
/// Threads: called at once on every channel's thread.
/// Models: FromGuest, FromCopies.
template <class S>
concept PageSource = requires(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t page_bytes) {
  { S::copies } -> std::convertible_to<bool>;
  { S::page(block, batch, i, page_bytes) } noexcept -> std::same_as<std::byte*>;
};

/// Pages lie in the map's memory, to which the guest may be writing.
struct FromGuest {
  static constexpr bool copies = false;
  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t) noexcept {
    return block.host.data() + batch.offsets()[i];
  }
};

/// Pages lie in buffers that come with them: for a relay, whose blocks need no memory.
struct FromCopies {
  static constexpr bool copies = true;
  static std::byte* page(const RamBlock&, const PageBatch& batch, std::size_t i, std::size_t page_bytes) noexcept {
    return batch.copies.data() + i * page_bytes;
  }
};

}  // namespace multifd
