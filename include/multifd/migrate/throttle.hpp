// SPDX-License-Identifier: MIT
//
// ThrottleRule: how much of its time the guest is to be held, so that it dirties less. Only the decision: holding the vCPUs
// is the VMM's.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "multifd/migrate/switch_rule.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

template <class T>
concept HasThrottleName = requires {
  { T::name } -> std::convertible_to<std::string_view>;
};

template <class T>
concept HasThrottlePercent = requires(T& rule, const RoundEnd& end) {
  { rule.percent_at(end) } noexcept -> std::same_as<unsigned>;
};

/// Decides how much the guest is throttled.
///
/// Semantics: `percent_at` is called once per round, at its end, in order; the answer is how much of its time each vCPU is
///   held from then on, 0 to 99. The driver takes the throttle off at the switchover, and when the migration ends without one.
/// Errors: none; options out of range are refused by Convergence::create(), through the rule's
///   `Result<void> check() const`, where it has one.
/// Threads: one at a time, the driver's.
/// Cost: called once per round with the guest running: no allocation, no lock, no system call, no clock.
/// Models: ThrottleOff, AutoConverge. Exemplar: tests/exemplar/throttle_rule.hpp.
///   Contract: multifd/testing/switch_rule_contract.hpp.
template <class T>
concept ThrottleRule = std::copyable<T> && HasThrottleName<T> && HasThrottlePercent<T>;

/// Fails to compile with a message that says which member to write.
template <class T>
consteval bool check_throttle_rule() {
  static_assert(std::copyable<T>, "ThrottleRule: needs to be copyable");
  static_assert(HasThrottleName<T>, "ThrottleRule: needs  static constexpr std::string_view name");
  static_assert(HasThrottlePercent<T>, "ThrottleRule: needs  unsigned percent_at(const RoundEnd&) noexcept");
  return ThrottleRule<T>;
}

/// The guest is never held. A model of ThrottleRule.
struct ThrottleOff {
  static constexpr std::string_view name = "off";
  unsigned percent_at(const RoundEnd&) noexcept { return 0; }
};
static_assert(check_throttle_rule<ThrottleOff>());

/// The settings of AutoConverge; the defaults are QEMU's.
struct AutoConvergeOptions {
  unsigned first_percent = 20;  ///< the first throttle
  unsigned step_percent = 10;   ///< each time that it was not enough, so much more
  unsigned most_percent = 99;   ///< and no more than this; 1 to 99
  double share = 0.5;   ///< a round counts against the guest when it dirtied more than this share of what was sent
  unsigned rounds = 2;  ///< so many such rounds in a row make a step
};

/// QEMU's auto-converge: throttles a guest that dirties more than half of what is sent, twice in a row, and then more and
/// more. Never throttles less again. A model of ThrottleRule.
class AutoConverge {
 public:
  static constexpr std::string_view name = "auto-converge";

  AutoConverge() = default;
  explicit AutoConverge(const AutoConvergeOptions& options) noexcept : options_(options) {}

  /// Errors: Errc::bad_option (op: the option's name).
  [[nodiscard]] Result<void> check() const noexcept {
    if (options_.most_percent < 1 || options_.most_percent > 99)
      return fail(Errc::bad_option, Stage::setup, "AutoConvergeOptions::most_percent", options_.most_percent, 99);
    if (!(options_.share > 0)) return fail(Errc::bad_option, Stage::setup, "AutoConvergeOptions::share");
    if (options_.rounds == 0) return fail(Errc::bad_option, Stage::setup, "AutoConvergeOptions::rounds");
    return {};
  }

  unsigned percent_at(const RoundEnd& end) noexcept {
    if (end.round == 0) return percent_;  // the bulk pass says little of the guest
    const bool too_much = static_cast<double>(end.dirty_pages) > options_.share * static_cast<double>(end.sent_pages);
    against_ = too_much ? against_ + 1 : 0;
    if (against_ >= options_.rounds) {
      against_ = 0;
      const unsigned more = percent_ == 0 ? options_.first_percent : options_.step_percent;
      percent_ = percent_ + std::min(more, options_.most_percent - percent_);
    }
    return percent_;
  }

 private:
  AutoConvergeOptions options_{};
  unsigned percent_ = 0;
  unsigned against_ = 0;
};
static_assert(check_throttle_rule<AutoConverge>());

}  // namespace multifd::migrate
