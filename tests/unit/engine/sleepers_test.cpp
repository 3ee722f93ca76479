// SPDX-License-Identifier: MIT
#include "multifd/engine/sleepers.hpp"

#include <doctest/doctest.h>

#include <set>
#include <thread>
#include <vector>

#include "support/basics.hpp"

using multifd::engine::Signal;
using multifd::engine::Sleepers;
using namespace std::chrono_literals;

namespace {

constexpr auto lie_down = [] { return false; };

Sleepers make_sleepers(unsigned workers) {
  auto signals = Sleepers::allocate(workers);
  REQUIRE(signals.has_value());
  return Sleepers(workers, std::move(*signals));
}

/// Threads that sleep once each, all of them asleep when it is made.
struct Beds {
  explicit Beds(unsigned workers) : sleepers(make_sleepers(workers)), woken(workers) {
    for (unsigned w = 0; w < workers; ++w)
      threads.emplace_back([this, w] { woken[w] = sleepers.sleep(w, Signal::forever, lie_down); });
    while (sleepers.awake() != 0) std::this_thread::yield();
  }
  Sleepers sleepers;
  std::vector<char> woken;
  std::vector<std::jthread> threads;
};

}  // namespace

TEST_CASE("A signal between ticket() and wait() is not lost, and one before does not count") {
  const test::Watchdog limit("waiting for a signal", 60s);
  Signal signal;
  signal.send();
  const auto ticket = signal.ticket();
  CHECK_FALSE(signal.wait(ticket, 1ms));
  signal.send();
  CHECK(signal.wait(ticket, 0ms));
  CHECK(signal.wait(ticket));
}

TEST_CASE("wait() ends no sooner than its limit") {
  const test::Watchdog limit("waiting for nothing", 60s);
  Signal signal;
  const auto began = std::chrono::steady_clock::now();
  CHECK_FALSE(signal.wait(signal.ticket(), 30ms));
  CHECK(std::chrono::steady_clock::now() - began >= 30ms);
}

TEST_CASE("send() wakes a thread that sleeps") {
  const test::Watchdog limit("waking a thread", 60s);
  for (int i = 0; i < 200; ++i) {
    Signal signal;
    const auto ticket = signal.ticket();
    bool woken = false;
    std::jthread thread([&] { woken = signal.wait(ticket); });
    if (i % 2 == 0) std::this_thread::sleep_for(200us);  // likely asleep by then; either way it has to end
    signal.send();
    thread.join();
    CHECK(woken);
  }
}

TEST_CASE("Every worker is awake until it sleeps, and again after the time limit") {
  const test::Watchdog limit("a sleep with a limit", 60s);
  Sleepers sleepers = make_sleepers(255);
  CHECK(sleepers.awake() == 255);
  unsigned seen = 0;
  CHECK_FALSE(sleepers.sleep(254, 1ms, [&] {
    seen = sleepers.awake();
    return false;
  }));
  CHECK(seen == 254);
  CHECK(sleepers.awake() == 255);
  CHECK(sleepers.take_one() == Sleepers::no_worker);
}

TEST_CASE("A worker that finds work once its bit is set does not sleep, unless another thread is about to wake it") {
  const test::Watchdog limit("getting up", 60s);
  Sleepers sleepers = make_sleepers(3);
  CHECK_FALSE(sleepers.sleep(1, Signal::forever, [] { return true; }));
  CHECK(sleepers.awake() == 3);
  // Somebody takes it down meanwhile: then it has to take that wake-up with it.
  CHECK(sleepers.sleep(1, Signal::forever, [&] {
    CHECK(sleepers.take_one() == 1);
    sleepers.wake(1);
    return true;
  }));
  CHECK(sleepers.awake() == 3);
}

TEST_CASE("A wake-up that comes with the end of the time limit is taken, not left for the next sleep") {
  const test::Watchdog limit("a late wake-up", 60s);
  Sleepers sleepers = make_sleepers(1);
  std::jthread late;
  CHECK(sleepers.sleep(0, 1ms, [&] {
    CHECK(sleepers.take_one() == 0);
    late = std::jthread([&] {
      std::this_thread::sleep_for(30ms);
      sleepers.wake(0);
    });
    return false;
  }));
  CHECK_FALSE(sleepers.sleep(0, 100ms, lie_down));
}

TEST_CASE("take_one() gives each sleeper once, take_all() the rest") {
  const test::Watchdog limit("waking 130 workers", 60s);
  Beds beds(130);
  std::set<unsigned> woken;
  for (int i = 0; i < 100; ++i) {
    const unsigned w = beds.sleepers.take_one();
    REQUIRE(w < 130);
    CHECK(woken.insert(w).second);
    beds.sleepers.wake(w);
  }
  CHECK(beds.sleepers.awake() == 100);
  beds.sleepers.take_all([&](unsigned w) {
    CHECK(woken.insert(w).second);
    beds.sleepers.wake(w);
  });
  beds.threads.clear();
  CHECK(woken.size() == 130);
  for (const char each : beds.woken) CHECK(each);
  CHECK(beds.sleepers.awake() == 130);
}
