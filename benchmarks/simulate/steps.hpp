// SPDX-License-Identifier: MIT
//
// Steps: a figure that holds until it changes, over virtual time: a link's speed, what a guest writes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace simulate {

/// One value, from `at` seconds on.
struct Step {
  double at = 0;
  double value = 0;
};

/// Values over time, with the area below them. The first holds before its time, too, and the last for ever.
class Steps {
 public:
  Steps() : Steps(std::vector<Step>{{0, 0}}) {}

  /// `steps`: at least one, ascending.
  explicit Steps(std::vector<Step> steps) : steps_(std::move(steps)) {
    areas_.reserve(steps_.size());
    double area = 0;
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      if (i > 0) area += steps_[i - 1].value * (steps_[i].at - steps_[i - 1].at);
      areas_.push_back(area);
    }
  }

  double at(double time) const { return steps_[place(time)].value; }

  /// The area from the first step to `time`.
  double area(double time) const {
    const std::size_t i = place(time);
    return areas_[i] + steps_[i].value * (time - steps_[i].at);
  }

  /// When the area behind `time` has come to `more`; infinity when the values are 0 from some time on.
  double reach(double time, double more) const {
    const double area_there = area(time) + more;
    auto i = static_cast<std::size_t>(std::ranges::upper_bound(areas_, area_there) - areas_.begin());
    i = i > 0 ? i - 1 : 0;
    if (steps_[i].value <= 0) return std::numeric_limits<double>::infinity();
    return std::max(time, steps_[i].at + (area_there - areas_[i]) / steps_[i].value);
  }

  std::span<const Step> steps() const { return steps_; }

 private:
  std::size_t place(double time) const {
    const auto behind = std::ranges::upper_bound(steps_, time, {}, &Step::at);
    return behind == steps_.begin() ? 0 : static_cast<std::size_t>(behind - steps_.begin()) - 1;
  }

  std::vector<Step> steps_;
  std::vector<double> areas_;
};

/// The product of two figures over time.
inline std::vector<Step> product(std::span<const Step> a, std::span<const Step> b) {
  std::vector<Step> result;
  constexpr double never = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0, j = 0;;) {
    result.push_back({std::max(a[i].at, b[j].at), a[i].value * b[j].value});
    const double next_a = i + 1 < a.size() ? a[i + 1].at : never;
    const double next_b = j + 1 < b.size() ? b[j + 1].at : never;
    if (next_a == never && next_b == never) return result;
    if (next_a <= next_b) ++i;
    if (next_b <= next_a) ++j;
  }
}

}  // namespace simulate
