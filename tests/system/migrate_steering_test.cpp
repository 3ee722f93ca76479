// SPDX-License-Identifier: MIT
//
// What a migration says on its way, and what other threads can do with it meanwhile: states and events, progress, pausing
// ahead of the switchover, the switchover on demand, the cap, limits, the throttle, the unchanged-page filter.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/throttle.hpp"
#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 512;

/// A rule that never stops the guest.
struct Never {
  static constexpr std::string_view name = "never";
  Verdict at_round_end(const RoundEnd&) noexcept { return {Action::go_on, Reason::too_much_left, 0}; }
};
static_assert(check_switch_rule<Never>());

/// Throttles more with each round.
struct MoreEachRound {
  static constexpr std::string_view name = "more each round";
  unsigned percent_at(const RoundEnd& end) noexcept {
    return static_cast<unsigned>(std::min<std::uint64_t>(end.round * 10, 90));
  }
};
static_assert(check_throttle_rule<MoreEachRound>());

/// A guest that runs at the source, and where it goes.
struct Migrated {
  explicit Migrated(std::size_t working_set = 32, Writes writes = Writes::numbers, std::size_t size = pages,
                    DestinationOptions options = {})
      : here(size), there(size, std::move(options)) {
    here.running_guests = there.guest.running_guests = &running;
    here.writes = there.guest.writes = writes;
    here.boot();
    here.run(working_set, 50us);
  }
  const Tried& go(SourceOptions options) {
    tried = migrate_once(here, followed, there, std::move(options));
    return tried;
  }
  void check_completed() {
    REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
    REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
    CHECK_FALSE(here.runs());
    CHECK(there.guest.runs());
    CHECK_FALSE(there.guest.ran_beside);
    CHECK(there.guest.torn_when_resumed == 0);
    CHECK_FALSE(here.logging());
    CHECK(here.throttled() == 0);
    CHECK(followed->owner() == Owner::destination);
    CHECK(there.followed->owner() == Owner::destination);
    CHECK(followed->progress().status == MigrationStatus::completed);
    CHECK(there.followed->progress().status == MigrationStatus::completed);
  }
  void check_runs_on() {
    CHECK(here.runs());
    CHECK_FALSE(here.ran_beside);
    CHECK_FALSE(there.guest.runs());
    CHECK_FALSE(here.logging());
    CHECK(here.throttled() == 0);
    CHECK(followed->owner() == Owner::source);
  }
  /// Both memories are the same; the guest is stopped for it.
  void check_same_memory() {
    there.guest.stop();
    // The destination's guest went on, in its working set.
    const std::size_t from = 64 * MigratingGuest::page;
    CHECK(std::memcmp(here.memory().data() + from, there.guest.memory().data() + from, here.memory().size() - from) ==
          0);
  }

  std::atomic<int> running = 0;
  MigratingGuest here;
  Followed followed;
  There there;
  Tried tried;
};

/// The states alone.
std::string without_rounds(std::string said) {
  for (std::size_t at; (at = said.find(" round")) != said.npos;) said.erase(at, 6);
  return said;
}

}  // namespace

TEST_CASE("The states come in QEMU's order, each round has its event, and the report has them all") {
  const Watchdog watchdog("states");
  const Leftovers leftovers;
  {
    Migrated vm;
    std::vector<Reason> reasons;
    vm.go({.converge = {.rule = FixedRounds(3)}, .on_event = [&](const Event& event) {
             if (event.kind == EventKind::round_end) {
               REQUIRE(event.round != nullptr);
               REQUIRE(event.decision != nullptr);
               reasons.push_back(event.decision->reason);
             }
           }});
    vm.check_completed();
    CHECK(without_rounds(vm.followed.said()) == "setup active device completed");
    CHECK(vm.there.followed.said() == "setup active device completed");
    const auto& rounds = vm.tried.sent->rounds;
    CHECK(vm.followed.rounds.size() == rounds.size() - 1);  // the last one, with the guest stopped, decides nothing
    CHECK(vm.followed->rounds().size() == rounds.size() - 1);
    CHECK(reasons.size() == rounds.size() - 1);
    REQUIRE(rounds.size() >= 2);
    CHECK(rounds[0].dirty_pages == pages);
    for (std::size_t i = 0; i < rounds.size(); ++i) {
      CAPTURE(i);
      CHECK(rounds[i].number == i);
      CHECK(rounds[i].normal_pages + rounds[i].zero_pages + rounds[i].unchanged_pages == rounds[i].dirty_pages);
      if (i > 0) CHECK(rounds[i].begin >= rounds[i - 1].begin);
      CHECK(rounds[i].again_pages <= rounds[i].dirty_pages);
    }
    CHECK(vm.tried.sent->downtime.total() > Time::zero());
    CHECK(vm.tried.sent->total >= vm.tried.sent->downtime.total());
    CHECK(vm.tried.sent->own_peer);
    CHECK(vm.tried.taken->ram_bytes == pages * MigratingGuest::page);
  }
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

TEST_CASE("A handle that nothing has happened to yet says so, and a try that reaches nobody has failed") {
  const Watchdog watchdog("nobody there");
  Followed followed;
  CHECK(followed->progress().status == MigrationStatus::none);
  CHECK(followed->owner() == Owner::source);
  CHECK(followed->rounds().empty());
  Address nobody;
  {
    const auto listener = Listener::listen({.host = "127.0.0.1"}, 1);
    REQUIRE(listener.has_value());
    nobody = listener->local_address();
  }
  MigratingGuest here(16);
  here.run(0);
  const auto sent = send_guest(
      here, nobody, {.on_event = [&](const Event& event) { followed.note(event); }, .migration = &*followed.handle});
  CHECK_MESSAGE(sent.error().code == Condition::peer_gone, text(sent));
  CHECK(followed.said() == "setup failed");
  CHECK(followed->progress().status == MigrationStatus::failed);
  CHECK(followed->owner_text().contains("runs there"));
  CHECK(here.runs());
}

TEST_CASE("cancel() ahead of the call ends it, at either side") {
  const Watchdog watchdog("cancelled before");
  Migrated vm;
  vm.followed->cancel();
  vm.go({});
  CHECK_MESSAGE(code_of(vm.tried.sent) == Errc::cancelled, text(vm.tried.sent));
  CHECK(vm.followed.said() == "setup cancelling cancelled");
  vm.check_runs_on();
  Migrated other;
  other.there.followed->cancel();
  other.go({.answer_timeout = 5s});
  CHECK_MESSAGE(code_of(other.tried.taken) == Errc::cancelled, text(other.tried.taken));
  CHECK(other.there.followed.said() == "setup cancelling cancelled");
  other.check_runs_on();
}

TEST_CASE("Other threads ask while it runs, and what they see only grows") {
  const Watchdog watchdog("progress from other threads");
  Migrated vm(64);
  std::atomic<bool> over = false;
  const auto watch = [&over](Followed& followed) {
    MigrationProgress last;
    std::size_t rounds = 0;
    for (bool last_look = false; !last_look;) {
      last_look = over;
      const MigrationProgress now = followed->progress();
      CHECK(now.elapsed >= last.elapsed);
      CHECK(now.status >= last.status);
      CHECK(now.moved.normal_pages >= last.moved.normal_pages);
      CHECK(now.moved.zero_pages >= last.moved.zero_pages);
      CHECK(now.moved.wire_bytes >= last.moved.wire_bytes);
      CHECK(now.round >= last.round);
      last = now;
      const std::size_t so_far = followed->rounds().size();
      CHECK(so_far >= rounds);
      rounds = so_far;
      static_cast<void>(followed->owner());
      static_cast<void>(followed->owner_text());
      static_cast<void>(followed->not_resumed());
    }
    CHECK(last.status == MigrationStatus::completed);
    CHECK(last.ram_bytes == pages * MigratingGuest::page);
    CHECK(last.moved.normal_pages + last.moved.zero_pages >= pages);
  };
  std::thread at_source(watch, std::ref(vm.followed)), at_destination(watch, std::ref(vm.there.followed));
  vm.go({.channels = 3, .converge = {.rule = FixedRounds(20)}});
  over = true;
  at_source.join();
  at_destination.join();
  vm.check_completed();
}

TEST_CASE("The guest stands still ahead of the switchover until another thread says proceed(), or cancels") {
  const Watchdog watchdog("pre-switchover");
  {
    Migrated vm;
    std::thread other([&] {
      CHECK(eventually([&] { return vm.followed->progress().status == MigrationStatus::pre_switchover; }));
      const std::uint64_t then = vm.here.written();
      std::this_thread::sleep_for(20ms);  // a guest that ran would write meanwhile
      CHECK(vm.here.written() == then);
      CHECK(vm.running == 0);
      vm.followed->proceed();
    });
    vm.go({.pause_before_switchover = true});
    other.join();
    vm.check_completed();
    CHECK(without_rounds(vm.followed.said()) == "setup active pre-switchover device completed");
  }
  {
    Migrated vm;
    std::thread other([&] {
      CHECK(eventually([&] { return vm.followed->progress().status == MigrationStatus::pre_switchover; }));
      vm.followed->cancel();
    });
    vm.go({.pause_before_switchover = true});
    other.join();
    CHECK_MESSAGE(code_of(vm.tried.sent) == Errc::cancelled, text(vm.tried.sent));
    CHECK(without_rounds(vm.followed.said()) == "setup active pre-switchover cancelling cancelled");
    vm.check_runs_on();
  }
  {  // the destination gives up meanwhile
    Migrated vm;
    std::thread other([&] {
      CHECK(eventually([&] { return vm.followed->progress().status == MigrationStatus::pre_switchover; }));
      vm.there.followed->cancel();
    });
    vm.go({.pause_before_switchover = true});
    other.join();
    CHECK_MESSAGE(code_of(vm.tried.sent) == Errc::peer_gave_up, text(vm.tried.sent));
    CHECK(without_rounds(vm.followed.said()) == "setup active pre-switchover failed");
    vm.check_runs_on();
  }
  Migrated vm;
  vm.followed->proceed();  // ahead of it: no wait
  vm.go({.pause_before_switchover = true});
  vm.check_completed();
}

TEST_CASE("The switchover on demand, of a guest that never converges") {
  const Watchdog watchdog("switchover on demand");
  Migrated vm;
  std::thread other([&] {
    CHECK(eventually([&] { return vm.followed->rounds().size() >= 3; }));
    vm.followed->switch_over();
  });
  vm.go({.converge = {.rule = Never{}}});
  other.join();
  vm.check_completed();
  CHECK(vm.tried.sent->switchover.reason == Reason::switchover_asked);
}

TEST_CASE("The cap is taken off while it runs") {
  const Watchdog watchdog("set_bandwidth");
  Migrated vm;
  std::thread other([&] {
    CHECK(eventually([&] { return vm.followed->progress().status == MigrationStatus::active; }));
    vm.followed->set_bandwidth(0);
  });
  vm.go({.zero_pages = "none", .bandwidth = 1000, .progress_timeout = 50s});  // half an hour
  other.join();
  vm.check_completed();
  // And a cap that was set before there were channels.
  Migrated again;
  again.followed->set_bandwidth(0);
  again.go({.zero_pages = "none", .bandwidth = 1000, .progress_timeout = 50s});
  again.check_completed();
}

TEST_CASE("What happens at the time limit, and at the last round that is allowed") {
  const Watchdog watchdog("limits");
  for (const bool by_time : {true, false}) {
    CAPTURE(by_time);
    const std::chrono::milliseconds limit = by_time ? 30ms : 0ms;
    const std::uint64_t most = by_time ? 0 : 4;
    const Reason reason = by_time ? Reason::time_limit : Reason::rounds_used_up;
    Migrated gives_up;
    gives_up.go(
        {.converge = {.rule = Never{}, .time_limit = limit, .at_time_limit = Action::give_up, .max_rounds = most}});
    CHECK_MESSAGE(code_of(gives_up.tried.sent) == Errc::did_not_converge, text(gives_up.tried.sent));
    CHECK_MESSAGE(code_of(gives_up.tried.taken) == Errc::peer_gave_up, text(gives_up.tried.taken));
    CHECK_MESSAGE(text(gives_up.tried.taken).contains(to_string(reason)), text(gives_up.tried.taken));
    gives_up.check_runs_on();
    Migrated switches;
    switches.go(
        {.converge = {.rule = Never{}, .time_limit = limit, .at_time_limit = Action::switch_now, .max_rounds = most}});
    switches.check_completed();
    CHECK(switches.tried.sent->switchover.reason == reason);
    if (!by_time) CHECK(switches.tried.sent->rounds.size() == most + 1);
  }
}

TEST_CASE("The time limit passes inside the bulk pass: what has not gone out goes with the guest stopped") {
  const Watchdog watchdog("a late bulk pass");
  Migrated vm(32, Writes::numbers, 8192);
  vm.go({.channels = 1,
         .zero_pages = "none",
         .converge = {.rule = Never{}, .time_limit = 1ms, .at_time_limit = Action::switch_now},
         .verify = Verify::required,
         .rearm_pages = 64});
  vm.check_completed();
  CHECK(vm.tried.sent->rounds.size() == 2);
  CHECK(vm.tried.sent->pages_verified == 8192);
  CHECK(vm.tried.sent->rounds[0].dirty_pages < 8192);
}

TEST_CASE("The throttle goes up with the rounds, and is off at the end, whatever the end is") {
  const Watchdog watchdog("throttle");
  Migrated vm;
  vm.go({.converge = {.rule = FixedRounds(5), .throttle = MoreEachRound{}}});
  vm.check_completed();
  // A guest that had nothing dirty at a round's end was stopped there.
  if (vm.tried.sent->rounds.size() > 3) CHECK(vm.here.most_throttled() >= 10);
  Migrated fails;
  fails.go({.converge = {.rule = Never{}, .throttle = MoreEachRound{}, .max_rounds = 6}});
  CHECK(code_of(fails.tried.sent) == Errc::did_not_converge);
  CHECK(fails.here.most_throttled() == 50);
  fails.check_runs_on();
}

TEST_CASE("The unchanged-page filter leaves out what was written and is the same, and nothing else") {
  const Watchdog watchdog("skip_unchanged");
  for (const Writes writes : {Writes::equal, Writes::a_b_a, Writes::numbers})
    for (const char* zero_pages : {"none", "legacy", "multifd"}) {
      // Under a cap the bulk pass keeps hashes, too.
      const bool capped = std::string_view(zero_pages) == "multifd";
      CAPTURE(static_cast<int>(writes));
      CAPTURE(zero_pages);
      Migrated vm(48, writes);
      CHECK(eventually([&] { return vm.here.written() > 100; }));  // each page has its value
      vm.go({.zero_pages = zero_pages,
             .bandwidth = capped ? 500'000'000u : 0u,
             .converge = {.rule = Never{}, .at_time_limit = Action::switch_now, .max_rounds = 12},
             .verify = Verify::required,
             .skip_unchanged = true});
      vm.check_completed();
      vm.check_same_memory();
      std::uint64_t unchanged = 0, again = 0;
      for (const Round& round : vm.tried.sent->rounds) {
        CHECK(round.normal_pages + round.zero_pages + round.unchanged_pages == round.dirty_pages);
        if (round.number == 0) continue;
        unchanged += round.unchanged_pages;
        again += round.normal_pages + round.zero_pages;
      }
      CHECK(vm.followed->progress().moved.unchanged_pages == unchanged);
      // Where the bulk pass keeps no hashes, each page goes out once more.
      if (writes == Writes::equal) CHECK(again <= (capped ? 0 : 48));
      // A page that is copied between the guest's write and its mark is reported once more, for each time that it is sent. How
      // often the guest's thread is held there is the machine's matter.
      if (writes == Writes::numbers) CHECK(unchanged <= again + 48);
    }
}

TEST_CASE("What the destination's VMM says at the end reaches the source") {
  const Watchdog watchdog("farewell");
  const std::vector<std::byte> words(510, std::byte{'w'});
  Migrated vm(8, Writes::numbers, pages, {.farewell = [&] { return words; }});
  std::vector<std::byte> heard;
  vm.go({.on_user_data = [&](std::span<const std::byte> said) { heard.assign(said.begin(), said.end()); }});
  vm.check_completed();
  CHECK(heard == words);
}
