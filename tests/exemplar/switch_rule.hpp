// SPDX-License-Identifier: MIT
//
// The exemplar of a SwitchRule: stops the guest as soon as a round has not been shorter than the one before it.
#pragma once

#include <cstdint>

#include "multifd/migrate/switch_rule.hpp"

namespace exemplar {

/// The smallest rule that always ends.
class WhenItStalls {
 public:
  static constexpr std::string_view name = "when it stalls";

  multifd::migrate::Verdict at_round_end(const multifd::migrate::RoundEnd& end) noexcept {
    using namespace multifd::migrate;
    const double downtime = seconds(end.downtime.total());
    if (end.dirty_pages == 0 || end.dirty_pages >= before_)
      return {Action::switch_now, Reason::local_minimum, downtime};
    before_ = end.dirty_pages;
    return {Action::go_on, Reason::improving, downtime};
  }

 private:
  std::uint64_t before_ = UINT64_MAX;
};
static_assert(multifd::migrate::check_switch_rule<WhenItStalls>());

}  // namespace exemplar
