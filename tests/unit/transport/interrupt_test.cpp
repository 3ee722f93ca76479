// SPDX-License-Identifier: MIT
#include "multifd/transport/interrupt.hpp"

#include <doctest/doctest.h>

#include <signal.h>

#include <chrono>
#include <thread>

#include "multifd/transport/detail/wait.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace std::chrono_literals;

TEST_CASE("an Interrupt stays triggered") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  CHECK_FALSE(interrupt->triggered());
  for (int i = 0; i < 3; ++i) interrupt->trigger();
  CHECK(interrupt->triggered());
  Interrupt moved = std::move(*interrupt);
  CHECK(moved.triggered());
}

namespace {
Interrupt* signal_target = nullptr;
}

TEST_CASE("an Interrupt can be triggered by a signal handler") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  signal_target = &*interrupt;
  struct sigaction action{};
  struct sigaction old{};
  action.sa_handler = [](int) { signal_target->trigger(); };
  REQUIRE(sigaction(SIGUSR1, &action, &old) == 0);
  errno = EXDEV;
  raise(SIGUSR1);
  CHECK(errno == EXDEV);
  CHECK(interrupt->triggered());
  sigaction(SIGUSR1, &old, nullptr);
}

TEST_CASE("a wait ends by deadline, by interrupt, by readiness, in bounded time") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  test::FdPair pair = test::unix_pair();
  const int fd = pair.second.native_handle();
  const auto wait = [&](std::chrono::milliseconds timeout) {
    return detail::wait_for(fd, POLLIN, deadline_after(timeout), &*interrupt, Stage::read, "wait");
  };

  const test::Stopwatch time;
  auto result = wait(20ms);
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == Errc::timed_out);
  CHECK(time.elapsed() >= std::chrono::milliseconds(20));

  for (const auto none : {0ms, -5ms, std::chrono::milliseconds::min()}) {
    result = wait(none);
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == Errc::timed_out);
  }

  CHECK(::send(pair.first.native_handle(), "x", 1, 0) == 1);
  CHECK(wait(no_timeout).has_value());
  CHECK(wait(0ms).has_value());
  char byte;
  CHECK(::recv(fd, &byte, 1, 0) == 1);

  std::thread other([&] {
    std::this_thread::sleep_for(20ms);
    interrupt->trigger();
  });
  const test::Stopwatch until_interrupt;
  result = wait(no_timeout);
  CHECK(until_interrupt.elapsed() < test::no_hang);
  other.join();
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == Errc::cancelled);
}
