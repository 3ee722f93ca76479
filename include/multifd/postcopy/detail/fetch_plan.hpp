// SPDX-License-Identifier: MIT
//
// In which order the background fetches: what faults wait for, what lies behind recent faults, the prefetch list, the rest.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/postcopy/detail/fault_queues.hpp"
#include "multifd/postcopy/detail/lazy_layout.hpp"
#include "multifd/postcopy/page_states.hpp"

namespace multifd::postcopy::detail {

/// Adjacent units of one region to be fetched, by one request unless a unit is larger than one.
struct FetchJob {
  enum class Why : std::uint8_t {
    rest,      ///< zero units are not placed
    prefetch,  ///< zero units are placed
    fault,     ///< one unit, and a fault waits since
  };
  UnitRun run{};
  Why why = Why::rest;
  bool claimed = false;  ///< by who fetches it, all units
  FaultClock::time_point since{};
};

/// Threads: any. Takes turns with a mutex, once for each request of the background.
class FetchPlan {
 public:
  FetchPlan(const LazyLayout& layout, PageStates& states, std::uint64_t neighbours) noexcept
      : layout_(layout), states_(states), neighbours_(neighbours) {}

  /// Before there are threads.
  void add_prefetch(UnitRun run) { prefetch_.push_back(run); }

  DemandQueue& demand() noexcept { return demand_; }
  RecentFaults& recent() noexcept { return recent_; }

  /// A unit that a fault waits for, claimed where it was absent. What has come since then is passed over.
  std::optional<FetchJob> next_demanded() noexcept {
    while (const auto fault = demand_.pop(states_)) {
      const PageState state = states_.state(fault->unit);
      if (state == PageState::absent || state == PageState::claimed)
        return FetchJob{.run = {fault->unit, 1},
                        .why = FetchJob::Why::fault,
                        .claimed = states_.claim(fault->unit),
                        .since = fault->since};
    }
    return std::nullopt;
  }

  /// What comes next, claimed. Nothing: all that is absent is claimed.
  std::optional<FetchJob> next() noexcept {
    if (auto job = next_demanded()) return job;
    const std::lock_guard held(mutex_);
    if (neighbours_ > 0) {
      if (const auto fault = recent_.pop()) {
        const auto& part = layout_.part_of(*fault);
        near_ = {*fault + 1, std::min(neighbours_, part.end_unit() - *fault - 1)};
      }
      if (const auto run = claim_from(near_)) return FetchJob{.run = *run, .claimed = true};
    }
    for (; next_prefetch_ < prefetch_.size(); ++next_prefetch_)
      if (const auto run = claim_from(prefetch_[next_prefetch_]))
        return FetchJob{.run = *run, .why = FetchJob::Why::prefetch, .claimed = true};
    UnitRun rest{sweep_, layout_.units() - sweep_};
    const auto run = claim_from(rest);
    sweep_ = rest.first;
    if (!run) return std::nullopt;
    return FetchJob{.run = *run, .claimed = true};
  }

  /// Claims the first absent units of a run, `most` at most, and cuts off what lies before their end.
  std::optional<FetchJob> claim(UnitRun& run, std::uint64_t most) noexcept {
    const auto claimed = claim_from(run, most);
    if (!claimed) return std::nullopt;
    return FetchJob{.run = *claimed, .claimed = true};
  }

  /// Gives back what was claimed for a job that has no answer.
  void give_back(const FetchJob& job) noexcept {
    if (!job.claimed) return;
    for (std::uint64_t unit = job.run.first; unit < job.run.end(); ++unit)
      if (states_.give_back(unit)) demand_.push({unit, FaultClock::now()});
    const std::lock_guard held(mutex_);
    sweep_ = std::min(sweep_, job.run.first);
    // Of the prefetch list nothing is repeated: what is given back comes with the rest.
  }

 private:
  /// Claims the first adjacent absent units of a run, as many as one request takes and `at_most`, and cuts them off.
  std::optional<UnitRun> claim_from(UnitRun& run,
                                    std::uint64_t at_most = std::numeric_limits<std::uint64_t>::max()) noexcept {
    const std::uint64_t end = run.end();
    std::uint64_t at = run.first;
    std::optional<UnitRun> claimed;
    while (at < end && !claimed) {
      at = states_.next_absent(at, end);
      if (at == end) break;
      const auto& part = layout_.part_of(at);
      const std::uint64_t most = std::min(at_most, std::max<std::uint64_t>(1, batch_bytes / part.unit_bytes));
      const std::uint64_t last = std::min({end, part.end_unit(), at + most});
      const std::uint64_t first = at;
      while (at < last && states_.claim(at)) ++at;
      if (at > first)
        claimed = UnitRun{first, at - first};
      else
        ++at;
    }
    run = {at, end - at};
    return claimed;
  }

  const LazyLayout& layout_;
  PageStates& states_;
  const std::uint64_t neighbours_;
  DemandQueue demand_;
  RecentFaults recent_;
  std::mutex mutex_;
  UnitRun near_{};
  std::vector<UnitRun> prefetch_;
  std::size_t next_prefetch_ = 0;
  std::uint64_t sweep_ = 0;
};

}  // namespace multifd::postcopy::detail
