// SPDX-License-Identifier: MIT
#include "multifd/channel/first_error.hpp"

#include <doctest/doctest.h>

#include <barrier>
#include <ostream>  // lets doctest print a std::error_code
#include <thread>
#include <vector>

using multifd::Errc;
using multifd::Error;
using multifd::FirstError;

TEST_CASE("Nothing has failed at first") {
  const FirstError error([] {});
  CHECK_FALSE(error.failed());
}

TEST_CASE("The first error stays, whatever comes later, and stops once") {
  int stops = 0;
  FirstError error([&] { ++stops; });
  error.raise({.code = Errc::corrupt_payload, .detail = 7, .channel = 3, .packet = 42});
  error.raise({.code = Errc::peer_closed, .channel = 1});
  CHECK(error.failed());
  CHECK(error.get().code == Errc::corrupt_payload);
  CHECK(error.get().detail == 7);
  CHECK(error.get().channel == 3);
  CHECK(error.get().packet == 42);
  CHECK(stops == 1);
}

TEST_CASE("The stop action may raise the errors that it causes, and finds the first one in place") {
  FirstError* self = nullptr;
  Errc seen{};
  FirstError error([&] {
    if (self->get().code == Errc::timed_out) seen = Errc::timed_out;
    self->raise({.code = Errc::peer_closed});
  });
  self = &error;
  error.raise({.code = Errc::timed_out});
  CHECK(seen == Errc::timed_out);
  CHECK(error.get().code == Errc::timed_out);
}

TEST_CASE("Of many that raise at once exactly one wins, whole, and everybody reads that one") {
  constexpr unsigned raisers = 8;
  for (int round = 0; round < 200; ++round) {
    std::atomic<unsigned> stops{0};
    FirstError error([&] { ++stops; });
    std::barrier start(raisers);
    std::vector<Error> seen(raisers);
    {
      std::vector<std::jthread> threads;
      for (std::uint32_t id = 0; id < raisers; ++id) {
        threads.emplace_back([&, id] {
          start.arrive_and_wait();
          error.raise({.code = Errc::cancelled, .detail = id * 1000u, .channel = id, .packet = id * 7u});
          seen[id] = error.get();
        });
      }
    }
    REQUIRE(stops == 1);
    const Error winner = error.get();
    REQUIRE(winner.channel < raisers);
    REQUIRE(winner.detail == winner.channel * 1000u);  // not mixed from two
    REQUIRE(winner.packet == winner.channel * 7u);
    for (const Error& each : seen) REQUIRE(each.channel == winner.channel);
  }
}
