// SPDX-License-Identifier: MIT
//
// What the producer and the workers of one sender share, whatever the format: the map, hand-off, cap, counters, the
// first error.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "multifd/engine/batch_handoff.hpp"
#include "multifd/engine/closed_epochs.hpp"
#include "multifd/engine/counters.hpp"
#include "multifd/engine/first_error.hpp"
#include "multifd/engine/rate_limiter.hpp"
#include "multifd/engine/sent_journal.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/progress_watch.hpp"

namespace multifd::engine {

struct SendShared {
  SendShared(const RamMap& ram, unsigned channel_count, std::uint64_t bandwidth, std::chrono::milliseconds stand_still,
             std::function<bool()> interrupt, std::function<void()> stop, ErrorHook hook)
      : map(ram),
        channels(channel_count),
        progress_timeout(stand_still),
        interrupted(std::move(interrupt)),
        counters(std::make_unique<ChannelCounters[]>(channel_count)),
        limiter(bandwidth),
        epochs(channel_count),
        error(std::move(stop), std::move(hook)) {}

  /// A number that changes while bytes leave on any channel.
  std::uint64_t moved() const noexcept {
    std::uint64_t sum = 0;
    for (unsigned i = 0; i < channels; ++i) sum += counters[i].progress();
    return sum;
  }

  /// Called now and then by a thread that waits for the channels. Raises Errc::timed_out, which stops everything, when
  /// no channel has moved a byte for progress_timeout. The time in which the bandwidth cap holds bytes back does not
  /// count, nor that in which no channel has a connection: how long that may take is said by who makes new ones.
  void check_progress(ProgressWatch& watch) noexcept {
    check_interrupt();
    if (watch.stalled(moved(), limiter.holds_back() || epochs.away() == channels))
      error.raise(
          {.code = Errc::timed_out, .stage = Stage::write, .op = "no channel took a byte for progress_timeout"});
  }
  void check_interrupt() noexcept {
    if (while_waiting) {
      if (auto done = while_waiting(); !done) error.raise(done.error());
    }
    if (interrupted && interrupted()) error.raise({.code = Errc::cancelled, .op = "interrupted"});
  }
  ProgressWatch watch() const noexcept { return {progress_timeout, moved()}; }

  const RamMap map;
  const unsigned channels;
  const std::chrono::milliseconds progress_timeout;
  const std::function<bool()> interrupted;            ///< may be empty
  std::function<Result<void>()> while_waiting{};      ///< as SenderOptions has it
  const std::unique_ptr<ChannelCounters[]> counters;  ///< by channel
  std::unique_ptr<BatchHandoff> handoff;              ///< never null once the channels run
  RateLimiter limiter;
  ClosedEpochs epochs;
  std::unique_ptr<SentJournal> journal;  ///< null: a lost connection is an error, and nothing is sent again
  FirstError error;
  std::atomic<bool> wants_confirmation{false};  ///< from channel 0; set before the hand-off has ended
};

}  // namespace multifd::engine
