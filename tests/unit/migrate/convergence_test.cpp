// SPDX-License-Identifier: MIT
//
// Convergence and the default rule, on guests whose every round is written down here.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <optional>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "support/allocation_count.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;

namespace {

/// A guest with a working set, on a link, in virtual time.
struct Guest {
  double ram_pages = 2'000'000;
  double set_pages = 60'000;
  double writes_per_page = 2;  ///< and second
  Time sync = 5ms;
  std::function<double(double)> link = [](double) { return 100'000.0; };  ///< pages per second, by seconds
  std::function<double(double)> load = [](double) { return 1.0; };        ///< of writes_per_page
};

struct Ended {
  Decision decision;
  Time now;
  std::uint64_t rounds;
};

/// Runs a migration to its end, or to `until`.
template <class Convergence>
Ended migrate_guest(Convergence& convergence, const Guest& guest, Time until = 1000s) {
  double now = 0, fetched = 0, pages = guest.ram_pages;
  for (std::uint64_t round = 0;; ++round) {
    // In steps of a millisecond, because link and load change as they like.
    const double begin = now, sent = pages;
    for (double left = pages; left > 0; now += 0.001) left -= guest.link(now) * 0.001;
    double writes = 0;
    for (double at = fetched; at < now; at += 0.001) writes += guest.load(at) * guest.writes_per_page * 0.001;
    fetched = now;
    pages = guest.set_pages * -std::expm1(-writes);
    const double send = now - begin;
    now += seconds(guest.sync);
    const Decision decision = convergence.round_ended(static_cast<std::uint64_t>(sent), from_seconds(send), guest.sync,
                                                      static_cast<std::uint64_t>(pages), from_seconds(now));
    if (decision.action != Action::go_on || from_seconds(now) > until) return {decision, from_seconds(now), round + 1};
  }
}

Convergence<> default_convergence(const ConvergenceOptions& options = {}) { return *Convergence<>::create(options); }

}  // namespace

TEST_CASE("A guest that converges is stopped when the next round would gain less than it takes") {
  Convergence<> convergence = default_convergence();
  const Ended ended = migrate_guest(convergence, {.set_pages = 200'000, .writes_per_page = 0.05});
  CHECK(ended.decision.action == Action::switch_now);
  CHECK(ended.decision.reason == Reason::downtime_fits);
  CHECK(ended.decision.downtime.total() < 50ms);  // QEMU's rule would have stopped at up to 300 ms
  CHECK(ended.now < 23s);                         // the bulk pass takes 20 s
}

TEST_CASE("A working set that never fits is waited for some seconds, and then taken") {
  Convergence<> convergence = default_convergence();
  const Ended ended = migrate_guest(convergence, {.set_pages = 80'000, .writes_per_page = 10});
  CHECK(ended.decision.action == Action::switch_now);
  CHECK(ended.decision.reason == Reason::nothing_to_gain);
  CHECK(ended.decision.downtime.total() > 700ms);
  CHECK(ended.now > 22s);
  CHECK(ended.now < 40s);
}

TEST_CASE("The dearer downtime is, the longer it is waited for; never_above waits until the time limit") {
  const Guest guest{.set_pages = 80'000, .writes_per_page = 10};
  Time before{};
  for (const double above : {20.0, 60.0, 200.0, 600.0}) {
    auto convergence = *Convergence<>::create({}, PricedDowntime({.price = {.above = above}}));
    const Ended ended = migrate_guest(convergence, guest);
    CHECK(ended.now > before);
    before = ended.now;
  }
  auto strict = *Convergence<>::create({.time_limit = 300s}, PricedDowntime({.never_above = 500ms}));
  const Ended ended = migrate_guest(strict, guest);
  CHECK(ended.decision.action == Action::give_up);
  CHECK(ended.decision.reason == Reason::time_limit);
  CHECK(ended.now >= 300s);
}

TEST_CASE("A dip of the link of 5 s does not trigger the switchover, whenever it comes") {
  // The bulk pass takes 20 s. The first guest's working set does not fit into the limit, so a rule that looks for the end of
  // progress would take the dip for it.
  for (Guest guest :
       {Guest{.set_pages = 60'000, .writes_per_page = 3}, Guest{.set_pages = 40'000, .writes_per_page = 4}}) {
    Convergence<> without = default_convergence();
    const Downtime downtime = migrate_guest(without, guest).decision.downtime;
    for (const double begin : {17.0, 19.9, 20.3, 20.6, 20.9}) {
      CAPTURE(begin);
      guest.link = [begin](double at) { return at >= begin && at < begin + 5 ? 10'000.0 : 100'000.0; };
      Convergence<> convergence = default_convergence();
      const Ended ended = migrate_guest(convergence, guest);
      CHECK(ended.decision.action == Action::switch_now);
      CHECK(seconds(ended.now) > begin + 5);
      CHECK(seconds(ended.now) < begin + 15);
      CHECK(seconds(ended.decision.downtime.total()) < 1.1 * seconds(downtime.total()));
    }
  }
}

TEST_CASE("A bitmap that takes 250 ms instead of 5 changes the promised downtime by less than 10 %") {
  // It is fetched while 300 ms of pages are sent. A diluted bandwidth makes it many times as long for others.
  std::optional<Downtime> quick;
  for (const Time sync : {Time(5ms), Time(250ms)}) {
    Convergence<> convergence = default_convergence({.device_state = 20ms, .round_trip = 1ms});
    const Ended ended = migrate_guest(convergence, {.set_pages = 30'000, .writes_per_page = 20, .sync = sync});
    REQUIRE(ended.decision.action == Action::switch_now);
    const Downtime downtime = ended.decision.downtime;
    CHECK(downtime.sync == Time::zero());
    CHECK(std::abs(convergence.bandwidth().pages_per_s() / 100'000 - 1) < 0.01);
    if (quick) CHECK(std::abs(seconds(downtime.total()) / seconds(quick->total()) - 1) < 0.1);
    quick = downtime;
  }
}

TEST_CASE("Of the last sync counts what is longer than sending the known pages; with sync_first, all of it") {
  const auto downtime_of = [](bool sync_first, Time sync) {
    Convergence<> convergence = default_convergence({.sync_first = sync_first});
    static_cast<void>(convergence.round_ended(1'000'000, 10s, sync, 30'000, 10s + sync));
    return convergence.downtime(30'000, sync);  // 300 ms, and what is dirtied during the sync
  };
  CHECK(downtime_of(false, 100ms).sync == Time::zero());
  CHECK(std::abs(seconds(downtime_of(false, 500ms).sync) - 0.2) < 1e-6);
  CHECK(downtime_of(true, 100ms).sync == 100ms);
  CHECK(downtime_of(true, 500ms).sync == 500ms);
  // What the last sync finds is sent behind it, so it is in the pages either way.
  CHECK(downtime_of(false, 500ms).pages == downtime_of(true, 500ms).pages);
  CHECK(downtime_of(false, 500ms).pages > 300ms);
}

TEST_CASE("The promise has all parts of a switchover in it") {
  for (const bool sync_first : {false, true}) {
    Convergence<> convergence =
        default_convergence({.device_state = 30ms, .round_trip = 2ms, .sync_first = sync_first});
    CHECK(convergence.round_ended(1'000'000, 10s, 10ms, 50'000, 10s + 10ms).action == Action::go_on);
    const Decision decision = convergence.round_ended(50'000, 500ms, 10ms, 50'000, 10s + 520ms);
    const Downtime& downtime = decision.downtime;
    CHECK(std::abs(seconds(downtime.pages) - 0.5) < 0.01);
    CHECK(downtime.sync == (sync_first ? 10ms : 0ms));
    CHECK(downtime.device_state == 30ms);
    CHECK(downtime.round_trip == 2ms);
    CHECK(downtime.total() == downtime.pages + (sync_first ? 42ms : 32ms));
  }
}

TEST_CASE("A downtime of minutes is waited off for as long as 1.5 s of it are worth, and then taken") {
  Convergence<> convergence = default_convergence({.time_limit = 1200s});
  const Ended ended =
      migrate_guest(convergence, {.ram_pages = 12'000'000, .set_pages = 6'000'000, .writes_per_page = 10});
  CHECK(ended.decision.reason == Reason::nothing_to_gain);
  CHECK(ended.now < 400s);
}

TEST_CASE("A guest with quiet phases is stopped in one of them") {
  Guest guest{.set_pages = 150'000, .writes_per_page = 3};
  guest.load = [](double at) { return std::fmod(at, 12) < 9 ? 1.0 : 0.01; };
  Convergence<> convergence = default_convergence();
  const Ended ended = migrate_guest(convergence, guest);
  CHECK(ended.decision.action == Action::switch_now);
  CHECK(ended.decision.downtime.total() < 300ms);
  CHECK(ended.now < 48s);
}

TEST_CASE("At the time limit happens what was asked for, also in the middle of a round") {
  for (const Action action : {Action::give_up, Action::switch_now, Action::memory_on_demand}) {
    auto convergence = *Convergence<FixedDowntime>::create({.time_limit = 60s, .at_time_limit = action});
    const Ended ended = migrate_guest(convergence, {.set_pages = 80'000, .writes_per_page = 10});
    CHECK(ended.decision.action == action);
    CHECK(ended.decision.reason == Reason::time_limit);
    CHECK(ended.decision.figure >= 60);
    CHECK(ended.decision.figure < 62);
  }
  auto convergence = *Convergence<>::create({.time_limit = 60s});
  CHECK(convergence.while_sending(59s).action == Action::go_on);
  CHECK(convergence.while_sending(60s).action == Action::give_up);
  CHECK(Convergence<>::create()->while_sending(std::chrono::hours(1000)).action == Action::go_on);
}

TEST_CASE("A switchover that is asked for comes at the end of the round") {
  auto convergence = *Convergence<FixedDowntime>::create();
  CHECK(convergence.round_ended(1'000'000, 10s, 10ms, 500'000, 10s).action == Action::go_on);
  convergence.ask_for_switchover();
  const Decision decision = convergence.round_ended(500'000, 5s, 10ms, 500'000, 15s);
  CHECK(decision.action == Action::switch_now);
  CHECK(decision.reason == Reason::switchover_asked);
  CHECK(decision.figure == doctest::Approx(seconds(decision.downtime.total())));
}

TEST_CASE("The throttle's decision comes with each round") {
  auto convergence = *Convergence<FixedDowntime, AutoConverge>::create({.time_limit = 40s});
  const Ended ended = migrate_guest(convergence, {.set_pages = 80'000, .writes_per_page = 10});
  CHECK(ended.decision.throttle_percent >= 50);
}

TEST_CASE("No call allocates") {
  auto convergence = default_convergence();
  const std::uint64_t before = test::allocations();
  Time now{};
  std::uint64_t pages = 1'000'000;
  for (int i = 0; i < 100; ++i) {
    now += 1s;
    static_cast<void>(convergence.round_ended(pages, 900ms, 10ms, pages * 2 / 3, now));
    static_cast<void>(convergence.while_sending(now));
    pages = pages * 2 / 3;
  }
  CHECK(test::allocations() == before);
}

TEST_CASE("Memory on demand takes the place of a downtime that is too long, and of giving up, and of nothing else") {
  enum class Ask { none, for_switchover };
  // A second round that leaves pages for 0.6 s.
  const auto decide = [](const ConvergenceOptions& options, std::uint64_t rounds, Ask ask = Ask::none) {
    auto convergence = Convergence<FixedRounds>::create(options, FixedRounds(rounds));
    REQUIRE(convergence.has_value());
    convergence->round_ended(100'000, 1s, 1ms, 60'000, 1001ms);
    if (ask == Ask::for_switchover) convergence->ask_for_switchover();
    return convergence->round_ended(60'000, 600ms, 1ms, 60'000, 1602ms);
  };
  const ConvergenceOptions on_demand{.on_demand_above = 300ms};
  const Decision too_long = decide(on_demand, 1);
  CHECK(too_long.action == Action::memory_on_demand);
  CHECK(too_long.reason == Reason::rounds_used_up);  // the rule's own
  CHECK(too_long.downtime.total() > 500ms);
  CHECK(decide({}, 1).action == Action::switch_now);
  CHECK(decide({.on_demand_above = 1000ms}, 1).action == Action::switch_now);
  CHECK(decide(on_demand, 9).action == Action::go_on);
  // The caller's word counts more, whatever the downtime.
  CHECK(decide(on_demand, 9, Ask::for_switchover).action == Action::switch_now);
  // Giving up.
  const Decision late = decide({.time_limit = 1500ms, .on_demand_above = 1000ms}, 9);
  CHECK(late.action == Action::memory_on_demand);
  CHECK(late.reason == Reason::time_limit);
  CHECK(decide({.time_limit = 1500ms}, 9).action == Action::give_up);
  CHECK(decide({.time_limit = 1500ms, .at_time_limit = Action::switch_now, .on_demand_above = 1000ms}, 9).action ==
        Action::switch_now);
  CHECK(decide({.time_limit = 1500ms, .at_time_limit = Action::switch_now, .on_demand_above = 300ms}, 9).action ==
        Action::memory_on_demand);
  CHECK(decide({.time_limit = 1500ms, .at_time_limit = Action::memory_on_demand}, 9).action ==
        Action::memory_on_demand);
  CHECK(Convergence<>::create({.on_demand_above = -1ms}).error().code == Errc::bad_option);
}

TEST_CASE("Memory on demand takes the place of rounds that leave as much as they send, for a while") {
  struct Case {
    const char* what;
    Time round;
    std::uint64_t second, third;  ///< pages that these rounds leave, of 60,000
    ConvergenceOptions options;
    Action action;
  };
  const ConvergenceOptions on_demand{.on_demand_above = 300ms};
  for (const Case& each :
       {Case{"two rounds, of 1.2 s", 600ms, 60'000, 59'000, on_demand, Action::memory_on_demand},
        Case{"not for long enough", 400ms, 60'000, 59'000, on_demand, Action::go_on},
        Case{"the last one has left less", 600ms, 60'000, 50'000, on_demand, Action::go_on},
        Case{"the one before has", 600ms, 50'000, 60'000, on_demand, Action::go_on},
        Case{"short enough all the same", 600ms, 60'000, 59'000, {.on_demand_above = 10s}, Action::go_on},
        Case{"not wanted", 600ms, 60'000, 59'000, {}, Action::go_on}}) {
    CAPTURE(each.what);
    auto convergence = Convergence<FixedRounds>::create(each.options, FixedRounds(9));
    REQUIRE(convergence.has_value());
    convergence->round_ended(100'000, 1s, 1ms, 60'000, 1s);
    CHECK(convergence->round_ended(60'000, each.round, 1ms, each.second, 1s + each.round).action == Action::go_on);
    const Decision last = convergence->round_ended(each.second, each.round, 1ms, each.third, 1s + 2 * each.round);
    CHECK(last.action == each.action);
    if (last.action == Action::memory_on_demand) CHECK(last.reason == Reason::hopeless);
  }
  // A guest that is being slowed is given the time for it.
  auto throttled = Convergence<FixedRounds, AutoConverge>::create(on_demand, FixedRounds(99));
  REQUIRE(throttled.has_value());
  throttled->round_ended(100'000, 1s, 1ms, 60'000, 1s);
  for (int round = 1; round < 4; ++round)
    CHECK(throttled->round_ended(60'000, 600ms, 1ms, 60'000, 1s + round * 600ms).action == Action::go_on);
}
