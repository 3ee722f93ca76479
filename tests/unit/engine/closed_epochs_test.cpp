// SPDX-License-Identifier: MIT
#include "multifd/engine/closed_epochs.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>

using multifd::engine::ClosedEpochs;
using namespace std::chrono_literals;

namespace {

constexpr auto nothing = [] {};

}  // namespace

TEST_CASE("An epoch is out when every channel has written its SYNC") {
  ClosedEpochs epochs(3);
  for (unsigned epoch = 0; epoch < 3; ++epoch)
    for (unsigned channel = 0; channel < 3; ++channel) epochs.closed(channel);
  CHECK(epochs.wait(0, 1h, nothing));
  CHECK(epochs.wait(2, 1h, nothing));
}

TEST_CASE("The slowest channel decides, however far the others are") {
  ClosedEpochs epochs(2);
  for (int i = 0; i < 5; ++i) epochs.closed(0);
  epochs.closed(1);
  CHECK(epochs.wait(0, 1h, nothing));
  epochs.stop();
  CHECK_FALSE(epochs.wait(1, 1h, nothing));  // would have waited: channel 1 owes the second SYNC
}

TEST_CASE("A waiting caller is let through by the last channel, not before") {
  ClosedEpochs epochs(2);
  std::atomic<bool> last{false};
  epochs.closed(0);
  std::jthread worker([&] {
    last = true;
    epochs.closed(1);
  });
  CHECK(epochs.wait(0, 1h, nothing));
  CHECK(last);
}

TEST_CASE("stop() ends the wait, now and later, but an epoch that is out stays out") {
  ClosedEpochs epochs(1);
  epochs.closed(0);
  {
    std::jthread stopper([&] { epochs.stop(); });
    CHECK_FALSE(epochs.wait(1, 1h, nothing));
  }
  CHECK_FALSE(epochs.wait(1, 1h, nothing));
  CHECK(epochs.wait(0, 1h, nothing));
}

TEST_CASE("A wait calls its check meanwhile, and the check may stop the wait") {
  ClosedEpochs epochs(2);
  epochs.closed(0);
  int looks = 0;
  CHECK_FALSE(epochs.wait(0, 1ms, [&] {
    if (++looks == 3) epochs.stop();
  }));
  CHECK(looks == 3);
}

TEST_CASE("The end is when every channel has left") {
  ClosedEpochs epochs(2);
  epochs.channel_ended();
  int looks = 0;
  {
    std::jthread last;
    CHECK(epochs.wait_for_channels(1ms, [&] {
      if (++looks == 2) last = std::jthread([&] { epochs.channel_ended(); });
    }));
    CHECK(looks >= 2);
  }
  epochs.stop();
  CHECK(epochs.wait_for_channels(1h, nothing));
  ClosedEpochs other(1);
  other.stop();
  CHECK_FALSE(other.wait_for_channels(1h, nothing));
}
