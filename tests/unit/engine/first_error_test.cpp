// SPDX-License-Identifier: MIT
#include "multifd/engine/first_error.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <barrier>
#include <memory>
#include <ostream>  // lets doctest print a std::error_code
#include <thread>
#include <vector>

using multifd::Errc;
using multifd::Error;
using multifd::engine::FirstError;

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

TEST_CASE("Of many errors raised at once exactly one wins, whole, and every thread reads that one") {
  // All threads walk the same row of errors, so they meet at many of them.
  constexpr std::size_t rounds = 20'000;
  constexpr std::uint32_t raisers = 4;
  std::vector<std::atomic<unsigned>> stops(rounds);
  std::vector<std::unique_ptr<FirstError>> errors;
  for (std::size_t i = 0; i < rounds; ++i) errors.push_back(std::make_unique<FirstError>([&, i] { ++stops[i]; }));
  std::vector<std::vector<std::uint32_t>> seen(raisers, std::vector<std::uint32_t>(rounds));
  std::barrier start(raisers);
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t id = 0; id < raisers; ++id) {
      threads.emplace_back([&, id] {
        start.arrive_and_wait();
        for (std::size_t i = 0; i < rounds; ++i) {
          errors[i]->raise({.code = Errc::cancelled, .detail = id * 1000u, .channel = id, .packet = id * 7u});
          seen[id][i] = errors[i]->get().channel;
        }
      });
    }
  }
  for (std::size_t i = 0; i < rounds; ++i) {
    const Error winner = errors[i]->get();
    bool whole = stops[i] == 1 && winner.channel < raisers && winner.detail == winner.channel * 1000u &&
                 winner.packet == winner.channel * 7u;  // not mixed from two
    for (const auto& mine : seen) whole = whole && mine[i] == winner.channel;
    if (!whole) FAIL("round ", i, ": stopped ", stops[i].load(), " times, winner ", winner.channel);
  }
}
