// SPDX-License-Identifier: MIT
//
// Time is checked from below only: a busy machine may be slow, never too fast.
#include "multifd/engine/rate_limiter.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

using multifd::engine::RateLimiter;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

namespace {

constexpr auto burst = 20ms;  // what may go out at once after a pause

}  // namespace

TEST_CASE("Without a cap nothing waits") {
  RateLimiter limiter(0);
  CHECK(limiter.rate() == 0);
  for (int i = 0; i < 1000; ++i) CHECK(limiter.acquire(std::uint64_t{1} << 40));
}

TEST_CASE("A cap holds back what exceeds it") {
  RateLimiter limiter(1'000'000);
  CHECK(limiter.rate() == 1'000'000);
  const auto start = Clock::now();
  for (int i = 0; i < 6; ++i) CHECK(limiter.acquire(30'000));  // 30 ms each; the first goes at once
  CHECK(Clock::now() - start >= 5 * 30ms - burst);
}

TEST_CASE("A cap is one for all threads together") {
  RateLimiter limiter(1'000'000);
  const auto start = Clock::now();
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&] {
        for (int i = 0; i < 2; ++i) (void)limiter.acquire(20'000);
      });
  }
  CHECK(Clock::now() - start >= 7 * 20ms - burst);
}

TEST_CASE("A pause saves up no more than a burst") {
  RateLimiter limiter(1'000'000);
  CHECK(limiter.acquire(1));
  std::this_thread::sleep_for(100ms);  // the pause itself is what is tested
  const auto start = Clock::now();
  for (int i = 0; i < 5; ++i) CHECK(limiter.acquire(20'000));
  CHECK(Clock::now() - start >= 4 * 20ms - burst);
}

TEST_CASE("A new cap counts at once for threads that wait under the old one") {
  RateLimiter limiter(1);
  CHECK(limiter.acquire(1'000'000));  // the next would wait for eleven days
  for (const std::uint64_t rate : {std::uint64_t{0}, std::uint64_t{1'000'000'000}}) {
    limiter.set_rate(1);
    CHECK(limiter.acquire(1'000'000));
    std::vector<char> granted(3);
    {
      std::vector<std::jthread> threads;
      for (char& mine : granted) threads.emplace_back([&] { mine = limiter.acquire(1000) ? 1 : 0; });
      // Time to get into the wait, which cannot be seen from outside; a thread that is later passes as well.
      std::this_thread::sleep_for(30ms);
      limiter.set_rate(rate);
    }
    CHECK(limiter.rate() == rate);
    for (const char each : granted) CHECK(each == 1);
  }
}

TEST_CASE("A thread that waits for the cap can be seen, and only then") {
  RateLimiter limiter(1);
  CHECK(limiter.acquire(1'000'000));
  CHECK_FALSE(limiter.holds_back());
  std::jthread waiting([&] { (void)limiter.acquire(1); });
  while (!limiter.holds_back()) std::this_thread::yield();
  limiter.set_rate(0);
  waiting.join();
  CHECK_FALSE(limiter.holds_back());
}

TEST_CASE("A higher cap is a cap, too") {
  RateLimiter limiter(1);
  limiter.set_rate(2'000'000);
  const auto start = Clock::now();
  for (int i = 0; i < 4; ++i) CHECK(limiter.acquire(60'000));
  CHECK(Clock::now() - start >= 3 * 30ms - burst);
}

TEST_CASE("stop() ends every wait with false, now and later") {
  RateLimiter limiter(1);
  CHECK(limiter.acquire(1'000'000));
  std::vector<char> granted(3, 1);
  {
    std::vector<std::jthread> threads;
    for (char& mine : granted) threads.emplace_back([&] { mine = limiter.acquire(1000) ? 1 : 0; });
    limiter.stop();
  }
  for (const char each : granted) CHECK(each == 0);
  CHECK_FALSE(limiter.acquire(1));
}

TEST_CASE("A wait with an end of its own ends by wake(), by its deadline, and leaves the cap to others") {
  RateLimiter limiter(1);
  CHECK(limiter.acquire(1'000'000));
  const auto never = [] { return false; };
  CHECK(limiter.acquire(1, Clock::now() + 5ms, never) == multifd::engine::Grant::timed_out);
  std::atomic<bool> over{false};
  std::atomic<multifd::engine::Grant> got{multifd::engine::Grant::granted};
  std::jthread waiting([&] { got = limiter.acquire(1, Clock::time_point::max(), [&] { return over.load(); }); });
  while (!limiter.holds_back()) std::this_thread::yield();
  over = true;
  limiter.wake();
  waiting.join();
  CHECK(got == multifd::engine::Grant::ended);
  limiter.give_back(1'000'000);
  CHECK(limiter.acquire(1, Clock::now() + 1h, never) == multifd::engine::Grant::granted);
  limiter.charge(1'000'000);
  CHECK(limiter.acquire(1, Clock::now(), never) == multifd::engine::Grant::timed_out);
}
