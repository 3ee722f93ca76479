// SPDX-License-Identifier: MIT
//
// What the channels of one sender share: settings, hand-off, limits, the first error.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "multifd/channel/epoch_gate.hpp"
#include "multifd/channel/first_error.hpp"
#include "multifd/channel/handoff.hpp"
#include "multifd/channel/progress_watch.hpp"
#include "multifd/channel/rate_limiter.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/wire/announcement.hpp"
#include "multifd/wire/init_packet.hpp"

namespace multifd {

/// Whether packets carry a digest of their page data (own extension, see wire::digest_offset).
enum class Digest : std::uint8_t { off, on };

/// Where a sender's pages lie.
enum class PageSource : std::uint8_t {
  guest,   ///< in the map's memory, which the guest may be writing
  copies,  ///< in buffers that come with them: for a relay, whose blocks need no memory
};

/// What all channels of one sender share.
struct SendShared {
  SendShared(const RamMap& ram, const Uuid& vm_uuid, const std::optional<wire::Announcement>& announcement,
             PageSource pages, Digest with_digest, unsigned channels, std::uint64_t bandwidth,
             std::chrono::milliseconds stand_still, std::function<void()> stop)
      : map(ram),
        uuid(vm_uuid),
        announced(announcement),
        source(pages),
        digest(with_digest),
        progress_timeout(stand_still),
        limiter(bandwidth),
        gate(channels),
        error(std::move(stop)) {}

  /// For whoever waits for the channels: to be asked now and then. Stops everything when no channel has moved for too
  /// long; a bandwidth cap may let that much more time pass between two packets.
  void check_progress(ProgressWatch& watch) noexcept {
    const std::uint64_t rate = limiter.rate();
    const std::uint64_t seconds = rate == 0 ? 0 : wire::max_payload_bytes / rate + 1;
    if (watch.stalled(progress(), std::chrono::seconds(std::min<std::uint64_t>(seconds, 1 << 30))))
      error.raise(
          {.code = Errc::timed_out, .stage = Stage::write, .op = "no channel took a byte for progress_timeout"});
  }
  ProgressWatch watch() const noexcept { return {progress_timeout, progress()}; }

  /// Whether the receiver answers: it was told in the hellos.
  bool gets_answer() const noexcept { return announced && announced->takes_answer; }

  const RamMap map;
  const Uuid uuid;
  const std::optional<wire::Announcement> announced;  ///< empty: the peer is not ours
  const PageSource source;
  const Digest digest;
  const std::chrono::milliseconds progress_timeout;
  std::function<std::uint64_t()> progress;  ///< bytes of all channels
  std::unique_ptr<BatchHandoff> handoff;
  RateLimiter limiter;
  EpochGate gate;
  FirstError error;
  std::atomic<bool> wants_answer{false};     ///< set before the hand-off is finished: channel 0 waits for it
  std::atomic<std::uint64_t> packet_num{0};  ///< one count for all channels (format/packets.md section 3.1)
  std::atomic<std::uint32_t> level_changes{0};
  std::atomic<int> level{0};
};

}  // namespace multifd
