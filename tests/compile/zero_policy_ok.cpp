// SPDX-License-Identifier: MIT
#include "multifd/zero/policy.hpp"

struct Ballooned {
  static constexpr std::string_view name = "ballooned";
  static constexpr multifd::ZeroStage stage = multifd::ZeroStage::channel;
  bool is_zero(multifd::PageRef) const noexcept { return true; }
};
static_assert(multifd::check_zero_page_policy<Ballooned>());
