// SPDX-License-Identifier: MIT
//
// Convergence: what a migration does at the end of each round. The driver feeds it, and so does the simulator
// (benchmarks/simulate/), in virtual time: the decisions that are simulated are those that run.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <utility>

#include "multifd/migrate/bandwidth_estimate.hpp"
#include "multifd/migrate/dirty_rate.hpp"
#include "multifd/migrate/priced_downtime.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/migrate/switch_rule.hpp"
#include "multifd/migrate/throttle.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"

namespace multifd::migrate {

/// The settings of a Convergence.
struct ConvergenceOptions {
  /// How long the migration may take, to the switchover. 0: no limit. Also what bounds a rule that waits for ever.
  std::chrono::milliseconds time_limit{0};
  /// What happens then: Action::give_up (the guest stays), Action::switch_now (whatever the downtime), or
  /// Action::memory_on_demand. Action::go_on is refused.
  Action at_time_limit = Action::give_up;
  /// How many rounds the guest may run through, and then the same happens. 0: no limit, which is best: how long a round takes
  /// is the guest's and the link's matter.
  std::uint64_t max_rounds = 0;
  /// What a switchover takes beside pages and sync, for the promised downtime: device state, as far as it is known
  /// beforehand, and the round trips of the hand-over.
  std::chrono::microseconds device_state{0};
  std::chrono::microseconds round_trip{0};  ///< see device_state
  /// The switchover waits for the last bitmap before it sends the first page. false: it sends what is known to be dirty
  /// meanwhile, as migrate_to() does.
  bool sync_first = false;
  /// Action::memory_on_demand takes the place of a switchover that is predicted to take longer than this, unless the caller
  /// has asked for it, and of giving up; and of going on, where it would take longer and the last rounds, two at least and for a
  /// second, have left as many pages as they sent, but for a twentieth: Reason::hopeless. Not while a throttle slows the guest,
  /// which has to have begun by then. None: never.
  std::optional<std::chrono::milliseconds> on_demand_above{};
};

/// What is to be done at a round's end.
struct Decision {
  Action action = Action::go_on;
  Reason reason = Reason::bulk_pass;
  double figure = 0;              ///< what to print beside the reason; Reason says what it is
  unsigned throttle_percent = 0;  ///< of each vCPU's time, from now on
  Downtime downtime{};            ///< what a switchover now would cost; what is promised when action says so
};

/// Decides, round by round, with a SwitchRule and a ThrottleRule. Knows no clock, thread or descriptor: all it knows of time
/// is what it is told.
///
/// Threads: one at a time, the driver's. Cost: per round some dozen operations and the rule's own; nothing is allocated.
template <SwitchRule Rule = PricedDowntime, ThrottleRule Throttle = ThrottleOff>
class Convergence {
 public:
  /// Errors: Errc::bad_option (op: the option's name), of `options`, and what the rules' check() refuses.
  [[nodiscard]] static Result<Convergence> create(const ConvergenceOptions& options = {}, Rule rule = {},
                                                  Throttle throttle = {}) noexcept {
    MULTIFD_TRY(check_time_limit("ConvergenceOptions::time_limit", options.time_limit, Stage::setup));
    MULTIFD_TRY(check_time_limit("ConvergenceOptions::device_state", options.device_state, Stage::setup));
    MULTIFD_TRY(check_time_limit("ConvergenceOptions::round_trip", options.round_trip, Stage::setup));
    if (options.on_demand_above)
      MULTIFD_TRY(check_time_limit("ConvergenceOptions::on_demand_above", *options.on_demand_above, Stage::setup));
    if (options.at_time_limit == Action::go_on)
      return fail(Errc::bad_option, Stage::setup, "ConvergenceOptions::at_time_limit");
    if constexpr (requires { rule.check(); }) MULTIFD_TRY(rule.check());
    if constexpr (requires { throttle.check(); }) MULTIFD_TRY(throttle.check());
    return Convergence(options, std::move(rule), std::move(throttle));
  }

  /// A round was sent, and the dirty bitmap fetched again. To be called once per round, the bulk pass being the first.
  ///
  /// Params: `sent_pages`: all that the round had, zero and unchanged ones included; of the bulk pass those that took time, because
  ///   what the guest dirties is not zero; `send`: from its first page to its
  ///   last; `sync`: how long fetching the bitmap took; `dirty_pages`: how many it has; `now`: since the migration
  ///   began, with the bitmap there.
  Decision round_ended(std::uint64_t sent_pages, Time send, Time sync, std::uint64_t dirty_pages, Time now) noexcept {
    const Time fetched = now - sync;
    bandwidth_.sent(sent_pages, send, fetched);
    dirty_rate_.fetched(dirty_pages, fetched - fetched_);
    fetched_ = fetched;
    const RoundEnd end{.round = round_++,
                       .now = now,
                       .sent_pages = sent_pages,
                       .send = send,
                       .sync = sync,
                       .dirty_pages = dirty_pages,
                       .switchover = switchover(sync),
                       .downtime = downtime(dirty_pages, sync),
                       .bandwidth = &bandwidth_,
                       .dirty_rate = &dirty_rate_};
    const Verdict verdict = rule_.at_round_end(end);
    last_ = {.action = verdict.action,
             .reason = verdict.reason,
             .figure = verdict.figure,
             .throttle_percent = throttle_.percent_at(end),
             .downtime = end.downtime};
    if (last_.action == Action::go_on && asked_) last_ = asked(last_);
    if (last_.action == Action::go_on) last_ = limited(last_, now);
    const bool stalled = note_stall(end);
    if (options_.on_demand_above) last_ = on_demand(last_, stalled);
    return last_;
  }

  /// For a round that takes long: whether the time limit has passed in it. To be called as often as it is to be noticed,
  /// while a round is sent. What it says of the downtime is that of the round's begin.
  Decision while_sending(Time now) const noexcept {
    Decision decision = last_;
    decision.action = Action::go_on;
    return limited(decision, now);
  }

  /// The caller wants the switchover at the end of the round, whatever the rule says; a rule that gives up then is heard.
  void ask_for_switchover() noexcept { asked_ = true; }

  /// What a switchover would cost with so many dirty pages, when fetching the bitmap takes `sync`.
  Downtime downtime(std::uint64_t dirty_pages, Time sync) const noexcept {
    return switchover(sync).downtime(static_cast<double>(dirty_pages), bandwidth_.pages_per_s());
  }

  const BandwidthEstimate& bandwidth() const noexcept { return bandwidth_; }
  const DirtyRate& dirty_rate() const noexcept { return dirty_rate_; }

 private:
  Convergence(const ConvergenceOptions& options, Rule rule, Throttle throttle) noexcept
      : options_(options), rule_(std::move(rule)), throttle_(std::move(throttle)) {}

  Switchover switchover(Time sync) const noexcept {
    // The guest has run on while the bitmap was fetched, and what it dirtied then has to be sent, too.
    return {.sync = sync,
            .found = dirty_rate_.grown(seconds(sync)) - 1,
            .sync_first = options_.sync_first,
            .device_state = options_.device_state,
            .round_trip = options_.round_trip};
  }

  Decision on_demand(Decision decision, bool stalled) const noexcept {
    const bool too_long = decision.downtime.total() > Time(*options_.on_demand_above);
    if (decision.action == Action::go_on && too_long && stalled && decision.throttle_percent == 0) {
      decision.reason = Reason::hopeless;
      decision.figure = seconds(decision.downtime.total());
      decision.action = Action::memory_on_demand;
    }
    const bool asked = decision.reason == Reason::switchover_asked;
    if ((decision.action == Action::switch_now && too_long && !asked) || decision.action == Action::give_up)
      decision.action = Action::memory_on_demand;
    return decision;
  }

  /// Returns whether rounds leave as much as they send, and have for a while. The bulk pass sends all there is, and says
  /// nothing of what is to come.
  bool note_stall(const RoundEnd& end) noexcept {
    if (end.round == 0 || end.sent_pages == 0 || end.dirty_pages < end.sent_pages - end.sent_pages / 20) {
      stalled_rounds_ = 0;
      fell_at_ = end.now;
    } else {
      ++stalled_rounds_;
    }
    return stalled_rounds_ >= 2 && end.now - fell_at_ >= std::chrono::seconds(1);
  }

  static Decision asked(Decision decision) noexcept {
    decision.action = Action::switch_now;
    decision.reason = Reason::switchover_asked;
    decision.figure = seconds(decision.downtime.total());
    return decision;
  }

  Decision limited(Decision decision, Time now) const noexcept {
    if (options_.max_rounds != 0 && round_ >= options_.max_rounds) {
      decision.action = options_.at_time_limit;
      decision.reason = Reason::rounds_used_up;
      decision.figure = static_cast<double>(round_);
      return decision;
    }
    if (options_.time_limit.count() == 0 || now < Time(options_.time_limit)) return decision;
    decision.action = options_.at_time_limit;
    decision.reason = Reason::time_limit;
    decision.figure = seconds(now);
    return decision;
  }

  ConvergenceOptions options_{};
  Rule rule_;
  Throttle throttle_;
  BandwidthEstimate bandwidth_{};
  DirtyRate dirty_rate_{};
  Decision last_{};
  Time fetched_{};
  std::uint64_t round_ = 0;
  bool asked_ = false;
  unsigned stalled_rounds_ = 0;
  Time fell_at_{};  ///< the end of the last round that left fewer pages than it sent, by a twentieth
};

}  // namespace multifd::migrate
