// SPDX-License-Identifier: MIT
//
// Where a sender's pages lie. A policy, because everything that asks is on the way of each page.
#pragma once

#include <concepts>
#include <cstddef>

#include "multifd/memory/page_batch.hpp"
#include "multifd/memory/ram_block.hpp"

namespace multifd {

/// Says where the bytes of a queued page are. `copies`: in a buffer of the batch, which queue_copies() swaps in; else in
/// the map's memory.
///
/// Threads: called at once on every channel's thread.
/// Models: FromGuest, FromCopies.
template <class S>
concept PageSource = requires(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t page_bytes) {
  { S::copies } -> std::convertible_to<bool>;
  { S::page(block, batch, i, page_bytes) } noexcept -> std::same_as<std::byte*>;
};

/// In the map's memory, which the guest may be writing.
struct FromGuest {
  static constexpr bool copies = false;
  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t) noexcept {
    return block.host.data() + batch.offsets()[i];
  }
};

/// In buffers that come with the pages: for a relay, whose blocks need no memory.
struct FromCopies {
  static constexpr bool copies = true;
  static std::byte* page(const RamBlock&, const PageBatch& batch, std::size_t i, std::size_t page_bytes) noexcept {
    return batch.copies.data() + i * page_bytes;
  }
};

}  // namespace multifd
