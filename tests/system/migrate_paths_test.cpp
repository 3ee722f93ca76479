// SPDX-License-Identifier: MIT
//
// Migrations whose connections are lost on the way, at any moment, and return (format/extension.md section 19.10).
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/closed_port.hpp"
#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 512;
constexpr std::size_t working_set = 32;

struct Breaking {
  std::optional<unsigned> link;  ///< 0: the main connection; none: all
  bool reset = true;
};

/// Checks that the guest runs there, whole.
void check_arrived(MigratingGuest& here, There& there, const Tried& tried) {
  REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
  REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
  CHECK_FALSE(here.runs());
  CHECK(there.guest.runs());
  CHECK(there.guest.torn_when_resumed == 0);
  there.guest.stop();
  const auto behind = [](MigratingGuest& guest) { return guest.memory().subspan(working_set * 4096); };
  CHECK(first_difference(behind(here), behind(there.guest)) == behind(here).size());
}

/// A migration of a guest that runs, whose connections break at one operation. Returns how many operations there were.
std::uint64_t migrate_with(std::uint64_t at, Breaking how, SourceOptions options) {
  CAPTURE(at);
  CAPTURE(how.link.value_or(999));
  CAPTURE(how.reset);
  const Watchdog watchdog("a connection that returns");
  options.resume.enabled = true;
  options.channels = 2;
  options.rearm_pages = 64;
  MigratingGuest here(pages);
  There there(pages, {.retry_timeout = 300ms});
  here.boot();
  here.run(working_set, 50us);
  Followed followed;
  Script* running = nullptr;
  Script script(there.address.port, at, [&] { running->break_links(how.link, how.reset); });
  running = &script;
  const Tried tried = migrate_once(here, followed, there, std::move(options));
  if (!tried.sent && followed.said() == "setup failed") {
    // It has not read ACCEPTED: as without connections that return.
    CHECK_FALSE(tried.taken.has_value());
    CHECK(here.runs());
    CHECK_FALSE(there.guest.runs());
    return script.operations();
  }
  check_arrived(here, there, tried);
  return script.operations();
}

/// A guest that runs, a destination, and a network between them that can fail as a whole.
class Outage {
 public:
  explicit Outage(DestinationOptions options = {.resume = {.timeout = 20s}})
      : there(pages, std::move(options)), script_(there.address.port) {
    here.boot();
    here.run(working_set, 50us);
  }

  /// Sends the guest over two paths of one channel each, with a cap, so that it takes a while. `while_it_runs()` is called by
  /// another thread once pages travel, and that it has returned is waited for.
  Tried migrate(SourceOptions options, const std::function<void()>& while_it_runs = {}) {
    const Path path{.local = "127.0.0.1", .remote = there.address, .channels = 1, .bandwidth = 2'000'000};
    const std::vector<Path> paths{path, path};
    options.resume.enabled = true;
    std::thread other([&] {
      if (!while_it_runs) return;
      if (eventually([&] { return followed->progress().moved.wire_bytes > 200'000; })) while_it_runs();
    });
    const Tried tried = migrate_once(here, followed, there, std::move(options), [&](const SourceOptions& all) {
      return send_guest(here, paths, all, [this]() -> Result<void> {
        if (down == 0) return {};
        ++refused;
        return fail_errno(Stage::connect, "the test's network", down);
      });
    });
    other.join();
    return tried;
  }
  /// Breaks all connections; new ones fail with that errno.
  void fail(int error) {
    down = error;
    script_.break_links(std::nullopt, true);
  }
  void check_stays(const Tried& tried) {
    CHECK_FALSE(tried.sent.has_value());
    CHECK_FALSE(tried.taken.has_value());
    CHECK(here.runs());
    CHECK_FALSE(here.logging());
    CHECK_FALSE(there.guest.runs());
    CHECK(followed->owner() == Owner::source);
  }

  MigratingGuest here{pages};
  There there;
  Followed followed;
  std::atomic<int> down = 0;
  std::atomic<unsigned> refused = 0;

 private:
  Script script_;
};

}  // namespace

TEST_CASE("No connection is left for a while: the migration pauses, and goes on by itself") {
  const Watchdog watchdog("an outage");
  Outage outage;
  std::vector<std::string> events;
  std::mutex mutex;
  const Tried tried = outage.migrate({.on_path =
                                          [&](const PathEvent& event) {
                                            const std::lock_guard held(mutex);
                                            events.push_back(std::string(event.main ? "main" : "channel") +
                                                             (event.lost != nullptr ? " lost" : " back"));
                                          }},
                                     [&] {
                                       outage.fail(EHOSTUNREACH);
                                       CHECK(eventually([&] { return outage.followed->progress().lost.paused; }));
                                       CHECK(outage.here.runs());
                                       const unsigned tries = outage.refused;
                                       CHECK(eventually([&] { return outage.refused > tries + 2; }));
                                       outage.down = 0;
                                     });
  check_arrived(outage.here, outage.there, tried);
  const LostConnections lost = outage.followed->progress().lost;
  CHECK(lost.away == 0);
  CHECK_FALSE(lost.paused);
  CHECK(lost.times >= 2);
  CHECK(std::ranges::count(events, "channel lost") == std::ranges::count(events, "channel back"));
  CHECK(std::ranges::count(events, "main lost") == std::ranges::count(events, "main back"));
  const auto paths = outage.followed->paths();
  REQUIRE(paths.size() == 2);
  for (const PathProgress& path : paths) {
    CHECK(path.channels == 1);
    CHECK(path.connected == 1);
    CHECK(path.lost >= 1);
    CHECK(path.written_bytes > 0);
    CHECK(path.bandwidth == 2'000'000);
  }
}

TEST_CASE("Nothing is tried before Migration::resume() where that is wanted") {
  const Watchdog watchdog("an outage that somebody ends");
  Outage outage;
  const Tried tried = outage.migrate({.resume = {.automatic = false}}, [&] {
    outage.fail(EHOSTUNREACH);
    CHECK(eventually([&] { return outage.followed->progress().lost.paused; }));
    // By itself each of the three would try some six times. One try of each may be under way: it began before the last channel
    // was lost.
    const unsigned tries = outage.refused;
    std::this_thread::sleep_for(1500ms);
    CHECK(outage.refused <= tries + 3);
    CHECK(outage.followed->progress().lost.paused);
    outage.down = 0;
    outage.followed->resume();
  });
  check_arrived(outage.here, outage.there, tried);
}

TEST_CASE("An outage that lasts too long ends the migration, at both ends, and the guest stays") {
  const Watchdog watchdog("a long outage");
  Outage outage({.resume = {.timeout = 400ms}});
  const Tried tried = outage.migrate({.resume = {.timeout = 300ms}}, [&] { outage.fail(EHOSTUNREACH); });
  outage.check_stays(tried);
}

TEST_CASE("A destination that refuses every connection has gone, which is told by that name") {
  const Watchdog watchdog("a destination that has gone");
  Outage outage({.resume = {.timeout = 400ms}});
  const Tried tried = outage.migrate({}, [&] { outage.fail(ECONNREFUSED); });
  outage.check_stays(tried);
  CHECK_MESSAGE(code_of(tried.sent) == Errc::session_lost, text(tried.sent));
}

TEST_CASE("Cancelled while no connection is left: both sides come back soon, and the guest stays") {
  const Watchdog watchdog("cancelled in an outage");
  for (const bool at_source : {true, false}) {
    CAPTURE(at_source);
    Outage outage({.resume = {.timeout = 500ms}});
    const Tried tried = outage.migrate({.resume = {.timeout = 500ms}}, [&] {
      outage.fail(EHOSTUNREACH);
      CHECK(eventually([&] { return outage.followed->progress().lost.paused; }));
      (at_source ? outage.followed : outage.there.followed)->cancel();
    });
    outage.check_stays(tried);
    CHECK(code_of(at_source ? Result<void>(std::unexpected(tried.sent.error()))
                            : Result<void>(std::unexpected(tried.taken.error()))) == Errc::cancelled);
  }
}

TEST_CASE("To a destination that does not want it, or without the option, a lost connection is the end") {
  const Watchdog watchdog("connections that do not return");
  for (const bool at_destination : {true, false}) {
    Outage outage({.resume = {.accepted = !at_destination, .timeout = 400ms}});
    std::atomic<bool> failed = false;
    SourceOptions options;
    const Tried tried = outage.migrate(options, [&] {
      if (at_destination) outage.fail(EHOSTUNREACH);
      failed = true;
    });
    if (at_destination)
      outage.check_stays(tried);
    else
      check_arrived(outage.here, outage.there, tried);
    CHECK(failed);
  }
}

TEST_CASE("Connections that break over and over, of a guest whose pages are hashed, digested and compared") {
  const Watchdog watchdog("many losses", 120s);
  Rng rng(seed());
  for (const bool skip_unchanged : {false, true}) {
    CAPTURE(skip_unchanged);
    MigratingGuest here(pages);
    There there(pages, {.resume = {.timeout = 20s}});
    here.boot();
    here.run(working_set, 50us);
    Followed followed;
    Script script(there.address.port);
    engine::Monitor over;
    std::thread cutter([&] {
      static_cast<void>(eventually([&] { return followed->progress().moved.wire_bytes > 50'000; }));
      auto held = over.lock();
      for (unsigned i = 0; i < 12; ++i) {
        script.break_links(static_cast<unsigned>(below(rng, 3)), below(rng, 2) == 0);
        if (over.wait_until(held, std::chrono::steady_clock::now() + std::chrono::milliseconds(20 + below(rng, 60)),
                            [] { return false; }))
          break;
      }
    });
    const Tried tried = migrate_once(here, followed, there,
                                     {.channels = 2,
                                      .compression = "zlib",
                                      .bandwidth = 2'000'000,
                                      .digest = Digest::on,
                                      .resume = {.enabled = true},
                                      .verify = Verify::required,
                                      .skip_unchanged = skip_unchanged});
    over.stop();
    cutter.join();
    check_arrived(here, there, tried);
    CHECK(tried.sent->pages_verified == pages);
  }
}

TEST_CASE(
    "The main connection is lost while the producer waits for room in the queue: it is looked after all the same") {
  constexpr std::size_t many = 12'000;  // several times what the queue holds
  Rng rng(seed() + 9);
  for (unsigned i = 0; i < (full() ? 30 : 3); ++i) {
    const std::uint64_t at = 200 + below(rng, 500);
    CAPTURE(at);
    const Watchdog watchdog("the main connection alone");
    MigratingGuest here(many);
    There there(many);
    here.boot();
    here.run(working_set, 50us);
    Followed followed;
    Script* running = nullptr;
    Script script(there.address.port, at, [&] { running->break_links(0u, true); });
    running = &script;
    const Tried tried =
        migrate_once(here, followed, there, {.channels = 2, .bandwidth = 60'000'000, .resume = {.enabled = true}});
    check_arrived(here, there, tried);
  }
}

TEST_CASE("A path that does not come up is left out, and refused where all are wanted") {
  const Watchdog watchdog("a path that is down");
  MigratingGuest here(pages);
  There there(pages);
  here.boot();
  here.run(working_set, 50us);
  Followed followed;
  const ClosedPort nobody;
  const std::vector<Path> paths{{.remote = {.host = "127.0.0.1", .port = nobody.port}, .channels = 2},
                                {.remote = there.address, .channels = 1}};
  const auto up = []() -> Result<void> { return {}; };
  const auto refused = send_guest(here, paths, {.insist_on_paths = true}, up);
  CHECK(code_of(refused) == std::errc::connection_refused);
  CHECK(here.runs());
  std::vector<std::size_t> left_out;
  const Tried tried =
      migrate_once(here, followed, there,
                   {.on_path = [&](const PathEvent& event) { left_out.push_back(event.left_out ? event.path : 99); }},
                   [&](const SourceOptions& all) { return send_guest(here, paths, all, up); });
  check_arrived(here, there, tried);
  CHECK(left_out == std::vector<std::size_t>{0});
  CHECK(followed->paths().at(0).left_out);
  CHECK(followed->paths().at(0).channels == 0);
  CHECK(followed->paths().at(1).channels == 1);
}

TEST_CASE("A connection breaks at any moment behind ACCEPTED: the guest arrives whole") {
  const bool all = full();
  for (const std::string_view compression : {"none", "zlib"})
    for (const std::string_view zeros : {"none", "legacy", "multifd"}) {
      CAPTURE(compression);
      CAPTURE(zeros);
      const SourceOptions options{.compression = compression, .zero_pages = zeros};
      const std::uint64_t operations = migrate_with(Script::never, {}, options);
      Rng rng(seed());
      for (const Breaking& how :
           {Breaking{0u, true}, {0u, false}, {1u, true}, {2u, true}, {2u, false}, {std::nullopt, true}})
        for (unsigned i = 0; i < (all ? 20 : 1); ++i) migrate_with(60 + below(rng, operations - 60), how, options);
    }
}
