// SPDX-License-Identifier: MIT
//
// The exemplar of a ThrottleRule: the later, the more, as a fork of Cloud Hypervisor does it.
#pragma once

#include <algorithm>

#include "multifd/migrate/throttle.hpp"

namespace exemplar {

/// From the fourth round behind the bulk pass on, every second round a tenth more.
struct ByRounds {
  static constexpr std::string_view name = "by rounds";

  unsigned percent_at(const multifd::migrate::RoundEnd& end) noexcept {
    if (end.round < 4) return 0;
    return std::min(99u, 10 + 10 * static_cast<unsigned>(std::min<std::uint64_t>(end.round - 4, 100) / 2));
  }
};
static_assert(multifd::migrate::check_throttle_rule<ByRounds>());

}  // namespace exemplar
