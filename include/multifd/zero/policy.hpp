// SPDX-License-Identifier: MIT
//
// The ZeroPagePolicy: which guest pages travel as an offset instead of as bytes, and which thread finds them.
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

/// Which thread checks for zero pages.
enum class ZeroStage : std::uint8_t {
  none,      ///< No thread: zero pages are sent as normal pages.
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

/// Pages of one block that are checked in one call: at most zero_mask_pages of them, in any order. All of them are in
/// the block's memory, or all of them are copies.
struct PageGroup {
  BlockId block{};
  std::size_t page_bytes = 4096;
  std::span<const std::uint64_t> offsets;   ///< in the block
  const std::byte* const* pages = nullptr;  ///< the address of each page's bytes

  PageRef page(std::size_t i) const noexcept { return {block, offsets[i], {pages[i], page_bytes}}; }
};

/// The most pages of a PageGroup: one bit of a mask each.
inline constexpr std::size_t zero_mask_pages = 64;

/// Optional: a policy that checks many pages in one call, which is faster. Bit i of the result stands for page i of the
/// group. The rules for is_zero() hold for each of the pages.
template <class Z>
concept HasZeroMask = requires(const Z& policy, const PageGroup& group) {
  { policy.zero_mask(group) } noexcept -> std::same_as<std::uint64_t>;
};

/// Decides which guest pages travel as an offset instead of as bytes.
///
/// Semantics: `is_zero` may return false for a zero page (costs bandwidth), never true for a page that holds a
///   non-zero byte (corrupts the guest). The page may change while it is read: a page that becomes non-zero later is
///   dirty again and will be queued again.
/// Errors: none. What a policy cannot find out about a page is no error: the page is not zero then.
/// Threads: `is_zero` runs on the producer's thread when stage == producer, at once on every channel's thread, on one
///   shared object, when stage == channel.
/// Cost: called for every page, or once for up to zero_mask_pages of them (HasZeroMask), so: no lock, no allocation, no
///   system call. Not called when stage == none.
/// Models: ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd; ResidencyAware around one of the last two (residency.hpp).
///   Exemplar: examples/custom_policy.cpp (BalloonAware). Contract: multifd/testing/zero_policy_contract.hpp.
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

/// Checks a group of pages with a policy, in one call where the policy has zero_mask().
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

/// The check that both reading policies share.
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

/// Checks on the producer's thread and reports each zero page to the caller, which writes it to the main stream.
/// The only mode that QEMU up to 8.2 understands.
struct ZeroPagesLegacy final : detail::ReadingCheck {
  static constexpr std::string_view name = "legacy";
  static constexpr ZeroStage stage = ZeroStage::producer;
};

/// Checks on the channels' threads and lists zero pages in the packet. QEMU 9.0 and later; an older peer drops the
/// list silently and its guest keeps stale pages (format/packets.md section 5.3), so the Sender refuses a PeerProfile
/// without zero_lists.
///
/// The first time that a page is listed, a QEMU does not write it, because it assumes that its memory is zero there
/// (section 5.2; from 10.1 on it writes the page if postcopy-ram is on). Towards a QEMU this mode is therefore for
/// memory that is zero at the start. It is wrong for firmware, nvdimm, ivshmem or a file that was in use: there use
/// ZeroPagesLegacy or ZeroPagesNone, whose records and bytes a QEMU always writes. A page that the QEMU has received
/// before, in any form, is written when it is listed. Our own Receiver writes every listed page, except with
/// DestinationMemory::zeroed.
struct ZeroPagesMultifd final : detail::ReadingCheck {
  static constexpr std::string_view name = "multifd";
  static constexpr ZeroStage stage = ZeroStage::channel;
};

}  // namespace multifd
