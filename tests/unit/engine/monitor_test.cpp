// SPDX-License-Identifier: MIT
#include "multifd/engine/monitor.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "support/basics.hpp"

using multifd::engine::Monitor;
using namespace std::chrono_literals;

TEST_CASE("A wait ends although the notification is lost, as glibc can lose one") {
  const test::Watchdog watchdog("a lost notification");
  Monitor monitor;
  std::atomic<bool> ready{false};
  std::atomic<int> waiting{0};
  const auto look = [&] {  // called under the lock, before each wait
    ++waiting;
    return ready.load();
  };
  bool in_time = false;
  std::jthread for_ever([&] {
    Monitor::Lock held = monitor.lock();
    monitor.wait(held, look);
  });
  std::jthread until([&] {
    Monitor::Lock held = monitor.lock();
    in_time = monitor.wait_until(held, std::chrono::steady_clock::now() + 1h, look);
  });
  while (waiting < 2) std::this_thread::yield();
  {
    const Monitor::Lock both_wait = monitor.lock();
  }
  ready = true;  // and nobody notifies
  for_ever.join();
  until.join();
  CHECK(in_time);
}

TEST_CASE("A wait until a time ends then, stop() ends every wait") {
  const test::Watchdog watchdog("an end of a wait");
  Monitor monitor;
  const auto never = [] { return false; };
  Monitor::Lock held = monitor.lock();
  for (const std::chrono::milliseconds limit : {0ms, 20ms, 600ms}) {  // 600: more than one slice
    const auto until = std::chrono::steady_clock::now() + limit;
    CHECK_FALSE(monitor.wait_until(held, until, never));
    CHECK(std::chrono::steady_clock::now() >= until);
  }
  held.unlock();
  std::jthread stopper([&] { monitor.stop(); });
  held.lock();
  monitor.wait(held, never);
  CHECK(monitor.wait_until(held, std::chrono::steady_clock::now() + 1h, never));
  CHECK(monitor.stopped(held));
}
