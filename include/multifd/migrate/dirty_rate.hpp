// SPDX-License-Identifier: MIT
//
// DirtyRate: how many pages the guest dirties, as a number and as a function of how long it is left to run. A guest that
// writes to the same pages again and again dirties fewer in a second than twice what it dirties in half of one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "multifd/migrate/round.hpp"

namespace multifd::migrate {

/// The dirty pages of the last rounds, each with the time in which the guest dirtied them. Between two of them the number
/// grows with a power of the time: 1 where every write is to another page, 0 where the working set is dirty as a whole.
///
/// Threads: one at a time. Cost: a few operations per round, no allocation.
class DirtyRate {
 public:
  /// A dirty bitmap was fetched. Params: `pages`: those that it has; `time`: since the fetch before it.
  void fetched(std::uint64_t pages, Time time) noexcept {
    const double count = std::max(1.0, static_cast<double>(pages));
    const double took = std::max(1e-9, seconds(time));
    growth_ = first_growth;
    trend_ = 1;
    if (seen_ > 0) {
      // Times that are alike say nothing about the growth, and then nothing else does: 0, no fewer pages to come.
      const double longer = std::log(took / time_);
      growth_ = 0;
      if (std::abs(longer) > 0.1) {
        growth_ = std::clamp(std::log(count / pages_) / longer, 0.0, 1.0);
        usual_growth_ += 0.75 * (growth_ - usual_growth_);
      }
      // Over two rounds, because one is noise; but a load that has just begun shows in one.
      trend_ = seen_ > 1 ? std::sqrt(count / before_) : count / pages_;
      if (count > rise * pages_) trend_ = 1;
    }
    before_ = pages_;
    pages_ = count;
    time_ = took;
    seen_ = std::min(seen_ + 1, 2);
  }

  /// Dirty pages per second over the last round; 0 before the first fetch.
  double pages_per_s() const noexcept { return seen_ == 0 ? 0 : pages_ / time_; }

  /// How many pages the next round will find, if it takes `next`. Never more than the last one found.
  double expected(double next) const noexcept {
    if (seen_ == 0) return 0;
    return pages_ * std::min({1.0, trend_, std::pow(next / time_, growth_)});
  }

  /// How many times as many pages there would be, had the guest been left to run for `more` seconds longer.
  double grown(double more) const noexcept { return seen_ == 0 ? 1 : std::pow(1 + more / time_, usual_growth_); }

 private:
  static constexpr double first_growth = 0.6;  // of guests in general, for the first round behind the bulk pass
  static constexpr double rise = 1.15;

  double pages_ = 0;
  double before_ = 0;
  double time_ = 1;
  double growth_ = first_growth;
  double usual_growth_ = first_growth;
  double trend_ = 1;
  int seen_ = 0;
};

}  // namespace multifd::migrate
