// SPDX-License-Identifier: MIT
//
// Where a sender's pages lie. A policy, because the question arises for every page.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include "multifd/memory/page_batch.hpp"
#include "multifd/memory/ram_block.hpp"

namespace multifd {

template <class S>
concept HasGuestPages = requires { typename std::bool_constant<S::guest>; };

template <class S>
concept HasCopies = requires { typename std::bool_constant<S::copies>; };

template <class S>
concept HasPage = requires(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t page_bytes) {
  { S::page(block, batch, i, page_bytes) } noexcept -> std::same_as<std::byte*>;
};

/// Says where the bytes of a queued page are.
///
/// Semantics:
///   `guest`: whether the bytes can be in the map's memory: queue_page(), queue_range() and queue_dirty() queue pages.
///     Without it a block may have no memory, and `block.host` is empty then.
///   `copies`: whether they can come in the batch's buffer, which queue_copies() swaps in; `batch.copied` then.
///   `page(block, batch, i, page_bytes)` returns the address of the page_bytes bytes of the page that batch.offsets()[i]
///     names, where i is less than the number of pages that are not known to be zero. Offsets before number i may have been
///     rearranged by then. Each call stands for itself, in any order. The bytes stay there until
///     the batch is given back; the guest may change them. Nobody writes through the address.
/// Errors: none. All offsets have been checked when the page was queued.
/// Threads: called at once on every channel's thread, with batches of their own.
/// Cost: called for each page, so: no lock, no allocation, no look at the bytes.
/// Models: FromGuest, FromCopies, FromEither. Exemplar: tests/exemplar/page_source.hpp.
///   Contract: multifd/testing/page_source_contract.hpp.
template <class S>
concept PageSource = HasGuestPages<S> && HasCopies<S> && HasPage<S>;

/// Fails to compile with a message that says which member to write.
template <class S>
consteval bool check_page_source() {
  static_assert(HasGuestPages<S>, "PageSource: needs  static constexpr bool guest");
  static_assert(HasCopies<S>, "PageSource: needs  static constexpr bool copies");
  static_assert(HasPage<S>,
                "PageSource: needs  static std::byte* page(const RamBlock&, const PageBatch&, std::size_t i, "
                "std::size_t page_bytes) noexcept");
  return PageSource<S>;
}

/// Pages lie in the map's memory, to which the guest may be writing.
struct FromGuest {
  static constexpr bool guest = true;
  static constexpr bool copies = false;
  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i, std::size_t) noexcept {
    return block.host.data() + batch.offsets()[i];
  }
};

/// Pages lie in buffers that come with them: for a relay, whose blocks need no memory.
struct FromCopies {
  static constexpr bool guest = false;
  static constexpr bool copies = true;
  static std::byte* page(const RamBlock&, const PageBatch& batch, std::size_t i, std::size_t page_bytes) noexcept {
    return batch.copies.data() + i * page_bytes;
  }
};

/// Each batch is one or the other: for a source that sends most pages from the guest's memory, and some as copies. Cost: a
/// buffer per batch, which takes no memory before it is used.
struct FromEither {
  static constexpr bool guest = true;
  static constexpr bool copies = true;
  static std::byte* page(const RamBlock& block, const PageBatch& batch, std::size_t i,
                         std::size_t page_bytes) noexcept {
    return batch.copied ? FromCopies::page(block, batch, i, page_bytes) : FromGuest::page(block, batch, i, page_bytes);
  }
};

}  // namespace multifd
