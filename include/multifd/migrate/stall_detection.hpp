// SPDX-License-Identifier: MIT
//
// StallDetection: notices that what is left no longer falls, and then stops the guest at a local minimum, as KubeVirt's
// VEP 248 does it with QEMU's limit.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include "multifd/migrate/fixed_downtime.hpp"

namespace multifd::migrate {

/// The settings of StallDetection; the defaults are VEP 248's.
struct StallDetectionOptions {
  std::chrono::milliseconds first_downtime{300};      ///< the limit before a stall: QEMU's
  std::chrono::milliseconds max_downtime{900};        ///< the limit after one
  std::chrono::milliseconds progress_time{40'000};    ///< a stall: no less is left than so long ago
  std::chrono::milliseconds switchover_time{60'000};  ///< how long the limit after a stall may remain unmet
  double margin = 0.04;                               ///< what differs by no more than this share is alike
  double possible_factor = 1.5;  ///< up to so many times max_downtime a later round may still do; above: give up
  double patience_decay =
      0.5;  ///< each time that no round comes near the best, the wait for the next best is so much shorter
  double smoothing = 0.4;  ///< weight of the last round in the bandwidth that a downtime is estimated with
  BandwidthOver bandwidth = BandwidthOver::round;  ///< QEMU's, which compares
};

/// Stops the guest within the first limit, or when stalled at a local minimum within the second; gives up far above it. A
/// model of SwitchRule. What was left is kept for some 80 seconds, the least of each third of a second.
class StallDetection {
 public:
  static constexpr std::string_view name = "stall";

  StallDetection() = default;
  explicit StallDetection(const StallDetectionOptions& options) noexcept
      : options_(options), limit_(seconds(options.first_downtime)) {}

  /// Errors: Errc::bad_option (op: the option's name).
  [[nodiscard]] Result<void> check() const noexcept {
    const auto refuse = [](const char* option) { return fail(Errc::bad_option, Stage::setup, option); };
    if (options_.first_downtime.count() <= 0) return refuse("StallDetectionOptions::first_downtime");
    if (options_.max_downtime.count() <= 0) return refuse("StallDetectionOptions::max_downtime");
    if (options_.progress_time.count() <= 0) return refuse("StallDetectionOptions::progress_time");
    if (!(options_.margin >= 0 && options_.margin < 1)) return refuse("StallDetectionOptions::margin");
    if (!(options_.patience_decay > 0 && options_.patience_decay <= 1))
      return refuse("StallDetectionOptions::patience_decay");
    if (!(options_.smoothing > 0 && options_.smoothing <= 1)) return refuse("StallDetectionOptions::smoothing");
    return {};
  }

  Verdict at_round_end(const RoundEnd& end) noexcept {
    const double bandwidth = last_bandwidth(end, options_.bandwidth);
    const double pages = static_cast<double>(end.dirty_pages);
    smoothed_ = smoothed_ == 0 ? bandwidth : options_.smoothing * bandwidth + (1 - options_.smoothing) * smoothed_;
    const double left = bandwidth > 0 ? pages / bandwidth : pages;
    if (left <= limit_) return {Action::switch_now, Reason::downtime_fits, left};
    if (triggered_) {
      const Time since = end.now - since_;
      if (since > Time(options_.switchover_time)) return {Action::give_up, Reason::no_switchover, seconds(since)};
      return {Action::go_on, Reason::too_much_left, left};
    }
    note(end.now, pages);
    if (!stalled_ && !stalls(end.now, pages)) return {Action::go_on, Reason::too_much_left, left};
    if (pages <= best_ * (1 + options_.margin)) return at_minimum(end.now, pages, left);
    if (end.now - since_ > patience_) relax(end.now);
    return {Action::go_on, Reason::too_much_left, left};
  }

 private:
  static constexpr std::size_t most = 256;
  static constexpr double taken = std::numeric_limits<double>::infinity();

  struct Sample {
    Time at{};
    double pages = 0;
  };

  Sample& sample(std::size_t i) noexcept { return samples_[(first_ + i) % most]; }

  /// Keeps what is left now; the least of a short time stands for all of it.
  void note(Time now, double pages) noexcept {
    if (count_ > 0 && now - sample(count_ - 1).at < Time(options_.progress_time) / static_cast<int>(most / 2)) {
      Sample& last = sample(count_ - 1);
      last.pages = std::min(last.pages, pages);
      return;
    }
    if (count_ == most) first_ = (first_ + 1) % most, --count_;
    sample(count_++) = {now, pages};
  }

  /// Whether no less is left than at some time at least progress_time ago.
  bool stalls(Time now, double pages) noexcept {
    double old = taken;
    std::size_t start = 0;
    for (std::size_t i = 0; i < count_ && sample(i).at <= now - Time(options_.progress_time); ++i)
      if (sample(i).pages < old) old = sample(i).pages, start = i;
    if (old == taken || pages < old * (1 - options_.margin)) return false;
    // From here on only what has been seen since the stall began counts.
    first_ = (first_ + start) % most;
    count_ -= start;
    relax(now);
    stalled_ = true;
    patience_ = Time(options_.progress_time);
    return true;
  }

  Verdict at_minimum(Time now, double pages, double left) noexcept {
    const double downtime = smoothed_ > 0 ? pages / smoothed_ : pages;
    if (downtime > seconds(options_.max_downtime) * options_.possible_factor)
      return {Action::give_up, Reason::hopeless, downtime};
    limit_ = seconds(options_.max_downtime);
    triggered_ = true;
    since_ = now;
    if (left <= limit_) return {Action::switch_now, Reason::local_minimum, left};
    return {Action::go_on, Reason::too_much_left, left};
  }

  /// Waits for the best that has not been waited for yet, for a shorter time than for the one before it.
  void relax(Time now) noexcept {
    std::size_t least = 0;
    for (std::size_t i = 1; i < count_; ++i)
      if (sample(i).pages < sample(least).pages) least = i;
    if (sample(least).pages != taken) best_ = sample(least).pages;
    sample(least).pages = taken;
    patience_ = from_seconds(seconds(patience_) * options_.patience_decay);
    since_ = now;
  }

  StallDetectionOptions options_{};
  double limit_ = 0.3;
  double smoothed_ = 0;
  double best_ = 0;
  bool stalled_ = false;
  bool triggered_ = false;
  Time since_{};
  Time patience_{};
  std::array<Sample, most> samples_{};
  std::size_t first_ = 0;
  std::size_t count_ = 0;
};
static_assert(check_switch_rule<StallDetection>());

}  // namespace multifd::migrate
