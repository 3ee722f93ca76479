// SPDX-License-Identifier: MIT
//
// The thread beside those that fetch: opens the lanes' fetchers, so that no fault thread waits for a connection, and lets
// the regions go when all is there.
#pragma once

#include <bit>
#include <chrono>
#include <cstdint>
#include <utility>

#include "multifd/postcopy/detail/fetch_worker.hpp"
#include "multifd/postcopy/detail/lazy_shared.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

/// Threads: run() its own.
class LaneOpener {
 public:
  explicit LaneOpener(LazyShared& shared) noexcept : shared_(shared) {}

  void run() noexcept {
    if (shared_.states.remaining() == 0) shared_.all_known();
    auto done = open_lanes();
    if (done && !shared_.over()) done = let_go();
    if (!done)
      shared_.error.raise(done.error());
    else if (!shared_.over())
      shared_.complete();
  }

 private:
  [[nodiscard]] Result<void> open_lanes() {
    std::uint64_t wanted = 0;
    while (shared_.running()) {
      {
        auto held = shared_.monitor.lock();
        shared_.monitor.wait(
            held, engine::Monitor::longest_wait,
            [&] { return !shared_.running() || wanted != 0 || shared_.wanted_lanes != 0; }, [] { return true; });
        wanted |= std::exchange(shared_.wanted_lanes, 0);
      }
      if (!shared_.running()) break;
      const auto lane = static_cast<unsigned>(std::countr_zero(wanted));
      auto opened = shared_.store.open(FetchKind::urgent);
      if (opened) {
        wanted &= wanted - 1;
        shared_.lanes[lane].put(std::move(*opened));
        shared_.status.fetcher_opened();
        shared_.fault_wakes[lane].send();
      } else if (shared_.running()) {
        if (!shared_.store.may_return(opened.error())) return std::unexpected(opened.error());
        auto held = shared_.monitor.lock();
        shared_.monitor.wait_until(held, FaultClock::now() + reopen_pause, [&] { return !shared_.running(); });
      }
    }
    return {};
  }

  /// What is still missing is zero: from here on it is ordinary empty memory.
  [[nodiscard]] Result<void> let_go() {
    for (const auto& part : shared_.layout.parts()) {
      auto done = shared_.userfaultfd.unregister(part.address, part.bytes);
      // The guest may have unmapped it.
      if (!done && done.error().code != std::errc::invalid_argument) return done;
    }
    return {};
  }

  LazyShared& shared_;
};

}  // namespace multifd::postcopy::detail
