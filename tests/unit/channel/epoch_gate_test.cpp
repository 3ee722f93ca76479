// SPDX-License-Identifier: MIT
#include "multifd/channel/epoch_gate.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

using multifd::EpochGate;
using namespace std::chrono_literals;

namespace {

constexpr auto nothing = [] {};

}  // namespace

TEST_CASE("An epoch is out when every channel has written its SYNC") {
  EpochGate gate(3);
  for (unsigned epoch = 0; epoch < 3; ++epoch)
    for (unsigned channel = 0; channel < 3; ++channel) gate.written(channel);
  CHECK(gate.wait(0, 1h, nothing));
  CHECK(gate.wait(2, 1h, nothing));
}

TEST_CASE("The slowest channel decides, however far the others are") {
  EpochGate gate(2);
  for (int i = 0; i < 5; ++i) gate.written(0);
  gate.written(1);
  CHECK(gate.wait(0, 1h, nothing));
  gate.stop();
  CHECK_FALSE(gate.wait(1, 1h, nothing));  // would have waited: channel 1 owes the second SYNC
}

TEST_CASE("A waiting caller is let through by the last channel, not before") {
  EpochGate gate(2);
  std::atomic<bool> last{false};
  gate.written(0);
  std::jthread worker([&] {
    last = true;
    gate.written(1);
  });
  CHECK(gate.wait(0, 1h, nothing));
  CHECK(last);
}

TEST_CASE("stop() ends the wait, now and later, but an epoch that is out stays out") {
  EpochGate gate(1);
  gate.written(0);
  {
    std::jthread stopper([&] { gate.stop(); });
    CHECK_FALSE(gate.wait(1, 1h, nothing));
  }
  CHECK_FALSE(gate.wait(1, 1h, nothing));
  CHECK(gate.wait(0, 1h, nothing));
}

TEST_CASE("While it waits it looks, and the look may stop it") {
  EpochGate gate(2);
  gate.written(0);
  int looks = 0;
  CHECK_FALSE(gate.wait(0, 1ms, [&] {
    if (++looks == 3) gate.stop();
  }));
  CHECK(looks == 3);
}

TEST_CASE("The end is when every channel has left") {
  EpochGate gate(2);
  gate.left();
  int looks = 0;
  {
    std::jthread last;
    CHECK(gate.wait_for_ends(1ms, [&] {
      if (++looks == 2) last = std::jthread([&] { gate.left(); });
    }));
    CHECK(looks >= 2);
  }
  gate.stop();
  CHECK(gate.wait_for_ends(1h, nothing));
  EpochGate other(1);
  other.stop();
  CHECK_FALSE(other.wait_for_ends(1h, nothing));
}
