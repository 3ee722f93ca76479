// SPDX-License-Identifier: MIT
// WITHOUT_NAME: SwitchRule: needs  static constexpr std::string_view name
// WITHOUT_AT_ROUND_END: SwitchRule: needs  Verdict at_round_end(const RoundEnd&) noexcept
// WITH_THROWING_AT_ROUND_END: SwitchRule: needs  Verdict at_round_end(const RoundEnd&) noexcept
// WITH_BOOL_AT_ROUND_END: SwitchRule: needs  Verdict at_round_end(const RoundEnd&) noexcept
// WITHOUT_COPIES: SwitchRule: needs to be copyable
#include "multifd/migrate/switch_rule.hpp"

using multifd::migrate::RoundEnd;
using multifd::migrate::Verdict;

struct AtOnce {
  AtOnce() = default;
#ifdef WITHOUT_COPIES
  AtOnce(const AtOnce&) = delete;
#endif
#ifndef WITHOUT_NAME
  static constexpr std::string_view name = "at once";
#endif
#if defined(WITH_THROWING_AT_ROUND_END)
  Verdict at_round_end(const RoundEnd&) { return {}; }
#elif defined(WITH_BOOL_AT_ROUND_END)
  bool at_round_end(const RoundEnd&) noexcept { return true; }
#elif !defined(WITHOUT_AT_ROUND_END)
  Verdict at_round_end(const RoundEnd&) noexcept { return {}; }
#endif
};
static_assert(multifd::migrate::check_switch_rule<AtOnce>());
