// SPDX-License-Identifier: MIT
// WITHOUT_NAME: ZeroPagePolicy: needs  static constexpr std::string_view name
// WITHOUT_STAGE: ZeroPagePolicy: needs  static constexpr ZeroStage stage
// WITHOUT_IS_ZERO: ZeroPagePolicy: needs  bool is_zero(PageRef) const noexcept
// WITH_MUTABLE_IS_ZERO: ZeroPagePolicy: needs  bool is_zero(PageRef) const noexcept
#include "multifd/zero/policy.hpp"

struct Ballooned {
#ifndef WITHOUT_NAME
  static constexpr std::string_view name = "ballooned";
#endif
#ifndef WITHOUT_STAGE
  static constexpr multifd::ZeroStage stage = multifd::ZeroStage::channel;
#endif
#if defined(WITH_MUTABLE_IS_ZERO)
  bool is_zero(multifd::PageRef) noexcept { return true; }  // channels share one policy
#elif !defined(WITHOUT_IS_ZERO)
  bool is_zero(multifd::PageRef) const noexcept { return true; }
#endif
};
static_assert(multifd::check_zero_page_policy<Ballooned>());
