// SPDX-License-Identifier: MIT
#include "multifd/postcopy/detail/latency_counters.hpp"

#include <doctest/doctest.h>

#include "support/basics.hpp"

using namespace multifd::postcopy;
using namespace test;

TEST_CASE("Quantiles lie in the bucket of the latency that they ask for, and never above the longest") {
  detail::LatencyCounters counters;
  CHECK(counters.snapshot().quantile_ns(0.99) == 0);
  CHECK(counters.snapshot().mean_ns() == 0);
  for (int i = 0; i < 990; ++i) counters.add(10us);
  for (int i = 0; i < 9; ++i) counters.add(1ms);
  counters.add(1s);
  const FaultLatency all = counters.snapshot();
  CHECK(all.count() == 1000);
  CHECK(all.p50_ns() >= 8192);
  CHECK(all.p50_ns() < 16384);
  CHECK(all.p99_ns() <= 16384);
  CHECK(all.p999_ns() >= 524'288);
  CHECK(all.p999_ns() <= 1'048'576);
  CHECK(all.quantile_ns(1) == 1'000'000'000);
  CHECK(all.most_ns == 1'000'000'000);
  CHECK(all.total_ns == 990 * 10'000u + 9 * 1'000'000u + 1'000'000'000u);
}

TEST_CASE("Latencies of nothing, of less and of years have a bucket") {
  detail::LatencyCounters counters;
  counters.add(0ns);
  counters.add(-5ns);
  counters.add(std::chrono::hours(24 * 365));
  const FaultLatency all = counters.snapshot();
  CHECK(all.buckets.front() == 2);
  CHECK(all.buckets.back() == 1);
}
