// SPDX-License-Identifier: MIT
//
// measure_dirty_rate(): what a guest writes to, measured without a migration: how fast it would have to be sent, and whether a
// link is fast enough for it.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::migrate {

/// Settings of measure_dirty_rate().
struct MeasureOptions {
  /// How long writes are collected before they are counted. A page that is written twice in it counts once, as it would be
  /// sent once in a round that long: take what a round of your migrations takes.
  std::chrono::milliseconds period{1000};
  unsigned periods = 1;                             ///< how often; 1 to 100 000
  std::uint64_t rearm_pages = default_rearm_pages;  ///< see rearm_chunks()
  const Interrupt* interrupt = nullptr;             ///< ends it from outside. Not owned
};

/// One period of measure_dirty_rate().
struct DirtyPeriod {
  Time time{};              ///< how long it was
  Time sync{};              ///< how long fetching the dirty bitmap behind it took
  std::uint64_t pages = 0;  ///< that were written to in it

  double pages_per_s() const noexcept { return static_cast<double>(pages) / std::max(1e-9, seconds(time)); }
};

/// Measures how many pages a running guest writes to. Dirty logging is on meanwhile, and off afterwards.
///
/// Params `source`: of the guest's map, and off. `ram`: the map.
/// Errors: Errc::bad_option (periods, period); Errc::cancelled; those of DirtySource.
/// Threads: as DirtySource. Cost: what dirty logging costs the guest, for as long as it takes.
template <DirtySource S>
[[nodiscard]] Result<std::vector<DirtyPeriod>> measure_dirty_rate(S& source, const RamMap& ram,
                                                                  const MeasureOptions& options = {}) {
  using Clock = std::chrono::steady_clock;
  MULTIFD_TRY(check_time_limit("MeasureOptions::period", options.period, Stage::setup));
  if (options.period.count() == 0) return fail(Errc::bad_option, Stage::setup, "MeasureOptions::period");
  if (options.periods == 0 || options.periods > 100'000)
    return fail(Errc::bad_option, Stage::setup, "MeasureOptions::periods", options.periods, 100'000);

  return catch_bad_alloc(Stage::setup, "measure_dirty_rate", [&]() -> Result<std::vector<DirtyPeriod>> {
    DirtyBitmaps dirty(ram);
    std::vector<DirtyPeriod> periods;
    periods.reserve(options.periods);
    const auto watch_again = [&]() -> Result<void> {
      MULTIFD_TRY(detail::rearm_all(source, dirty, options.rearm_pages));
      dirty.clear();
      return {};
    };
    const auto wait_until = [&](Clock::time_point end) -> Result<void> {
      pollfd event{
          .fd = options.interrupt != nullptr ? options.interrupt->native_handle() : -1, .events = POLLIN, .revents = 0};
      for (;;) {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now());
        if (left.count() <= 0) return {};
        if (::poll(&event, 1, static_cast<int>(left.count())) < 0 && errno != EINTR)
          return fail_errno(Stage::none, "poll, while the guest writes");
        if (options.interrupt != nullptr && options.interrupt->triggered())
          return fail(Errc::cancelled, Stage::none, "measure_dirty_rate");
      }
    };
    const auto measure = [&]() -> Result<void> {
      // What was written before counts for nothing.
      MULTIFD_TRY(detail::fetch_all(source, dirty));
      if (source.needs_rearm()) dirty.fill(ram);
      MULTIFD_TRY(watch_again());
      auto begin = Clock::now();
      for (unsigned i = 0; i < options.periods; ++i) {
        MULTIFD_TRY(wait_until(begin + options.period));
        const auto fetching = Clock::now();
        MULTIFD_TRY(detail::fetch_all(source, dirty));
        const auto end = Clock::now();
        periods.push_back({.time = fetching - begin, .sync = end - fetching, .pages = dirty.count()});
        MULTIFD_TRY(watch_again());
        begin = end;
      }
      return {};
    };
    MULTIFD_TRY(source.start());
    const Result<void> measured = measure();
    const Result<void> stopped = source.stop();
    MULTIFD_TRY(measured);
    MULTIFD_TRY(stopped);
    return periods;
  });
}

}  // namespace multifd::migrate
