// SPDX-License-Identifier: MIT
//
// The ZeroPagePolicy: which guest pages travel as an offset instead of as bytes, and who finds them.
// The three models are QEMU's `zero-page-detection` values (format/packets.md section 5.1).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "multifd/memory/ram_block.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd {

/// Who looks for zero pages.
enum class ZeroStage : std::uint8_t {
  none,      ///< Nobody: zero pages are sent as normal pages.
  producer,  ///< The producer, in queue_*(): the page is reported to the caller for its main stream, not queued.
  channel,   ///< The channel's worker: the page's offset goes into the packet's zero list.
};

template <class Z>
concept HasZeroPolicyName = requires {
  { Z::name } -> std::convertible_to<std::string_view>;
};

template <class Z>
concept HasZeroStage = requires {
  { Z::stage } -> std::convertible_to<ZeroStage>;
};

template <class Z>
concept HasIsZero = requires(const Z& policy, PageRef page) {
  { policy.is_zero(page) } noexcept -> std::same_as<bool>;
};

/// Pages of one block that are looked at in one call: at most zero_mask_pages of them, in any order. They lie all in the
/// block's memory, or all in copies.
struct PageGroup {
  BlockId block{};
  std::size_t page_bytes = 4096;
  std::span<const std::uint64_t> offsets;   ///< in the block
  const std::byte* const* pages = nullptr;  ///< where the bytes of each are

  PageRef page(std::size_t i) const noexcept { return {block, offsets[i], {pages[i], page_bytes}}; }
};

/// The most pages of a PageGroup: one bit of a mask each.
inline constexpr std::size_t zero_mask_pages = 64;

/// A policy that looks at many pages at once, which is faster: bit i of the result stands for page i of the group.
/// Optional; what is_zero() says of one page holds for each of them.
template <class Z>
concept HasZeroMask = requires(const Z& policy, const PageGroup& group) {
  { policy.zero_mask(group) } noexcept -> std::same_as<std::uint64_t>;
};

/// Decides which guest pages travel as an offset instead of as bytes.
///
/// Semantics: `is_zero` may return false for a zero page (costs bandwidth), never true for a page that holds a
///   non-zero byte (corrupts the guest). The page may change while it is looked at: a page that becomes non-zero
///   later is dirty again and comes again.
/// Threads: `is_zero` runs on the producer's thread when stage == producer, at once on every channel's thread, on one
///   shared object, when stage == channel.
/// Models: ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd; ResidencyAware around one of the last two (residency.hpp).
///   Contract: multifd/testing/zero_policy_contract.hpp.
template <class Z>
concept ZeroPagePolicy = std::copyable<Z> && HasZeroPolicyName<Z> && HasZeroStage<Z> && HasIsZero<Z>;

/// Fails to compile with a message that says which member to write.
template <class Z>
consteval bool check_zero_page_policy() {
  static_assert(std::copyable<Z>, "ZeroPagePolicy: needs to be copyable");
  static_assert(HasZeroPolicyName<Z>, "ZeroPagePolicy: needs  static constexpr std::string_view name");
  static_assert(HasZeroStage<Z>, "ZeroPagePolicy: needs  static constexpr ZeroStage stage");
  static_assert(HasIsZero<Z>, "ZeroPagePolicy: needs  bool is_zero(PageRef) const noexcept");
  return ZeroPagePolicy<Z>;
}

/// Asks a policy about a group of pages, at once where it can.
template <ZeroPagePolicy Z>
std::uint64_t zero_mask(const Z& policy, const PageGroup& group) noexcept {
  if constexpr (HasZeroMask<Z>) {
    return policy.zero_mask(group);
  } else {
    std::uint64_t mask = 0;
    for (std::size_t i = 0; i < group.offsets.size(); ++i) mask |= std::uint64_t{policy.is_zero(group.page(i))} << i;
    return mask;
  }
}

namespace detail {

/// Reads the pages of a group: what both reading policies do.
struct ReadingCheck {
  bool is_zero(PageRef page) const noexcept { return buffer_is_zero(page.bytes.data(), page.bytes.size()); }
  std::uint64_t zero_mask(const PageGroup& group) const noexcept {
    return zero_page_mask(group.pages, group.offsets.size(), group.page_bytes);
  }
};

}  // namespace detail

/// Sends every page as bytes. For guests that hold almost no zero pages.
struct ZeroPagesNone {
  static constexpr std::string_view name = "none";
  static constexpr ZeroStage stage = ZeroStage::none;
  bool is_zero(PageRef) const noexcept { return false; }
};

/// Checks on the producer's thread and reports each zero page to the caller, who writes it to the main stream.
/// The only mode that QEMU up to 8.2 understands.
struct ZeroPagesLegacy final : detail::ReadingCheck {
  static constexpr std::string_view name = "legacy";
  static constexpr ZeroStage stage = ZeroStage::producer;
};

/// Checks on the channels' threads and lists zero pages in the packet. QEMU 9.0 and later; an older peer drops the
/// list without a word and its guest keeps stale pages (format/packets.md section 5.3), so PeerProfile guards it.
///
/// A QEMU takes the first zero page that is listed at a place for what its memory holds already, and does not write it
/// (section 5.2; from 10.1 on it writes with the capability postcopy-ram). So towards a QEMU this is for memory that is
/// zero before: not for firmware, nvdimm, ivshmem or a file that was in use, where ZeroPagesLegacy's records and
/// ZeroPagesNone's bytes are written always. A page that it has had in any form before is written when it is listed. Our
/// own Receiver writes each, unless it is told DestinationMemory::zeroed.
struct ZeroPagesMultifd final : detail::ReadingCheck {
  static constexpr std::string_view name = "multifd";
  static constexpr ZeroStage stage = ZeroStage::channel;
};

}  // namespace multifd
