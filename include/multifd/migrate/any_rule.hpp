// SPDX-License-Identifier: MIT
//
// A SwitchRule and a ThrottleRule that are chosen at run time. Both are asked once per round.
#pragma once

#include <concepts>
#include <functional>
#include <string_view>
#include <utility>

#include "multifd/migrate/priced_downtime.hpp"
#include "multifd/migrate/switch_rule.hpp"
#include "multifd/migrate/throttle.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// Any SwitchRule. A model of SwitchRule.
///
/// Params `rule`: default: PricedDowntime. Cost: an allocation when it is made or copied; a call through a pointer when it is asked.
class AnySwitchRule {
 public:
  static constexpr std::string_view name = "any";

  AnySwitchRule() : AnySwitchRule(PricedDowntime{}) {}
  // In this order: to ask whether AnySwitchRule is one needs its constructors.
  template <class R>
    requires(!std::same_as<R, AnySwitchRule> && SwitchRule<R>)
  AnySwitchRule(R rule) {  // NOLINT(google-explicit-constructor): {.rule = FixedDowntime(...)}
    chosen_ = R::name;
    if constexpr (requires(const R& r) { r.check(); }) check_ = [rule] { return rule.check(); };
    at_round_end_ = [rule = std::move(rule)](const RoundEnd& end) mutable noexcept { return rule.at_round_end(end); };
  }

  Verdict at_round_end(const RoundEnd& end) noexcept { return at_round_end_(end); }
  /// What the rule refuses. Errors: the rule's own, Errc::bad_option.
  [[nodiscard]] Result<void> check() const { return check_ ? check_() : Result<void>{}; }
  /// The rule's own name.
  std::string_view chosen() const noexcept { return chosen_; }

 private:
  std::string_view chosen_;
  std::function<Verdict(const RoundEnd&)> at_round_end_;
  std::function<Result<void>()> check_;
};
static_assert(check_switch_rule<AnySwitchRule>());

/// Any ThrottleRule, as AnySwitchRule. Default: ThrottleOff. Threads: as ThrottleRule.
class AnyThrottleRule {
 public:
  static constexpr std::string_view name = "any";

  AnyThrottleRule() : AnyThrottleRule(ThrottleOff{}) {}
  // In this order: to ask whether AnyThrottleRule is one needs its constructors.
  template <class R>
    requires(!std::same_as<R, AnyThrottleRule> && ThrottleRule<R>)
  AnyThrottleRule(R rule) {  // NOLINT(google-explicit-constructor): {.throttle = AutoConverge()}
    chosen_ = R::name;
    if constexpr (requires(const R& r) { r.check(); }) check_ = [rule] { return rule.check(); };
    percent_at_ = [rule = std::move(rule)](const RoundEnd& end) mutable noexcept { return rule.percent_at(end); };
  }

  unsigned percent_at(const RoundEnd& end) noexcept { return percent_at_(end); }
  /// What the rule refuses. Errors: the rule's own, Errc::bad_option.
  [[nodiscard]] Result<void> check() const { return check_ ? check_() : Result<void>{}; }
  /// The rule's own name.
  std::string_view chosen() const noexcept { return chosen_; }

 private:
  std::string_view chosen_;
  std::function<unsigned(const RoundEnd&)> percent_at_;
  std::function<Result<void>()> check_;
};
static_assert(check_throttle_rule<AnyThrottleRule>());

}  // namespace multifd::migrate
