// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <chrono>

#include "multifd/migrate/bandwidth_estimate.hpp"
#include "multifd/migrate/dirty_rate.hpp"

using namespace multifd::migrate;
using namespace std::chrono_literals;

TEST_CASE("The bandwidth is that of the last 200 ms of sending, however many rounds they are") {
  BandwidthEstimate bandwidth;
  CHECK(bandwidth.pages_per_s() == 0);
  bandwidth.sent(100'000, 1s, 1s);
  CHECK(bandwidth.pages_per_s() == doctest::Approx(100'000));
  // A short round of noise counts for its share: a fifth of a second is needed, and it is a hundredth.
  bandwidth.sent(3'000, 10ms, 1s + 20ms);
  CHECK(bandwidth.pages_per_s() == doctest::Approx(103'000 / 1.01));
  for (int i = 0; i < 20; ++i) bandwidth.sent(1'000, 20ms, 2s + i * 20ms);
  CHECK(bandwidth.pages_per_s() == doctest::Approx(50'000));
}

TEST_CASE("A round without pages or time leaves the bandwidth as it is") {
  BandwidthEstimate bandwidth;
  bandwidth.sent(100'000, 1s, 1s);
  bandwidth.sent(0, 1s, 2s);
  bandwidth.sent(100, 0s, 3s);
  CHECK(bandwidth.pages_per_s() == doctest::Approx(100'000));
}

TEST_CASE("A dip of the link shows at once, and what is usual remembers the link") {
  BandwidthEstimate bandwidth;
  Time now{};
  for (int i = 0; i < 60; ++i) bandwidth.sent(100'000, 1s, now += 1s);
  for (int i = 0; i < 5; ++i) bandwidth.sent(10'000, 1s, now += 1s);
  CHECK(bandwidth.pages_per_s() == doctest::Approx(10'000));
  CHECK(bandwidth.usual_pages_per_s() > 70'000);
  for (int i = 0; i < 120; ++i) bandwidth.sent(10'000, 1s, now += 1s);
  CHECK(bandwidth.usual_pages_per_s() == doctest::Approx(10'000).epsilon(0.05));
}

TEST_CASE("A guest that always writes to the same pages will write to them in a shorter round, too") {
  DirtyRate dirty;
  CHECK(dirty.expected(1) == 0);
  CHECK(dirty.grown(1) == 1);
  dirty.fetched(50'000, 8s);
  dirty.fetched(50'000, 4s);
  dirty.fetched(50'000, 2s);
  CHECK(dirty.pages_per_s() == doctest::Approx(25'000));
  CHECK(dirty.expected(1) == doctest::Approx(50'000));
  // 250 ms more change nothing for long: each round that says so leaves a quarter of what was believed before.
  CHECK(dirty.grown(0.25) < 1.02);
}

TEST_CASE("A guest whose every write is to another page dirties half as much in half the time") {
  DirtyRate dirty;
  dirty.fetched(80'000, 8s);
  dirty.fetched(40'000, 4s);
  CHECK(dirty.expected(2) == doctest::Approx(20'000));
  CHECK(dirty.expected(40) == doctest::Approx(20'000));  // never more than the trend: two rounds have each had half
}

TEST_CASE("A load that has just begun is no trend downwards, although two rounds together are one") {
  DirtyRate dirty;
  dirty.fetched(200'000, 4s);
  dirty.fetched(10'000, 4s);
  dirty.fetched(40'000, 4s);
  CHECK(dirty.expected(4) == doctest::Approx(40'000));
}

TEST_CASE("Times and pages of nothing are no trap") {
  DirtyRate dirty;
  dirty.fetched(0, 0s);
  dirty.fetched(0, 0s);
  CHECK(dirty.expected(0) >= 0);
  CHECK(dirty.grown(0) == doctest::Approx(1));
  CHECK(from_seconds(-1) == Time::zero());
  CHECK(from_seconds(1e300) > std::chrono::hours(24 * 365));
}
