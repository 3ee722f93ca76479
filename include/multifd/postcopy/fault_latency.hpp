// SPDX-License-Identifier: MIT
//
// How long faults waited, as power-of-two buckets.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

namespace multifd::postcopy {

/// A snapshot. Bucket i counts latencies of 2^i to 2^(i+1) - 1 nanoseconds, bucket 0 also those of 0; the last one all longer.
struct FaultLatency {
  static constexpr std::size_t buckets_of = 40;  ///< the last begins at nine minutes

  std::array<std::uint64_t, buckets_of> buckets{};
  std::uint64_t total_ns = 0;  ///< of all
  std::uint64_t most_ns = 0;   ///< the longest

  std::uint64_t count() const noexcept { return std::accumulate(buckets.begin(), buckets.end(), std::uint64_t{0}); }
  std::uint64_t mean_ns() const noexcept {
    const std::uint64_t all = count();
    return all == 0 ? 0 : total_ns / all;
  }

  /// The latency that a share of the faults did not exceed. Within its bucket latencies are taken to lie evenly, so the
  /// answer is off by less than a factor of two. Params: `share`: 0.99 is p99. Returns: 0 when there were no faults.
  std::uint64_t quantile_ns(double share) const noexcept {
    const std::uint64_t all = count();
    if (all == 0) return 0;
    const double wanted = std::clamp(share, 0.0, 1.0) * static_cast<double>(all);
    double below = 0;
    for (std::size_t i = 0; i < buckets.size(); ++i) {
      const auto here = static_cast<double>(buckets[i]);
      if (here > 0 && below + here >= wanted) {
        const double first = i == 0 ? 0.0 : static_cast<double>(std::uint64_t{1} << i);
        const double width = static_cast<double>(std::uint64_t{1} << (i == 0 ? 1 : i));
        return std::min(most_ns, static_cast<std::uint64_t>(first + width * (wanted - below) / here));
      }
      below += here;
    }
    return most_ns;
  }
  std::uint64_t p50_ns() const noexcept { return quantile_ns(0.5); }
  std::uint64_t p99_ns() const noexcept { return quantile_ns(0.99); }
  std::uint64_t p999_ns() const noexcept { return quantile_ns(0.999); }
};

}  // namespace multifd::postcopy
