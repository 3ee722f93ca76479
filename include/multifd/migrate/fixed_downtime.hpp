// SPDX-License-Identifier: MIT
//
// FixedDowntime: stop as soon as what is left fits into a downtime, as QEMU and Cloud Hypervisor do.
// FixedRounds: stop after so many rounds, as Cloud Hypervisor did until v51.
#pragma once

#include <chrono>
#include <cstdint>
#include <string_view>

#include "multifd/migrate/switch_rule.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// What a bandwidth is divided by. Rules of others do not all leave sync out.
enum class BandwidthOver : std::uint8_t {
  sending,  ///< the last round's time of sending
  round,    ///< the last round with its sync: what QEMU's estimate comes to when a sync is long
};

/// Pages per second in the last round.
inline double last_bandwidth(const RoundEnd& end, BandwidthOver over) noexcept {
  const double time = seconds(end.send + (over == BandwidthOver::round ? end.sync : Time::zero()));
  return time > 0 ? static_cast<double>(end.sent_pages) / time : 0;
}

/// The settings of FixedDowntime.
struct FixedDowntimeOptions {
  /// The limit. QEMU's and Cloud Hypervisor's default. Sync, device state and round trip come on top, as with both.
  std::chrono::milliseconds max_downtime{300};
  /// QEMU's estimate has sync in it, Cloud Hypervisor's has not.
  BandwidthOver bandwidth = BandwidthOver::sending;
};

/// Stops the guest when its dirty pages can be sent within a fixed time, and waits for ever if that never comes. A model of
/// SwitchRule.
class FixedDowntime {
 public:
  static constexpr std::string_view name = "fixed";

  FixedDowntime() = default;
  explicit FixedDowntime(const FixedDowntimeOptions& options) noexcept : options_(options) {}

  /// Errors: Errc::bad_option (op: the option's name).
  [[nodiscard]] Result<void> check() const noexcept {
    if (options_.max_downtime.count() <= 0)
      return fail(Errc::bad_option, Stage::setup, "FixedDowntimeOptions::max_downtime");
    return {};
  }

  Verdict at_round_end(const RoundEnd& end) noexcept {
    const double bandwidth = last_bandwidth(end, options_.bandwidth);
    const double pages = static_cast<double>(end.dirty_pages);
    const double left = bandwidth > 0 ? pages / bandwidth : pages;
    if (left <= seconds(options_.max_downtime)) return {Action::switch_now, Reason::downtime_fits, left};
    return {Action::go_on, Reason::too_much_left, left};
  }

 private:
  FixedDowntimeOptions options_{};
};
static_assert(check_switch_rule<FixedDowntime>());

/// Stops the guest after so many rounds behind the bulk pass, whatever is left. A model of SwitchRule.
class FixedRounds {
 public:
  static constexpr std::string_view name = "rounds";

  FixedRounds() = default;
  explicit FixedRounds(std::uint64_t rounds) noexcept : rounds_(rounds) {}

  Verdict at_round_end(const RoundEnd& end) noexcept {
    if (end.dirty_pages == 0) return {Action::switch_now, Reason::downtime_fits, 0};
    if (end.round >= rounds_) return {Action::switch_now, Reason::rounds_used_up, static_cast<double>(end.round)};
    return {Action::go_on, Reason::too_much_left, seconds(end.downtime.total())};
  }

 private:
  std::uint64_t rounds_ = 5;
};
static_assert(check_switch_rule<FixedRounds>());

}  // namespace multifd::migrate
