// SPDX-License-Identifier: MIT
//
// The switch rules of others, as their documents have them, and the throttle.
#include <doctest/doctest.h>

#include <chrono>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/downtime_ramp.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/stall_detection.hpp"
#include "multifd/migrate/throttle.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;

namespace {

constexpr double link = 100'000;  // pages per second

RoundEnd round_end(std::uint64_t round, Time now, std::uint64_t sent, Time sync, std::uint64_t dirty) {
  return {.round = round,
          .now = now,
          .sent_pages = sent,
          .send = from_seconds(static_cast<double>(sent) / link),
          .sync = sync,
          .dirty_pages = dirty};
}

}  // namespace

TEST_CASE("FixedDowntime: what fits into 300 ms at the last round's bandwidth ends the migration") {
  FixedDowntime rule;
  CHECK(rule.at_round_end(round_end(1, 2s, 50'000, 10ms, 30'001)).action == Action::go_on);
  const Verdict verdict = rule.at_round_end(round_end(2, 3s, 30'001, 10ms, 30'000));
  CHECK(verdict.action == Action::switch_now);
  CHECK(verdict.reason == Reason::downtime_fits);
  CHECK(verdict.figure == doctest::Approx(0.3));
}

TEST_CASE("FixedDowntime: with sync in its bandwidth, a slow bitmap keeps the guest from ever being stopped") {
  // 15 GB/s, half of it dirtied, 250 ms of sync: the example of the mailing list, which needs a limit of 500 ms.
  FixedDowntime diluted({.bandwidth = BandwidthOver::round});
  FixedDowntime clean({.bandwidth = BandwidthOver::sending});
  const RoundEnd end = round_end(3, 5s, 25'000, 250ms, 25'000);
  CHECK(diluted.at_round_end(end).figure == doctest::Approx(0.5));
  CHECK(diluted.at_round_end(end).action == Action::go_on);
  CHECK(clean.at_round_end(end).figure == doctest::Approx(0.25));
  CHECK(clean.at_round_end(end).action == Action::switch_now);
}

TEST_CASE("FixedRounds: the fifth round behind the bulk pass is the last") {
  FixedRounds rule;
  for (std::uint64_t round = 0; round < 5; ++round)
    CHECK(rule.at_round_end(round_end(round, 1s, 100, 1ms, 1'000'000)).action == Action::go_on);
  CHECK(rule.at_round_end(round_end(5, 1s, 100, 1ms, 1'000'000)).reason == Reason::rounds_used_up);
}

TEST_CASE("DowntimeRamp: 150 ms until the third round is over, then 150 ms more every 10 s, up to 1050") {
  DowntimeRamp rule;
  const auto limit_at = [&](std::uint64_t round, Time now) {
    // The largest bitmap that would be taken, in ms; a rule's copy is asked, so that asking changes nothing.
    for (unsigned ms = 1200; ms > 0; ms -= 10)
      if (DowntimeRamp copy = rule;
          copy.at_round_end(round_end(round, now, 1000, 0ms, ms * 100 - 1)).action != Action::go_on)
        return ms;
    return 0u;
  };
  CHECK(limit_at(0, 50s) == 150);
  static_cast<void>(rule.at_round_end(round_end(0, 50s, 1000, 0ms, 1'000'000)));
  CHECK(limit_at(1, 90s) == 150);
  static_cast<void>(rule.at_round_end(round_end(2, 100s, 1000, 0ms, 1'000'000)));
  CHECK(limit_at(3, 109s) == 150);
  CHECK(limit_at(3, 110s) == 300);
  CHECK(limit_at(4, 135s) == 600);
  CHECK(limit_at(9, 160s) == 1050);
  CHECK(limit_at(99, 900s) == 1050);
}

TEST_CASE("StallDetection: switches at a local minimum once no less has been left for 40 s") {
  StallDetection rule;
  Time now{};
  const auto ask = [&](std::uint64_t dirty) {
    now += 1s;
    return rule.at_round_end(round_end(static_cast<std::uint64_t>(now / 1s), now, 60'000, 0ms, dirty));
  };
  // Falling: no stall, however long.
  for (std::uint64_t dirty = 160'000; dirty > 60'000; dirty -= 2'000) REQUIRE(ask(dirty).action == Action::go_on);
  // From here on 60,000 pages or more, 600 ms: above the first limit, within the second.
  int rounds = 0;
  Verdict verdict;
  while ((verdict = ask(rounds % 2 == 0 ? 70'000 : 60'000)).action == Action::go_on) REQUIRE(++rounds < 100);
  CHECK(verdict.action == Action::switch_now);
  CHECK(verdict.reason == Reason::local_minimum);
  CHECK(verdict.figure == doctest::Approx(0.6));
  // 70,000 pages are no progress once 72,000 are 40 s ago, which were left in second 45; then comes the next minimum.
  CHECK(now == 86s);
}

TEST_CASE(
    "StallDetection: gives up when stalled far above the limit, and accepts the next best when the best is gone") {
  const auto run = [](std::uint64_t best, std::uint64_t later) {
    StallDetection rule;
    Time now{};
    for (std::uint64_t round = 0; round < 300; ++round) {
      now += 1s;
      const std::uint64_t dirty = round == 5 ? best : later;
      if (const Verdict verdict = rule.at_round_end(round_end(round, now, 60'000, 0ms, dirty));
          verdict.action != Action::go_on)
        return std::pair(verdict, now);
    }
    return std::pair(Verdict{}, now);
  };
  CHECK(run(150'000, 150'000).first.reason == Reason::hopeless);
  // 500 ms were left once, 800 ms ever since: 40 s until the stall, 40 s of patience.
  const auto [verdict, when] = run(50'000, 80'000);
  CHECK(verdict.reason == Reason::local_minimum);
  CHECK(when > 80s);
  CHECK(when < 95s);
}

TEST_CASE("StallDetection: a limit that was raised and is not met within 60 s is given up") {
  StallDetection rule;
  Time now{};
  Verdict verdict;
  for (std::uint64_t round = 0; round < 300 && verdict.action == Action::go_on; ++round) {
    now += 1s;
    verdict =
        rule.at_round_end(round_end(round, now, 60'000, 0ms, 120'000));  // 1.2 s: between 900 ms and 1.5 times that
  }
  CHECK(verdict.action == Action::give_up);
  CHECK(verdict.reason == Reason::no_switchover);
  CHECK(now > 100s);
  CHECK(now < 105s);
}

TEST_CASE("AutoConverge: two rounds in a row that dirty more than half of what was sent make a step, up to 99 %") {
  AutoConverge rule;
  const auto ask = [&](std::uint64_t round, std::uint64_t dirty) {
    return rule.percent_at(round_end(round, 1s, 1000, 0ms, dirty));
  };
  CHECK(ask(0, 1000) == 0);
  CHECK(ask(1, 600) == 0);
  CHECK(ask(2, 400) == 0);
  CHECK(ask(3, 600) == 0);
  CHECK(ask(4, 600) == 20);
  CHECK(ask(5, 600) == 20);
  CHECK(ask(6, 600) == 30);
  for (std::uint64_t round = 7; round < 40; ++round) static_cast<void>(ask(round, 600));
  CHECK(ask(40, 10) == 99);
}

TEST_CASE("Options out of their range are refused by name") {
  const auto refused = [](auto rule) { return Convergence<decltype(rule)>::create({}, rule).error().op; };
  CHECK(std::string(refused(FixedDowntime({.max_downtime = 0ms}))) == "FixedDowntimeOptions::max_downtime");
  CHECK(std::string(refused(DowntimeRamp({.steps = 1}))) == "DowntimeRampOptions::steps");
  CHECK(std::string(refused(DowntimeRamp({.max_downtime = 100ms}))) == "DowntimeRampOptions::max_downtime");
  CHECK(std::string(refused(StallDetection({.margin = 1}))) == "StallDetectionOptions::margin");
  CHECK(std::string(refused(PricedDowntime({.price = {.within = -1}}))) == "DowntimePrice::within");
  CHECK(std::string(refused(PricedDowntime({.price = {.above = 1}}))) == "DowntimePrice::above");
  const auto throttle = Convergence<PricedDowntime, AutoConverge>::create({}, {}, AutoConverge({.most_percent = 100}));
  CHECK(std::string(throttle.error().op) == "AutoConvergeOptions::most_percent");
  CHECK(std::string(Convergence<>::create({.time_limit = -1s}).error().op) == "ConvergenceOptions::time_limit");
  CHECK(std::string(Convergence<>::create({.at_time_limit = Action::go_on}).error().op) ==
        "ConvergenceOptions::at_time_limit");
}
