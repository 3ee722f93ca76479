// SPDX-License-Identifier: MIT
//
// PricedDowntime, the default rule: a second of downtime is worth so many seconds of migrating, and the migration goes on
// for as long as it is likely to gain more than it takes. benchmarks/simulate/README.md has how it compares with others.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "multifd/migrate/switch_rule.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// What downtime is worth. Both prices are seconds of migrating per second of downtime.
struct DowntimePrice {
  /// The downtime that the guest's user does not mind much: above it the price is another one. QEMU's default limit.
  std::chrono::milliseconds max_downtime{300};
  /// Up to max_downtime: a tenth of a second less is worth a second.
  double within = 10;
  /// Above: what KubeVirt's rules pay, which wait 10 s before they allow 150 ms more, or 40 s before 600 ms.
  double above = 10 / 0.15;

  constexpr double of(double downtime) const noexcept {
    const double limit = seconds(max_downtime);
    return within * std::min(downtime, limit) + above * std::max(0.0, downtime - limit);
  }

  /// What a switchover costs: its downtime is time as well.
  constexpr double cost(double downtime) const noexcept { return downtime + of(downtime); }
};

/// The settings of PricedDowntime.
struct PricedDowntimeOptions {
  DowntimePrice price{};  ///< how much waiting a shorter downtime is worth
  /// No switchover above this before the time limit, whatever waiting costs. 0: none. A guest whose working set does not
  /// fit then goes on until the time limit, so set that, too, and what to do then.
  std::chrono::milliseconds never_above{0};
};

/// Goes on while another round is likely to be worth its time; behind that waits for a quiet phase of the guest or a faster
/// link, the longer the dearer the downtime is now; then stops the guest. A model of SwitchRule.
///
/// Three things are weighed at a round's end, all in seconds:
///  * The next round: what its shorter downtime would save, less its time, less the risk that the guest's load rises
///    meanwhile, as it did when it rose before.
///  * A quiet phase: two fifths less to send than now, or the link as it usually is, may come at any time. What it would
///    save, a third of that, is how long it is waited for, up to what 1.5 s of downtime are worth, counted from the last
///    time that the cost fell by a fifth. So a migration whose downtime would be minutes comes to an end, too.
///  * A low after a rise: less than a fifth of the usual cost is taken as it comes.
class PricedDowntime {
 public:
  static constexpr std::string_view name = "priced";

  PricedDowntime() = default;
  explicit PricedDowntime(const PricedDowntimeOptions& options) noexcept : options_(options) {}

  /// Errors: Errc::bad_option (op: the option's name).
  [[nodiscard]] Result<void> check() const noexcept {
    const auto refuse = [](const char* option) { return fail(Errc::bad_option, Stage::setup, option); };
    if (options_.price.max_downtime.count() < 0) return refuse("DowntimePrice::max_downtime");
    if (!(options_.price.within >= 0)) return refuse("DowntimePrice::within");
    if (!(options_.price.above >= options_.price.within)) return refuse("DowntimePrice::above");
    if (options_.never_above.count() < 0) return refuse("PricedDowntimeOptions::never_above");
    return {};
  }

  Verdict at_round_end(const RoundEnd& end) noexcept {
    const DirtyRate& dirty = *end.dirty_rate;
    const double downtime = seconds(end.downtime.total());
    const double bandwidth = end.bandwidth->pages_per_s();
    const double pages = static_cast<double>(end.dirty_pages);
    if (pages == 0) return {Action::switch_now, Reason::downtime_fits, downtime};
    if (bandwidth <= 0) return {Action::go_on, Reason::too_much_left, downtime};

    const double cost = options_.price.cost(downtime);
    remember(end.now, cost);
    if (options_.never_above.count() > 0 && downtime > seconds(options_.never_above))
      return {Action::go_on, Reason::too_much_left, downtime};

    const auto cost_of = [&](double some_pages, double pages_per_s) {
      return options_.price.cost(seconds(end.switchover.downtime(some_pages, pages_per_s).total()));
    };
    const double round = pages / bandwidth + seconds(end.sync);
    const double next = cost_of(dirty.expected(round), bandwidth);
    const double rises = (static_cast<double>(rises_) + rises_first) / (low_seconds_ + low_first);
    const double gain = cost - next - round - rises * round * std::max(0.0, usual_cost_ - cost);
    if (gain > 0) return {Action::go_on, Reason::improving, gain};

    const bool rare_low = rises_ > 0 && cost < rare * usual_cost_;
    const double link = std::max(bandwidth, end.bandwidth->usual_pages_per_s());
    const double quiet = cost_of(quiet_share * pages, link);
    const double worth = std::min(hope * std::max(0.0, cost - quiet), most_hoped * options_.price.above);
    const double patience = worth - seconds(end.now - best_at_) - least_patience;
    if (patience > 0 && !rare_low) return {Action::go_on, Reason::waiting, patience};
    const bool fits = downtime <= seconds(options_.price.max_downtime);
    return {Action::switch_now, fits ? Reason::downtime_fits : Reason::nothing_to_gain, downtime};
  }

 private:
  // Found on traces of other seeds than those that are tested (benchmarks/simulate/README.md).
  static constexpr double memory_seconds = 60;  // of what is usual
  static constexpr double progress = 0.8;       // of the best cost: better than that is progress
  static constexpr double low = 0.5;            // of the usual cost: the guest is quiet
  static constexpr double rare = 0.2;           // of the usual cost: take it
  static constexpr double hope = 0.35;          // how much of what might be gained is worth waiting for
  static constexpr double most_hoped = 1.5;     // seconds of downtime, whose price is the longest wait: 100 s
  static constexpr double least_patience = 2;   // seconds
  static constexpr double quiet_share = 0.6;    // of the pages, in a quiet phase
  static constexpr double rises_first = 0.02;   // ends of quiet phases before any was seen ...
  static constexpr double low_first = 5;        // ... in so many seconds

  void remember(Time now, double cost) noexcept {
    const double passed = started_ ? seconds(now - last_) : 0;
    usual_cost_ = started_ ? usual_cost_ + (1 - std::exp(-passed / memory_seconds)) * (cost - usual_cost_) : cost;
    if (!started_ || cost < progress * best_) best_ = cost, best_at_ = now;
    const bool is_low = cost < low * usual_cost_;
    if (was_low_) low_seconds_ += passed;
    if (was_low_ && !is_low) ++rises_;
    was_low_ = is_low;
    last_ = now;
    started_ = true;
  }

  PricedDowntimeOptions options_{};
  bool started_ = false;
  bool was_low_ = false;
  Time last_{};
  Time best_at_{};
  double best_ = 0;
  double usual_cost_ = 0;
  double low_seconds_ = 0;
  std::uint64_t rises_ = 0;
};
static_assert(check_switch_rule<PricedDowntime>());

}  // namespace multifd::migrate
