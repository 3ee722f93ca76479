// SPDX-License-Identifier: MIT
//
// Whole migrations that are cancelled, or lose connections, at moments drawn by lot: at an operation of one of the links,
// of either side, or after some microseconds. Wherever that is: at most one guest runs, and where none does, both sides say
// so. Prints in which state of the source the moments were.
//
// MULTIFD_MOMENTS says how many of each kind; 40 by default, 500 at night.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <thread>

#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 512;

unsigned wanted_moments() { return how_often("MULTIFD_MOMENTS", quick() ? 15 : 40); }

/// What differs between two migrations.
struct Settings {
  unsigned channels;
  const char* compression;
  const char* zero_pages;
  bool verify;
  std::size_t working_set;

  explicit Settings(Rng& rng)
      : channels(static_cast<unsigned>(1 + below(rng, 3))),
        compression(below(rng, 3) == 0 ? "zlib" : "none"),
        zero_pages(std::array{"none", "legacy", "multifd"}[below(rng, 3)]),
        verify(below(rng, 2) == 0),
        working_set(std::array<std::size_t, 3>{0, 8, 64}[below(rng, 3)]) {}

  SourceOptions options() const {
    return {.channels = channels,
            .compression = compression,
            .zero_pages = zero_pages,
            .converge = {.at_time_limit = Action::switch_now, .max_rounds = 6},
            .verify = verify ? Verify::required : Verify::off,
            .answer_timeout = 10s,
            .progress_timeout = 10s,
            .load_timeout = 10s};
  }
};

DestinationOptions patient_destination() {
  return {.accept_timeout = 5s,
          .retry_timeout = 50ms,
          .progress_timeout = 10s,
          .save_timeout = 10s,
          .hand_over_timeout = 10s};
}

/// Both sides of a migration, and the guest that may run once.
struct Sides {
  explicit Sides(const Settings& settings) : here(pages), there(pages, patient_destination()) {
    here.running_guests = there.guest.running_guests = &running;
    here.boot();
    here.run(settings.working_set, 50us);
  }
  std::atomic<int> running = 0;
  MigratingGuest here;
  Followed followed;
  There there;
};

struct Measured {
  std::uint64_t operations;
  std::chrono::microseconds time;
};

/// The same migration without a disturbance.
Measured measure(const Settings& settings) {
  Sides sides(settings);
  Script script(sides.there.address.port);
  const auto began = std::chrono::steady_clock::now();
  const Tried tried = migrate_once(sides.here, sides.followed, sides.there, settings.options());
  REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
  REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
  CHECK(sides.there.guest.torn_when_resumed == 0);
  return {script.operations(),
          std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - began)};
}

/// Anywhere; every other one in the last tenth, where the guest changes hands.
std::uint64_t moment(Rng& rng, std::uint64_t end) {
  return below(rng, 2) == 0 ? below(rng, end + end / 20 + 2) : end - std::min(end, below(rng, end / 10 + 20));
}

/// What holds after every migration, whatever came of it.
void check_one_guest(Sides& sides, const Tried& tried) {
  CHECK_FALSE(sides.here.ran_beside);
  CHECK_FALSE(sides.there.guest.ran_beside);
  CHECK_FALSE((sides.here.runs() && sides.there.guest.runs()));
  CHECK_FALSE(sides.here.logging());
  CHECK(sides.here.throttled() == 0);
  CHECK(is_end(sides.followed->progress().status));
  CHECK(is_end(sides.there.followed->progress().status));
  CHECK(sides.there.guest.runs() == tried.taken.has_value());
  if (tried.sent) CHECK(sides.there.guest.runs());
  if (sides.there.guest.runs()) CHECK(sides.there.guest.torn_when_resumed == 0);
  CHECK(sides.here.runs() == (sides.followed->owner() == Owner::source));
  if (sides.here.runs()) {
    const std::uint64_t then = sides.here.written();
    if (sides.here.works()) CHECK(eventually([&] { return sides.here.written() > then; }));
    CHECK(sides.followed->owner_text().contains("runs there"));
    CHECK(sides.there.followed->owner() == Owner::source);
  }
  if (!sides.here.runs() && !sides.there.guest.runs()) {
    CHECK(sides.followed->owner() == Owner::unknown);
    CHECK(sides.followed->owner_text().contains("look there"));
    CHECK(sides.there.followed->owner_text().contains("all of the guest has arrived"));
  }
}

/// How often something was.
using Counts = std::map<std::string, unsigned>;
std::string shown(const Counts& counts) {
  std::string text;
  for (const auto& [what, count] : counts) text += (text.empty() ? "" : ", ") + what + " " + std::to_string(count);
  return text;
}

}  // namespace

TEST_CASE(
    "Cancelled at any moment by either side: the guest runs on at the source, or elsewhere if it was handed over") {
  const unsigned moments = wanted_moments();
  const Watchdog watchdog("cancels at random moments", std::chrono::seconds(120 + 2 * moments));
  Rng rng(seed());
  INFO("seed ", seed());
  Counts states, ends;
  unsigned late = 0;
  std::chrono::milliseconds longest{0};
  const Leftovers leftovers;
  for (unsigned i = 0; i < moments; ++i) {
    CAPTURE(i);
    const Settings settings(rng);
    const bool at_source = below(rng, 2) == 0, by_time = below(rng, 4) == 0;
    CAPTURE(at_source);
    const Measured good = measure(settings);
    {
      Sides sides(settings);
      Followed& cancelled = at_source ? sides.followed : sides.there.followed;
      std::atomic<MigrationStatus> state = MigrationStatus::completed;  // of the source, when it was cancelled
      std::atomic<std::chrono::steady_clock::time_point> asked{};
      const auto cancel = [&] {
        state = sides.followed->progress().status;
        asked = std::chrono::steady_clock::now();
        cancelled->cancel();
      };
      Script script(sides.there.address.port, by_time ? Script::never : moment(rng, good.operations), cancel);
      std::thread other;
      if (by_time)
        other = std::thread([&, delay = below(rng, static_cast<std::size_t>(good.time.count()))] {
          std::this_thread::sleep_for(std::chrono::microseconds(delay));
          cancel();
        });
      const Tried tried = migrate_once(sides.here, sides.followed, sides.there, settings.options());
      const auto now = std::chrono::steady_clock::now();
      if (other.joinable()) other.join();
      if (const auto then = asked.load(); then != std::chrono::steady_clock::time_point{}) {
        const auto joined = std::chrono::duration_cast<std::chrono::milliseconds>(now - then);
        longest = std::max(longest, joined);
        late += joined > 1s;
        CHECK(joined < no_hang);
      }
      CAPTURE(text(tried.sent));
      CAPTURE(text(tried.taken));
      CAPTURE(sides.followed.said());
      CAPTURE(sides.there.followed.said());
      check_one_guest(sides, tried);
      // Nothing is lost, so somebody runs it, and both know who.
      CHECK(sides.here.runs() != sides.there.guest.runs());
      CHECK(tried.sent.has_value() == sides.there.guest.runs());
      if (!tried.sent && at_source) CHECK_MESSAGE(tried.sent.error().code == Errc::cancelled, text(tried.sent));
      if (!tried.sent && at_source) CHECK(sides.followed.said().ends_with("cancelling cancelled"));
      ++states[asked.load() == std::chrono::steady_clock::time_point{} ? "after" : to_string(state.load())];
      ++ends[tried.sent ? "completed" : "runs on"];
    }
    CHECK(leftovers.no_thread());
    CHECK(leftovers.no_descriptor());
  }
  MESSAGE(moments, " cancels; the source was in: ", shown(states), "; the guest: ", shown(ends),
          "; longest until both were back ", longest.count(), " ms, over 1 s: ", late);
}

TEST_CASE("Connections lost at any moment: one guest runs, or none, and both sides say where it is") {
  const unsigned moments = wanted_moments();
  const Watchdog watchdog("losses at random moments", std::chrono::seconds(120 + 2 * moments));
  Rng rng(seed() + 1);
  INFO("seed ", seed());
  Counts states, ends;
  const Leftovers leftovers;
  for (unsigned i = 0; i < moments; ++i) {
    CAPTURE(i);
    const Settings settings(rng);
    const bool reset = below(rng, 2) == 0;
    const auto lost = below(rng, 3);  // the main connection, a channel, all
    std::optional<unsigned> number;
    if (lost == 0) number = 0;
    if (lost == 1) number = static_cast<unsigned>(1 + below(rng, settings.channels));
    CAPTURE(reset);
    CAPTURE(lost);
    const Measured good = measure(settings);
    {
      Sides sides(settings);
      std::atomic<MigrationStatus> state = MigrationStatus::none;
      Script* running = nullptr;
      const auto lose = [&] {
        state = sides.followed->progress().status;
        running->break_links(number, reset);
      };
      Script script(sides.there.address.port, moment(rng, good.operations), lose);
      running = &script;
      const Tried tried = migrate_once(sides.here, sides.followed, sides.there, settings.options());
      CAPTURE(text(tried.sent));
      CAPTURE(text(tried.taken));
      CAPTURE(sides.followed.said());
      CAPTURE(sides.there.followed.said());
      CAPTURE(to_string(state.load()));
      CAPTURE(sides.followed->owner_text());
      CAPTURE(sides.there.followed->owner_text());
      check_one_guest(sides, tried);
      ++states[state.load() == MigrationStatus::none ? "after" : to_string(state.load())];
      ++ends[sides.here.runs() ? "at the source"
             : sides.there.guest.runs()
                 ? (tried.sent ? "at the destination" : "at the destination, the source does not know")
                 : "nowhere, and both say so"];
    }
    CHECK(leftovers.no_thread());
    CHECK(leftovers.no_descriptor());
  }
  MESSAGE(moments, " losses; the source was in: ", shown(states), "; the guest runs: ", shown(ends));
}

TEST_CASE(
    "Each write of the source's main connection arrives, and is said to have failed: the guest does not run twice") {
  const Watchdog watchdog("writes that are said to have failed");
  Counts ends;
  bool hit = true;
  std::uint64_t at = 0;
  for (; hit; ++at) {
    CAPTURE(at);
    REQUIRE(at < 1000);
    Rng rng(seed());
    const Settings settings(rng);
    Sides sides(settings);
    hit = false;
    Script* running = nullptr;
    Script script = Script::behind_write(sides.there.address.port, at, [&] {
      hit = true;
      running->break_links(0, false);
    });
    running = &script;
    const Tried tried = migrate_once(sides.here, sides.followed, sides.there, settings.options());
    CAPTURE(text(tried.sent));
    CAPTURE(text(tried.taken));
    check_one_guest(sides, tried);
    ++ends[sides.here.runs() ? "at the source" : sides.there.guest.runs() ? "at the destination" : "nowhere"];
  }
  CHECK(at > 5);
  MESSAGE((at - 1), " writes; the guest runs: ", shown(ends));
}
