// SPDX-License-Identifier: MIT
#include "multifd/channel/epoch_gate.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>

using multifd::EpochGate;

TEST_CASE("An epoch is out when every channel has written its SYNC") {
  EpochGate gate(3);
  for (unsigned epoch = 0; epoch < 3; ++epoch)
    for (unsigned channel = 0; channel < 3; ++channel) gate.written(channel);
  CHECK(gate.wait(0));
  CHECK(gate.wait(2));
}

TEST_CASE("The slowest channel decides, however far the others are") {
  EpochGate gate(2);
  for (int i = 0; i < 5; ++i) gate.written(0);
  gate.written(1);
  CHECK(gate.wait(0));
  gate.stop();
  CHECK_FALSE(gate.wait(1));  // would have waited: channel 1 owes the second SYNC
}

TEST_CASE("A waiting caller is let through by the last channel, not before") {
  EpochGate gate(2);
  std::atomic<bool> last{false};
  gate.written(0);
  std::jthread worker([&] {
    last = true;
    gate.written(1);
  });
  CHECK(gate.wait(0));
  CHECK(last);
}

TEST_CASE("stop() ends the wait, now and later, but an epoch that is out stays out") {
  EpochGate gate(1);
  gate.written(0);
  {
    std::jthread stopper([&] { gate.stop(); });
    CHECK_FALSE(gate.wait(1));
  }
  CHECK_FALSE(gate.wait(1));
  CHECK(gate.wait(0));
}
