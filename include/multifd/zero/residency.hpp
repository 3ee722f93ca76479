// SPDX-License-Identifier: MIT
//
// A ZeroPagePolicy that wraps another: a page that was never touched counts as zero without being read, and the inner
// policy decides about all others. untouched_pages.hpp says how such pages are found, and when that is valid.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "multifd/zero/policy.hpp"
#include "multifd/zero/untouched_pages.hpp"

namespace multifd {

/// Checks the snapshot first, then `Next`. Without a snapshot it behaves as `Next`.
///
///   using Zeros = ResidencyAware<ZeroPagesMultifd>;
///   // dirty tracking is on
///   auto untouched = UntouchedPages::snapshot(ram);
///   auto tx = Sender<T, C, Zeros>::open(ram, links, {.zero_pages = {.untouched = *untouched}});
///   // queue all memory, close_epoch()
///   untouched->forget();
///   // read the dirty log, queue the pages that it names, close_epoch(), ...
///
/// Threads: as the inner policy's.
template <ZeroPagePolicy Next>
struct ResidencyAware {
  static_assert(Next::stage != ZeroStage::none, "ResidencyAware: nobody asks a policy of ZeroStage::none");

 private:
  static constexpr std::string_view suffix = "+residency";
  static constexpr auto text = [] {
    constexpr std::string_view inner = Next::name;
    std::array<char, inner.size() + suffix.size()> joined{};
    std::ranges::copy(suffix, std::ranges::copy(inner, joined.begin()).out);
    return joined;
  }();

 public:
  static constexpr std::string_view name{text.data(), text.size()};
  static constexpr ZeroStage stage = Next::stage;

  UntouchedPages untouched{};
  [[no_unique_address]] Next next{};

  bool is_zero(PageRef page) const noexcept { return untouched.take(page) || next.is_zero(page); }

  std::uint64_t zero_mask(const PageGroup& group) const noexcept {
    std::uint64_t zero = untouched.take(group);
    if (zero == 0) return multifd::zero_mask(next, group);
    std::array<std::uint64_t, zero_mask_pages> offsets;
    std::array<const std::byte*, zero_mask_pages> pages;
    std::array<std::uint8_t, zero_mask_pages> bits;
    std::size_t left = 0;
    for (std::size_t i = 0; i < group.offsets.size(); ++i) {
      offsets[left] = group.offsets[i];
      pages[left] = group.pages[i];
      bits[left] = static_cast<std::uint8_t>(i);
      left += (zero >> i & 1) ^ 1;
    }
    if (left == 0) return zero;
    const std::uint64_t found = multifd::zero_mask(
        next, PageGroup{group.block, group.page_bytes, std::span(offsets).first(left), pages.data()});
    for (std::size_t i = 0; i < left; ++i) zero |= (found >> i & 1) << bits[i];
    return zero;
  }
};

}  // namespace multifd
