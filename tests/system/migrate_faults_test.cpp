// SPDX-License-Identifier: MIT
//
// A guest's function fails: the migration comes to nothing, both sides say why, and the guest runs on at the source, as
// fast as before.
#include <doctest/doctest.h>

#include <string>
#include <string_view>

#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 512;

struct Fault {
  std::string call;
  bool at_source;
  unsigned number = 1;
};

/// One migration of a guest that runs, in which a call of one side fails.
void fail_once(const Fault& fault) {
  CAPTURE(fault.call);
  CAPTURE(fault.number);
  CAPTURE(fault.at_source);
  const Watchdog watchdog("a call of the guest's that fails");
  std::atomic<int> running = 0;
  MigratingGuest here(pages);
  Followed followed;
  {
    const Leftovers leftovers;
    There there(pages);
    here.running_guests = there.guest.running_guests = &running;
    here.boot();
    (fault.at_source ? here : there.guest).fail_in(fault.call, fault.number);
    here.run(32, 50us);
    // Eight chunks in the first round: so many calls of rearm() there are, whatever the guest does.
    const Tried tried = migrate_once(here, followed, there, {.channels = 2, .rearm_pages = pages / 8});
    REQUIRE_FALSE(tried.sent.has_value());
    REQUIRE_FALSE(tried.taken.has_value());
    const std::string at_source = text(tried.sent), at_destination = text(tried.taken);
    // ram() is called before a byte has travelled: the destination has not met this source.
    if (fault.call != "ram") CHECK_MESSAGE(at_destination.contains("the test's fault"), at_destination);
    CHECK_MESSAGE(at_source.contains("the test's fault"), at_source);
    CHECK_FALSE(there.guest.runs());
    CHECK(there.followed->owner() == Owner::source);
    CHECK(there.followed->progress().status ==
          (fault.call == "ram" ? MigrationStatus::cancelled : MigrationStatus::failed));
    CHECK_FALSE(there.followed->owner_text().empty());
  }
  CHECK(here.runs());
  CHECK_FALSE(here.ran_beside);
  CHECK_FALSE(here.logging());
  CHECK(here.throttled() == 0);
  CHECK(followed->progress().status == MigrationStatus::failed);
  CHECK(followed->owner() == Owner::source);
  CHECK(followed->owner_text().contains("runs there"));
  const std::uint64_t then = here.written();
  CHECK(eventually([&] { return here.written() > then; }));
  here.stop();
  CHECK(here.torn() == 0);
}

}  // namespace

TEST_CASE("A call of the source's guest fails: it runs on there, and both sides know why") {
  const Leftovers leftovers;
  for (const Fault& fault : {Fault{"ram", true}, Fault{"dirty.start", true}, Fault{"dirty.rearm", true},
                             Fault{"dirty.rearm", true, 3}, Fault{"dirty.fetch", true}, Fault{"dirty.fetch", true, 2},
                             Fault{"pause", true}, Fault{"save", true}, Fault{"save.disk", true}})
    fail_once(fault);
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

TEST_CASE("A call of the destination's guest fails: it runs on at the source, and both sides know why") {
  const Leftovers leftovers;
  for (const Fault& fault : {Fault{"prepare", false}, Fault{"load", false}, Fault{"load", false},
                             Fault{"load.end", false}, Fault{"resume", false}})
    fail_once(fault);
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

TEST_CASE("The last fetch fails, with the guest stopped") {
  // How many fetches there are is the guest's doing: the last one is counted in a migration of the same guest.
  const Watchdog watchdog("the last fetch");
  MigratingGuest here(pages);
  here.boot();
  here.run(0);
  Followed followed;
  There there(pages);
  const Tried good = migrate_once(here, followed, there, {.channels = 1});
  REQUIRE_MESSAGE(good.sent.has_value(), text(good.sent));
  there.guest.stop();
  MigratingGuest again(pages);
  again.boot();
  again.run(0);
  again.fail_in("dirty.fetch", here.fetched());
  Followed second;
  There other(pages);
  const Tried tried = migrate_once(again, second, other, {.channels = 1});
  CHECK_MESSAGE(text(tried.sent).contains("the test's fault"), text(tried.sent));
  CHECK_MESSAGE(text(tried.taken).contains("the test's fault"), text(tried.taken));
  CHECK(second.said().ends_with("device failed"));
  CHECK(again.runs());
  CHECK_FALSE(again.logging());
}

TEST_CASE("A dirty source that cannot be stopped harms nobody") {
  const Watchdog watchdog("dirty.stop");
  MigratingGuest here(pages);
  here.fail_in("dirty.stop");
  here.run(16, 50us);
  Followed followed;
  There there(pages);
  const Tried tried = migrate_once(here, followed, there);
  CHECK_MESSAGE(tried.sent.has_value(), text(tried.sent));
  CHECK_MESSAGE(tried.taken.has_value(), text(tried.taken));
  CHECK(there.guest.runs());
  CHECK(there.guest.torn_when_resumed == 0);
}

TEST_CASE("load() that does not read up to the end is told so, at both ends") {
  const Watchdog watchdog("load that does not read");
  MigratingGuest here(pages);
  here.run(16, 50us);
  Followed followed;
  There there(pages);
  there.guest.fail_in("load.unread", 2);
  const Tried tried = migrate_once(here, followed, there);
  CHECK_MESSAGE(text(tried.taken).contains("has not read all devices"), text(tried.taken));
  CHECK_MESSAGE(text(tried.sent).contains("has not read all devices"), text(tried.sent));
  CHECK(here.runs());
  CHECK_FALSE(there.guest.runs());
}

TEST_CASE("A guest that cannot be resumed at the source stands still there, and the handle says why") {
  const Watchdog watchdog("resume at the source");
  MigratingGuest here(pages);
  here.run(16, 50us);
  here.fail_in("save");
  here.fail_in("resume");
  Followed followed;
  There there(pages);
  const Tried tried = migrate_once(here, followed, there);
  CHECK_MESSAGE(text(tried.sent).contains("save"), text(tried.sent));
  REQUIRE(followed->not_resumed().has_value());
  CHECK(text(*followed->not_resumed()).contains("resume"));
  CHECK_FALSE(here.runs());
  CHECK_FALSE(there.guest.runs());
  CHECK(followed->owner() == Owner::source);
  CHECK_FALSE(here.logging());
  // The next try is the VMM's.
  CHECK(here.resume().has_value());
}
