// SPDX-License-Identifier: MIT
// WITHOUT_NAME: ThrottleRule: needs  static constexpr std::string_view name
// WITHOUT_PERCENT_AT: ThrottleRule: needs  unsigned percent_at(const RoundEnd&) noexcept
// WITH_DOUBLE_PERCENT_AT: ThrottleRule: needs  unsigned percent_at(const RoundEnd&) noexcept
#include "multifd/migrate/throttle.hpp"

using multifd::migrate::RoundEnd;

struct Half {
#ifndef WITHOUT_NAME
  static constexpr std::string_view name = "half";
#endif
#if defined(WITH_DOUBLE_PERCENT_AT)
  double percent_at(const RoundEnd&) noexcept { return 50; }
#elif !defined(WITHOUT_PERCENT_AT)
  unsigned percent_at(const RoundEnd&) noexcept { return 50; }
#endif
};
static_assert(multifd::migrate::check_throttle_rule<Half>());
