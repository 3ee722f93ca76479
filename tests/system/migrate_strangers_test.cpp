// SPDX-License-Identifier: MIT
//
// A migration's port that others find, too: silent connections, port scanners, QEMUs, tries that were given up. They are
// closed and reported, and the source that comes is taken. How connections are told apart: unit/qemu/accept_source_test.cpp.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "support/leftovers.hpp"
#include "support/migrate_ends.hpp"
#include "support/source_by_hand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 256;

/// What a destination has said of strangers.
struct Strangers {
  std::function<void(const char*)> hook() {
    return [this](const char* why) {
      const std::scoped_lock lock(mutex);
      said.push_back(why);
    };
  }
  bool has(std::string_view part) const {
    const std::scoped_lock lock(mutex);
    return std::ranges::any_of(said, [&](const std::string& each) { return each.contains(part); });
  }
  mutable std::mutex mutex;
  std::vector<std::string> said;
};

/// A real source comes, and its guest goes on here.
void check_taken(There& there) {
  MigratingGuest here(pages);
  here.boot();
  here.run(16, 50us);
  Followed followed;
  const auto sent =
      send_guest(here, there.address, {.channels = 2, .verify = Verify::required, .migration = &*followed.handle});
  const auto taken = there.result();
  REQUIRE_MESSAGE(sent.has_value(), text(sent));
  REQUIRE_MESSAGE(taken.has_value(), text(taken));
  CHECK(there.guest.runs());
  CHECK(there.guest.torn_when_resumed == 0);
}

}  // namespace

TEST_CASE("Whoever else connects ahead of the source is closed and reported, and the source is taken") {
  const Watchdog watchdog("strangers");
  const Leftovers leftovers;
  {
    Strangers strangers;
    There there(pages, {.on_stranger = strangers.hook()});
    there.begin();
    std::vector<FdTransport> others;
    for (const std::string_view said :
         {"", "GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02", "QE", "\x11\x22", "SSH-2.0-x\r\n"}) {
      others.push_back(connect_by_hand(there.address));
      if (!said.empty()) say(others.back(), said);
    }
    {
      const FdTransport gone = connect_by_hand(there.address);
    }
    CHECK(eventually([&] { return strangers.has("no migration's"); }));
    check_taken(there);
    // The listener is gone, and with it who was silent.
    for (FdTransport& other : others) check_link_closed(other);
  }
  CHECK(leftovers.no_thread());
  CHECK(leftovers.no_descriptor());
}

TEST_CASE("A QEMU's stream is told apart, and the next source is taken") {
  const Watchdog watchdog("a QEMU source");
  Strangers strangers;
  There there(pages, {.on_stranger = strangers.hook()});
  there.begin();
  {
    SourceByHand qemu(there.address, 0);
    qemu.begin();
    qemu.start_ram(pages);
    CHECK(eventually([&] { return strangers.has("no migrate_to()"); }));
  }
  check_taken(there);
}

TEST_CASE("A main connection that says nonsense is no source") {
  const Watchdog watchdog("a main connection of nonsense");
  Strangers strangers;
  There there(pages, {.on_stranger = strangers.hook()});
  there.begin();
  FdTransport nonsense = connect_by_hand(there.address);
  say(nonsense, "QEVM and then something else");
  check_link_closed(nonsense);
  CHECK(eventually([&] { return strangers.has("no migration's"); }));
  check_taken(there);
}

TEST_CASE("A first try that gave up at any step of the setup is dropped, and the next one is taken") {
  const Watchdog watchdog("a first try");
  for (const int step : {0, 1, 2, 3}) {
    CAPTURE(step);
    Strangers strangers;
    There there(pages, {.retry_timeout = no_hang, .on_stranger = strangers.hook()});
    there.begin();
    {
      SourceByHand first(there.address, step == 3 ? 1 : 2, std::byte{7});
      if (step >= 1) first.ask();
      if (step >= 2) first.announce(pages, {}, {}, step == 3 ? 2 : 3);  // one channel is missing
    }
    check_taken(there);
  }
}

TEST_CASE("A source that gave up, and does not come again, is not waited for") {
  const Watchdog watchdog("no next try");
  There there(pages, {.retry_timeout = 20ms});
  there.begin();
  {
    SourceByHand first(there.address, 1);
    first.ask();
  }
  const auto taken = there.result();
  CHECK_MESSAGE(taken.error().code == Condition::peer_gone, text(taken));
  CHECK(there.followed.said() == "setup failed");
  CHECK(there.followed->owner() == Owner::source);
}

TEST_CASE("The error names what is missing at the time limit") {
  const Watchdog watchdog("something is missing");
  {
    There there(pages, {.first_timeout = 20ms});
    there.begin();
    CHECK(text(there.result()).contains("no source came"));
  }
  {
    There there(pages, {.accept_timeout = 100ms});
    there.begin();
    SourceByHand source(there.address, 2);
    source.begin();
    CHECK(text(there.result()).contains("did not say its settings"));
  }
  {
    There there(pages, {.accept_timeout = 100ms});
    there.begin();
    FdTransport channel = connect_by_hand(there.address);
    say(channel, std::span<const std::byte>(RawStream().hello(0).bytes()));
    CHECK(text(there.result()).contains("the main connection did not"));
  }
  {
    There there(pages, {.accept_timeout = 500ms});
    there.begin();
    SourceByHand source(there.address, 1);
    source.ask();
    source.announce(pages, {}, {}, 2);
    const std::string said = source.failure();
    CHECK_MESSAGE(said.contains("not all channels"), said);
    CHECK(text(there.result()) == said);
  }
}

TEST_CASE("A channel more than announced ends both sides, with a text") {
  const Watchdog watchdog("a surplus channel");
  There there(pages, {.accept_timeout = no_hang});
  there.begin();
  SourceByHand source(there.address, 3);
  source.ask();
  // One that comes behind the others finds a source that is whole already.
  REQUIRE(eventually([&] { return there.followed->progress().connected == 3; }));
  source.announce(pages, {}, {}, 2);
  const std::string said = source.failure();
  CHECK_MESSAGE(said.contains("channel"), said);
  const auto taken = there.result();
  CHECK_MESSAGE(code_of(taken) == Errc::too_many_channels, text(taken));
  CHECK(text(taken) == said);
}

TEST_CASE("Strangers that come while pages travel disturb nobody") {
  const Watchdog watchdog("strangers in the middle");
  There there(pages);
  there.begin();
  MigratingGuest here(pages);
  here.boot();
  here.run(16, 50us);
  Followed followed;
  std::vector<FdTransport> others;
  const auto on_event = [&](const Event& event) {
    if (event.kind != EventKind::round_end) return;
    for (const std::string_view said : {"", "GET / HTTP/1.1\r\n\r\n", "QEVM"}) {
      others.push_back(connect_by_hand(there.address));
      if (!said.empty()) say(others.back(), said);
    }
    others.push_back(connect_by_hand(there.address));
    say(others.back(), std::span<const std::byte>(RawStream().hello(0).bytes()));
  };
  const auto sent =
      send_guest(here, there.address,
                 {.channels = 2, .verify = Verify::required, .on_event = on_event, .migration = &*followed.handle});
  const auto taken = there.result();
  REQUIRE_MESSAGE(sent.has_value(), text(sent));
  REQUIRE_MESSAGE(taken.has_value(), text(taken));
  CHECK(there.guest.torn_when_resumed == 0);
  CHECK_FALSE(others.empty());
  for (FdTransport& other : others) check_link_closed(other);
}
