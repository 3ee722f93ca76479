// SPDX-License-Identifier: MIT
//
// SwitchRule: when to stop the guest. A rule is asked once at the end of each round, is told what a VMM can know then, and
// answers with its reason. Each model is a header of its own beside this one.
#pragma once

#include <chrono>
#include <concepts>
#include <cstdint>
#include <string_view>

#include "multifd/migrate/bandwidth_estimate.hpp"
#include "multifd/migrate/dirty_rate.hpp"
#include "multifd/migrate/round.hpp"

namespace multifd::migrate {

/// What a round's end means for the migration.
enum class Action : std::uint8_t {
  go_on,             ///< another round
  switch_now,        ///< stop the guest, fetch the bitmap once more, send the rest, hand over
  give_up,           ///< the guest stays at the source
  memory_on_demand,  ///< start the guest at the destination now, pages follow as they are needed
};

constexpr const char* to_string(Action action) noexcept {
  constexpr const char* names[] = {"go on", "switch now", "give up", "memory on demand"};
  return names[static_cast<std::size_t>(action)];
}

/// Why. Behind each: what Verdict::figure is.
enum class Reason : std::uint8_t {
  bulk_pass,         ///< the bulk pass comes first; nothing
  too_much_left,     ///< the downtime would be too long; seconds of downtime
  improving,         ///< another round costs less than it gains; seconds that it gains
  waiting,           ///< for a quiet moment or a faster link; seconds that are left for it
  downtime_fits,     ///< the downtime is within the limit; seconds of downtime
  nothing_to_gain,   ///< waiting has become dearer than what it can gain; seconds of downtime
  local_minimum,     ///< stalled, and as little is left as it has been since; seconds of downtime
  rounds_used_up,    ///< that many rounds were allowed; rounds
  hopeless,          ///< stalled above the limit; seconds of downtime
  no_switchover,     ///< the limit was raised, and yet was not met in time; seconds since
  time_limit,        ///< the migration has taken as long as it may; seconds
  switchover_asked,  ///< the caller wants it now; seconds of downtime
  at_once,           ///< memory on demand from the beginning (Postcopy::at_once); nothing
};

constexpr const char* to_string(Reason reason) noexcept {
  constexpr const char* names[] = {"bulk pass",     "too much left",   "improving",     "waiting",
                                   "downtime fits", "nothing to gain", "local minimum", "rounds used up",
                                   "hopeless",      "no switchover",   "time limit",    "switchover asked for",
                                   "at once"};
  return names[static_cast<std::size_t>(reason)];
}

/// What a rule says at a round's end.
struct Verdict {
  Action action = Action::go_on;
  Reason reason = Reason::too_much_left;
  double figure = 0;  ///< what to print beside the reason
};

/// What a VMM knows at the end of a round: the round is sent, and the dirty bitmap has been fetched again.
struct RoundEnd {
  std::uint64_t round = 0;                       ///< that has ended; 0: the bulk pass
  Time now{};                                    ///< since the migration began; the bitmap is there
  std::uint64_t sent_pages = 0;                  ///< in that round
  Time send{};                                   ///< which took so long, without sync
  Time sync{};                                   ///< fetching the bitmap just now
  std::uint64_t dirty_pages = 0;                 ///< that it has
  Switchover switchover{};                       ///< what stopping the guest comes to, for any number of pages
  Downtime downtime{};                           ///< if the guest were stopped now
  const BandwidthEstimate* bandwidth = nullptr;  ///< never null when a rule is asked
  const DirtyRate* dirty_rate = nullptr;         ///< never null when a rule is asked
};

template <class R>
concept HasSwitchRuleName = requires {
  { R::name } -> std::convertible_to<std::string_view>;
};

template <class R>
concept HasAtRoundEnd = requires(R& rule, const RoundEnd& end) {
  { rule.at_round_end(end) } noexcept -> std::same_as<Verdict>;
};

/// Decides when the guest stops.
///
/// Semantics: `at_round_end` is called once per round, in order, with `now` never going back. The answer is taken: a rule
///   that has said anything but Action::go_on is not asked again. Time limits are not a rule's matter (Convergence). A rule
///   has to end a migration whose last bitmap was empty.
/// Errors: none; a rule that cannot tell goes on. Options out of range are refused by Convergence::create(), through the
///   rule's `Result<void> check() const`, where it has one.
/// Threads: one at a time, the driver's.
/// Cost: called once per round with the guest running: no allocation, no lock, no system call, no clock.
/// Models: PricedDowntime (the default), FixedDowntime, FixedRounds, DowntimeRamp, StallDetection.
///   Exemplar: tests/exemplar/switch_rule.hpp. Contract: multifd/testing/switch_rule_contract.hpp.
template <class R>
concept SwitchRule = std::copyable<R> && HasSwitchRuleName<R> && HasAtRoundEnd<R>;

/// Fails to compile with a message that says which member to write.
template <class R>
consteval bool check_switch_rule() {
  static_assert(std::copyable<R>, "SwitchRule: needs to be copyable");
  static_assert(HasSwitchRuleName<R>, "SwitchRule: needs  static constexpr std::string_view name");
  static_assert(HasAtRoundEnd<R>, "SwitchRule: needs  Verdict at_round_end(const RoundEnd&) noexcept");
  return SwitchRule<R>;
}

}  // namespace multifd::migrate
