// SPDX-License-Identifier: MIT
#include "multifd/packets/epoch_barrier.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <ostream>  // lets doctest print a std::error_code
#include <thread>
#include <vector>

#include "support/basics.hpp"

using multifd::Barrier;
using multifd::Errc;
using multifd::Error;
using multifd::Result;
using multifd::Stage;
using multifd::packets::EpochBarrier;
using namespace std::chrono_literals;

namespace {

constexpr auto no_progress = [] { return std::uint64_t{0}; };
constexpr auto never = 60s;  // longer than any of these tests may take

std::unique_ptr<EpochBarrier> make(unsigned channels, Barrier mode, std::chrono::milliseconds limit = never) {
  auto point = EpochBarrier::create(channels, mode, limit);
  REQUIRE(point);
  return std::move(*point);
}

template <class T>
void check_blamed(const Result<T>& result, Errc code, std::uint32_t channel) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == code, multifd::describe(result.error()));
  CHECK(result.error().channel == channel);
  CHECK(result.error().stage == Stage::sync);
}

/// A thread that arrives, and waits. In automatic mode the constructor returns when it is inside the barrier:
/// a wait asks for the progress first, under the barrier's lock.
class Arrival {
 public:
  Arrival(EpochBarrier& point, std::uint32_t channel, Barrier mode = Barrier::automatic)
      : point_(point), thread_([this, &point, channel] {
          result_ = point.arrive(channel, [this] {
            inside_ = true;
            inside_.notify_all();
            return std::uint64_t{0};
          });
        }) {
    if (mode == Barrier::automatic) inside_.wait(false);
  }

  /// A check that failed leaves it waiting: it must not hang the test that is to say so.
  ~Arrival() {
    if (thread_.joinable()) point_.stop();
  }

  const Result<void>& result() {
    if (thread_.joinable()) thread_.join();
    return result_;
  }

 private:
  EpochBarrier& point_;
  std::atomic<bool> inside_{false};
  Result<void> result_;
  std::jthread thread_;
};

}  // namespace

TEST_CASE("Automatic: the last channel to arrive releases all, every epoch anew") {
  for (const unsigned channels : {1u, 2u, 5u}) {
    CAPTURE(channels);
    constexpr std::uint64_t epochs = 50;
    const auto point = make(channels, Barrier::automatic);
    std::vector<std::atomic<std::uint64_t>> reached(channels);
    std::atomic<unsigned> failures{0};
    {
      std::vector<std::jthread> threads;
      for (unsigned c = 0; c < channels; ++c) {
        threads.emplace_back([&, c] {
          for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
            reached[c] = epoch + 1;
            if (!point->arrive(c, no_progress)) ++failures;
            // Nobody is released before everybody has come, and nobody is an epoch ahead of that.
            for (const auto& other : reached)
              if (other < epoch + 1 || other > epoch + 2) ++failures;
          }
          if (!point->channel_ended(c)) failures += 1000;
        });
      }
    }
    // The first to leave finds the others past the last barrier: leaving is in order for all of them.
    CHECK(failures == 0);
    CHECK(point->epochs() == epochs);
  }
}

TEST_CASE("Manual: no channel goes on before the caller releases them, and the caller learns the epoch") {
  constexpr unsigned channels = 3;
  constexpr std::uint64_t epochs = 20;
  const auto point = make(channels, Barrier::manual);
  std::atomic<std::uint64_t> opened{0};
  std::atomic<unsigned> early{0};
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < channels; ++c) {
    threads.emplace_back([&, c] {
      for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
        if (!point->arrive(c, no_progress)) ++early;
        if (opened < epoch + 1) ++early;
      }
    });
  }
  for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
    opened = epoch + 1;
    const Result<std::uint64_t> ended = point->release_when_all(no_progress);
    REQUIRE(ended);
    CHECK(*ended == epoch);
  }
  threads.clear();
  CHECK(early == 0);
  CHECK(point->epochs() == epochs);
}

TEST_CASE("Manual: while_held runs after the last arrival and before the first release, once an epoch") {
  constexpr unsigned channels = 3;
  constexpr std::uint64_t epochs = 20;
  const auto point = make(channels, Barrier::manual);
  std::atomic<unsigned> arriving{0};
  std::atomic<unsigned> released{0};
  std::atomic<unsigned> failures{0};
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < channels; ++c) {
    threads.emplace_back([&, c] {
      for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
        ++arriving;
        if (!point->arrive(c, no_progress)) ++failures;
        ++released;
      }
    });
  }
  unsigned calls = 0;
  for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
    const auto ended = point->release_when_all(no_progress, [&]() -> Result<void> {
      ++calls;
      CHECK(arriving == channels * (epoch + 1));
      CHECK(point->epochs() == epoch);  // which also takes the lock: it is free meanwhile
      for (int pause = 0; pause < 20; ++pause) std::this_thread::yield();
      CHECK(released == channels * epoch);
      return {};
    });
    REQUIRE(ended);
    CHECK(*ended == epoch);
    // The next round's numbers need this round's channels to be through.
    while (released != channels * (epoch + 1)) std::this_thread::yield();
  }
  threads.clear();
  CHECK(calls == epochs);
  CHECK(failures == 0);
}

TEST_CASE("Manual: an error of while_held is returned as it is, and no channel is released") {
  const auto point = make(2, Barrier::manual);
  Arrival zero(*point, 0, Barrier::manual);
  Arrival one(*point, 1, Barrier::manual);
  const Error reason{.code = Errc::bad_range, .stage = Stage::produce, .op = "while held", .detail = 7};
  const auto failed = point->release_when_all(no_progress, [&]() -> Result<void> { return std::unexpected(reason); });
  REQUIRE_FALSE(failed.has_value());
  CHECK(failed.error().code == Errc::bad_range);
  CHECK(failed.error().detail == 7);
  CHECK(failed.error().stage == Stage::produce);
  CHECK(point->epochs() == 0);
  // They are still there: another call finds both and lets them go.
  CHECK(point->release_when_all(no_progress).value() == 0);
  CHECK(zero.result());
  CHECK(one.result());
}

TEST_CASE("Manual: a stop while while_held runs releases no channel, and the caller's call fails, too") {
  const auto point = make(1, Barrier::manual);
  Arrival zero(*point, 0, Barrier::manual);
  const auto released = point->release_when_all(no_progress, [&]() -> Result<void> {
    point->stop();
    return {};
  });
  REQUIRE_FALSE(released.has_value());
  CHECK(released.error().code == Errc::cancelled);
  CHECK(zero.result().error().code == Errc::cancelled);
  CHECK(point->epochs() == 0);
}

TEST_CASE("Manual: while_held does not run when a channel is missing or has ended") {
  const auto never_called = []() -> Result<void> {
    FAIL_CHECK("while_held was called");
    return {};
  };
  check_blamed(make(1, Barrier::manual, 20ms)->release_when_all(no_progress, never_called), Errc::timed_out, 0);
  const auto point = make(2, Barrier::manual);
  CHECK(point->channel_ended(1));
  check_blamed(point->release_when_all(no_progress, never_called), Errc::unsynced_end, 1);
  point->stop();
  CHECK(point->release_when_all(no_progress, never_called).error().code == Errc::cancelled);
}

TEST_CASE("A missing channel times out and is named: the lowest one that still reads") {
  const auto point = make(4, Barrier::automatic, 20ms);
  Arrival zero(*point, 0);
  Arrival two(*point, 2);
  check_blamed(zero.result(), Errc::timed_out, 1);
  check_blamed(two.result(), Errc::timed_out, 1);
}

TEST_CASE("Manual: the caller's wait for a missing channel times out and names it") {
  const auto point = make(3, Barrier::manual, 20ms);
  check_blamed(point->release_when_all(no_progress), Errc::timed_out, 0);
  point->stop();
}

TEST_CASE("Manual: a channel's wait for the caller has no limit") {
  const auto point = make(1, Barrier::manual, 1ms);
  Arrival arrival(*point, 0, Barrier::manual);
  // Many limits later the channel is still there to be released. On a busy machine it is not there yet: then the caller's
  // wait, which has the limit, ends without it.
  std::this_thread::sleep_for(50ms);
  REQUIRE(test::eventually([&] { return point->release_when_all(no_progress).has_value(); }));
  CHECK(arrival.result());
}

TEST_CASE("A wait goes on while something moves, and ends one limit after the last movement") {
  const auto point = make(2, Barrier::automatic, 20ms);
  // A look every 2.5 ms: what moves at 30 of them goes on for several limits, and on a busy machine for more.
  std::uint64_t looks = 0;
  std::chrono::steady_clock::time_point moved;
  const Result<void> result = point->arrive(0, [&] {
    if (looks < 30) {
      ++looks;
      moved = std::chrono::steady_clock::now();
    }
    return looks;
  });
  check_blamed(result, Errc::timed_out, 1);
  CHECK(looks == 30);
  CHECK(std::chrono::steady_clock::now() - moved >= 20ms);
}

TEST_CASE("A channel that ends while others wait for its SYNC is refused and named") {
  const auto point = make(2, Barrier::automatic);
  Arrival waiting(*point, 0);
  check_blamed(point->channel_ended(1), Errc::unsynced_end, 1);
  point->stop();  // as the first error does
  CHECK(waiting.result().error().code == Errc::cancelled);
}

TEST_CASE("A SYNC after another channel's end is refused, naming the one that ended") {
  for (const Barrier mode : {Barrier::automatic, Barrier::manual}) {
    const auto point = make(3, mode);
    CHECK(point->channel_ended(2));
    check_blamed(point->arrive(0, no_progress), Errc::unsynced_end, 2);
  }
}

TEST_CASE(
    "Manual: the caller is told of a channel that ended instead of sending its SYNC, before or while it "
    "waits") {
  {
    const auto point = make(2, Barrier::manual);
    CHECK(point->channel_ended(1));
    check_blamed(point->release_when_all(no_progress), Errc::unsynced_end, 1);
  }
  {
    const auto point = make(2, Barrier::manual);
    std::jthread leaver;
    const auto result = point->release_when_all([&] {
      if (!leaver.joinable()) leaver = std::jthread([&] { (void)point->channel_ended(0); });
      return std::uint64_t{0};
    });
    check_blamed(result, Errc::unsynced_end, 0);
  }
}

TEST_CASE("All channels may end when none waits") {
  const auto point = make(3, Barrier::manual);
  unsigned ended = 0;
  for (const std::uint32_t channel : {1u, 0u, 2u}) {
    CHECK(point->ended_channels() == ended++);
    CHECK(point->channel_ended(channel));
  }
  CHECK(point->ended_channels() == 3);
  CHECK(point->end_epochs());
}

TEST_CASE("Manual: a SYNC after the caller's end is one too many, and its channel is named") {
  const auto point = make(2, Barrier::manual);
  CHECK(point->end_epochs());
  check_blamed(point->arrive(1, no_progress), Errc::sync_mismatch, 1);
}

TEST_CASE("Manual: a SYNC too many is found by whoever comes second, the channel or the caller's end") {
  for (int round = 0; round < 50; ++round) {
    const auto point = make(2, Barrier::manual);
    Arrival extra(*point, 1, Barrier::manual);
    const Result<void> ended = point->end_epochs();
    point->stop();
    if (ended) {
      const Result<void> result = extra.result();
      REQUIRE_FALSE(result.has_value());
      // stop() may come before the channel does: then that is what it hears.
      const bool expected = result.error().code == Errc::sync_mismatch || result.error().code == Errc::cancelled;
      CHECK(expected);
    } else {
      check_blamed(ended, Errc::sync_mismatch, 1);
    }
  }
}

TEST_CASE("Automatic: end() is nothing to the channels, which release themselves") {
  const auto point = make(1, Barrier::automatic);
  CHECK(point->end_epochs());
  CHECK(point->arrive(0, no_progress));
}

TEST_CASE("stop() ends every wait, now and later") {
  {
    const auto point = make(3, Barrier::automatic);
    Arrival zero(*point, 0);
    Arrival one(*point, 1);
    point->stop();
    CHECK(zero.result().error().code == Errc::cancelled);
    CHECK(one.result().error().code == Errc::cancelled);
    CHECK(point->arrive(2, no_progress).error().code == Errc::cancelled);
    CHECK(point->channel_ended(2).error().code == Errc::cancelled);
  }
  {
    const auto point = make(2, Barrier::manual);
    Arrival zero(*point, 0, Barrier::manual);
    std::jthread stopper;
    const auto released = point->release_when_all([&] {
      if (!stopper.joinable()) stopper = std::jthread([&] { point->stop(); });
      return std::uint64_t{0};
    });
    REQUIRE_FALSE(released.has_value());
    CHECK(released.error().code == Errc::cancelled);
    CHECK(zero.result().error().code == Errc::cancelled);
    CHECK(point->release_when_all(no_progress).error().code == Errc::cancelled);
  }
}

TEST_CASE("A release that came before stop() still counts") {
  const auto point = make(1, Barrier::automatic);
  CHECK(point->arrive(0, no_progress));
  point->stop();
  CHECK(point->epochs() == 1);
}
