// SPDX-License-Identifier: MIT
//
// What state a migration is in, and what it reports on the way: events for who follows it, and a snapshot for who asks.
#pragma once

#include <chrono>
#include <cstdint>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/migrate/switch_rule.hpp"

namespace multifd::migrate {

/// QEMU's names of a migration's states, in the order in which a source goes through them.
enum class MigrationStatus : std::uint8_t {
  none,              ///< not begun
  setup,             ///< connections, settings; no page has travelled
  active,            ///< rounds; the guest runs at the source
  pre_switchover,    ///< the guest stands still, and waits for Migration::proceed()
  device,            ///< the rest of the pages, devices' state, hand-over
  completed,         ///< the guest runs at the destination
  failed,            ///< Migration::owner() says where the guest is
  cancelling,        ///< cancel() was called
  cancelled,         ///< the guest is at the source
  postcopy_active,   ///< the guest runs at the destination, its memory follows
  postcopy_paused,   ///< ... and waits for a connection
  postcopy_recover,  ///< ... and comes back to one
};

constexpr const char* to_string(MigrationStatus status) noexcept {
  constexpr const char* names[] = {"none",      "setup",           "active",          "pre-switchover",
                                   "device",    "completed",       "failed",          "cancelling",
                                   "cancelled", "postcopy-active", "postcopy-paused", "postcopy-recover"};
  return names[static_cast<std::size_t>(status)];
}

/// Whether nothing follows.
constexpr bool is_end(MigrationStatus status) noexcept {
  return status == MigrationStatus::completed || status == MigrationStatus::failed ||
         status == MigrationStatus::cancelled;
}

/// What a switchover, MigrationStatus::device, is at. Each of these can take long.
enum class MigrationStep : std::uint8_t {
  none,
  pages,         ///< the rest of the pages
  device_state,  ///< SourceGuest::save(); at the destination DestinationGuest::load()
  verify,        ///< all memory is read for its digests; at the destination: and compared
  load,          ///< at the source: the destination has not said yet that it has loaded everything
  hand_over,     ///< all is there: HAND_OVER and RUNNING are under way
  farewell,      ///< the guest runs; DestinationOptions::farewell
};

/// What was moved so far, over all rounds.
struct Moved {
  std::uint64_t normal_pages = 0;     ///< sent as bytes
  std::uint64_t zero_pages = 0;       ///< sent as zero pages
  std::uint64_t unchanged_pages = 0;  ///< left out because they were as last sent
  std::uint64_t compared_pages = 0;   ///< with the older copy that the destination holds, ahead of the first round
  std::uint64_t equal_pages = 0;      ///< left out because they are as in that; at the source
  std::uint64_t wire_bytes = 0;       ///< on all channels
};

/// Connections that a migration has lost, and that return.
struct LostConnections {
  unsigned away = 0;  ///< channels that have none now
  bool paused =
      false;  ///< that is all of them: nothing moves, and the guest runs on at the source, unless it was stopped
  std::uint64_t times = 0;         ///< that a channel has lost one, so far
  std::uint64_t resent_pages = 0;  ///< that were lost with them; at the source
};

/// A migration as it is now.
struct MigrationProgress {
  MigrationStatus status = MigrationStatus::none;
  Time elapsed{};  ///< since the migration began
  Time since{};    ///< when the status was reached
  MigrationStep step = MigrationStep::none;
  unsigned channels = 0;          ///< at a destination: that the source uses; 0 until it has said so
  unsigned connected = 0;         ///< at a destination in setup: how many of them are there
  std::uint64_t ram_bytes = 0;    ///< of all blocks
  std::uint64_t round = 0;        ///< that is being sent; 0: the bulk pass
  std::uint64_t dirty_pages = 0;  ///< that this round had to send when it began
  std::uint64_t missing_pages =
      0;                   ///< that follow: at the source, when the guest was handed over; at the destination, now
  Moved moved{};           ///< up to now, the round that is being sent included
  LostConnections lost{};  ///< where connections return
  double pages_per_s = 0;  ///< bandwidth of the last rounds; 0: not known yet
  double dirty_pages_per_s = 0;       ///< what the guest dirtied in the last round
  Time predicted_downtime{};          ///< by the last round's end; 0: not known yet
  Reason reason = Reason::bulk_pass;  ///< of the last decision
  unsigned throttle_percent = 0;      ///< of each vCPU's time
  Bound bound = Bound::nothing;       ///< what limits the last round
};

/// What an event is about.
enum class EventKind : std::uint8_t {
  status,     ///< the status has changed
  step,       ///< the switchover has come to its next step
  round_end,  ///< a round is over, and a decision was taken
};

/// Something has happened. The references are valid during the call.
struct Event {
  EventKind kind = EventKind::status;
  const MigrationProgress& progress;
  const Round* round = nullptr;        ///< round_end: the round that is over
  const Decision* decision = nullptr;  ///< round_end: what follows
};

}  // namespace multifd::migrate
