// SPDX-License-Identifier: MIT
//
// DowntimeRamp: a limit on the downtime that is raised in steps, as KubeVirt's VEP 291 does it with QEMU's limit.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string_view>

#include "multifd/migrate/fixed_downtime.hpp"

namespace multifd::migrate {

/// The settings of DowntimeRamp; the defaults are VEP 291's.
struct DowntimeRampOptions {
  std::chrono::milliseconds first_downtime{150};  ///< the limit at first
  std::chrono::milliseconds max_downtime{1050};   ///< the limit at last
  unsigned steps = 7;                             ///< how many limits there are, the first and the last included
  std::uint64_t first_round = 3;  ///< the round that has to be over before time counts, the bulk pass being 1
  std::chrono::milliseconds step_time{10'000};     ///< how long each limit holds
  BandwidthOver bandwidth = BandwidthOver::round;  ///< QEMU's, which compares
};

/// Stops the guest when its dirty pages fit into a limit that grows with time, and waits for ever at the last. A model of
/// SwitchRule.
class DowntimeRamp {
 public:
  static constexpr std::string_view name = "ramp";

  DowntimeRamp() = default;
  explicit DowntimeRamp(const DowntimeRampOptions& options) noexcept : options_(options) {}

  /// Errors: Errc::bad_option (op: the option's name).
  [[nodiscard]] Result<void> check() const noexcept {
    if (options_.first_downtime.count() <= 0)
      return fail(Errc::bad_option, Stage::setup, "DowntimeRampOptions::first_downtime");
    if (options_.max_downtime < options_.first_downtime)
      return fail(Errc::bad_option, Stage::setup, "DowntimeRampOptions::max_downtime");
    if (options_.steps < 2) return fail(Errc::bad_option, Stage::setup, "DowntimeRampOptions::steps", options_.steps);
    if (options_.step_time.count() <= 0) return fail(Errc::bad_option, Stage::setup, "DowntimeRampOptions::step_time");
    return {};
  }

  Verdict at_round_end(const RoundEnd& end) noexcept {
    double limit = seconds(options_.first_downtime);
    if (end.round + 1 >= options_.first_round) {
      if (!started_) started_ = end.now;
      const double step = (seconds(options_.max_downtime) - limit) / (options_.steps - 1);
      const auto passed = static_cast<double>((end.now - *started_) / Time(options_.step_time));
      limit = std::min(seconds(options_.max_downtime), limit + step * passed);
    }
    const double bandwidth = last_bandwidth(end, options_.bandwidth);
    const double pages = static_cast<double>(end.dirty_pages);
    const double left = bandwidth > 0 ? pages / bandwidth : pages;
    if (left <= limit) return {Action::switch_now, Reason::downtime_fits, left};
    return {Action::go_on, Reason::too_much_left, left};
  }

 private:
  DowntimeRampOptions options_{};
  std::optional<Time> started_{};
};
static_assert(check_switch_rule<DowntimeRamp>());

}  // namespace multifd::migrate
