// SPDX-License-Identifier: MIT
//
// Round: the record of one pass over what is dirty. Events, progress, JSON and recorded traces all have this one, and
// Downtime: what a switchover would cost, in its parts.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "multifd/stats.hpp"

namespace multifd::migrate {

/// Time in migrate/: since the migration began, and always passed in. No code here reads a clock.
using Time = std::chrono::nanoseconds;

constexpr double seconds(Time time) noexcept { return std::chrono::duration<double>(time).count(); }

/// Saturates: what does not fit, infinity included, is the longest time; what is no number or negative is 0.
constexpr Time from_seconds(double value) noexcept {
  if (!(value > 0)) return Time::zero();
  constexpr double most = 9e18;
  return Time(static_cast<Time::rep>(value * 1e9 < most ? value * 1e9 : most));
}

/// How long the guest would stand still, in parts that add up.
struct Downtime {
  Time sync{};          ///< fetching the dirty bitmap once more, as far as no page is sent meanwhile
  Time pages{};         ///< sending what is dirty, at the bandwidth of the last rounds
  Time device_state{};  ///< saving, sending and loading it
  Time round_trip{};    ///< the switchover's messages

  constexpr Time total() const noexcept { return sync + pages + device_state + round_trip; }
  constexpr bool operator==(const Downtime&) const = default;
};

/// What a switchover does, from which follows how long it takes for any number of pages.
struct Switchover {
  Time sync{};              ///< fetching the dirty bitmap once more
  double found = 0;         ///< how many more pages that finds, as a share of those known before
  bool sync_first = false;  ///< no page is sent meanwhile; else the known ones are
  Time device_state{};      ///< see Downtime
  Time round_trip{};        ///< see Downtime

  /// Params: `known_pages`: of the bitmap before; `pages_per_s`: 0: unknown, and no time is taken for pages.
  constexpr Downtime downtime(double known_pages, double pages_per_s) const noexcept {
    const double known = pages_per_s > 0 ? known_pages / pages_per_s : 0;
    const Time hidden = sync_first ? Time::zero() : std::min(sync, from_seconds(known));
    return {.sync = sync - hidden,
            .pages = from_seconds(known * (1 + found)),
            .device_state = device_state,
            .round_trip = round_trip};
  }
};

/// What one pass over what was dirty moved, and what it says about the next.
struct Round {
  std::uint64_t number = 0;           ///< 0: the bulk pass over all memory
  Time begin{};                       ///< its first page
  std::uint64_t dirty_pages = 0;      ///< to be sent when the round began
  std::uint64_t again_pages = 0;      ///< of these, dirty again at its end
  std::uint64_t normal_pages = 0;     ///< sent as bytes
  std::uint64_t zero_pages = 0;       ///< sent as zero pages, or not at all
  std::uint64_t unchanged_pages = 0;  ///< left out because they were as last sent
  std::uint64_t wire_bytes = 0;       ///< on all channels and the main stream
  Time sync{};                        ///< fetching the dirty bitmap before it
  Time send{};                        ///< from its first page to its last, without sync
  double pages_per_s = 0;             ///< bandwidth while sending (bandwidth_estimate.hpp)
  double dirty_pages_per_s = 0;       ///< what the guest dirtied while the round ran
  Time predicted_downtime{};          ///< if the guest had been stopped when the round began
  Bound bound = Bound::nothing;       ///< what limited it
};

}  // namespace multifd::migrate
