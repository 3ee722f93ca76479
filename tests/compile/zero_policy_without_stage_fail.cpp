// expect: ZeroPagePolicy: needs  static constexpr ZeroStage stage
// SPDX-License-Identifier: MIT
#include "multifd/zero/policy.hpp"

struct Ballooned {
  static constexpr std::string_view name = "ballooned";
  bool is_zero(multifd::PageRef) const noexcept { return true; }
};
static_assert(multifd::check_zero_page_policy<Ballooned>());
