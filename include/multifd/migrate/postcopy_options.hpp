// SPDX-License-Identifier: MIT
//
// The settings of memory on demand, of both sides: a guest that runs at the destination before its memory is there.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "multifd/migrate/round.hpp"
#include "multifd/postcopy/fault_latency.hpp"

namespace multifd::migrate {

/// When a source hands the guest over before its memory is there.
enum class Postcopy : std::uint8_t {
  never,
  /// Where the switch rule or the time limit would give up, or stop the guest for longer than ConvergeOptions::max_downtime,
  /// and where rounds leave as much as they send (ConvergenceOptions::on_demand_above). Not where the caller has asked for
  /// the switchover.
  fallback,
  at_once,  ///< without a round: all memory follows but what was never touched
};

constexpr std::string_view to_string(Postcopy strategy) noexcept {
  constexpr std::string_view names[] = {"never", "fallback", "at-once"};
  return names[static_cast<std::size_t>(strategy)];
}

/// Settings of a source. Behind the hand-over the guest lives on the source's memory: whoever ends the source then ends the
/// guest. No time limit does: migrate_to() waits for a destination that is out of reach until it comes back, or cancel().
struct PostcopyOptions {
  /// Default: never, because the guest is lost where one side or the network dies for good. A destination that cannot do it
  /// is migrated to by rounds alone with Postcopy::fallback, and refused with Postcopy::at_once. Own peers only.
  Postcopy strategy = Postcopy::never;
  /// Page connections for what nobody waits for; there is one more for what the guest waits for. 1 to 255; 0: as many as
  /// channels.
  unsigned channels = 0;
  /// Bytes per second that they may carry together behind the hand-over; 0: no cap. QEMU's max-postcopy-bandwidth. The
  /// sender's cap ends there, because the guest waits; what it waits for this one does not hold back either.
  std::uint64_t bandwidth = 0;
};

/// Settings of a destination.
struct DestinationPostcopyOptions {
  /// Whether a source may do it. Default: where a userfaultfd can be had for the guest's memory.
  bool accepted = true;
  /// Threads that serve faults, each with a page connection of its own; as many as the source's connections allow. 1 to 64.
  unsigned fault_threads = 1;
  unsigned neighbours = 32;  ///< how many pages behind a fault come before the rest; 0: none
  /// Pages that faults ask for have connections of their own. Default: on; off is for measurements.
  bool urgent_lane = true;
  /// What is placed at once: of hugetlbfs its page size. Default: that of the host.
  std::uint64_t unit_bytes = 4096;
};

/// What a migration whose memory followed has done, as its destination knows it.
struct PostcopyReport {
  std::uint64_t missing_pages = 0;     ///< when the guest began to run
  std::uint64_t urgent_pages = 0;      ///< that came because the guest waited for them
  std::uint64_t background_pages = 0;  ///< the others
  std::uint64_t zero_pages = 0;        ///< found to be zero
  std::uint64_t faults = 0;
  postcopy::FaultLatency latency{};  ///< of the faults whose page had to be fetched
  std::uint64_t lost_fetchers = 0;   ///< connections that were lost under way, and made anew
  std::uint64_t wire_bytes = 0;      ///< on the page connections
  Time time{};                       ///< from RUNNING until all pages were there
  Time paused{};                     ///< of that, without a connection
};

/// The same, as its source knows it.
struct SourcePostcopyReport {
  std::uint64_t missing_pages = 0;  ///< when the guest was handed over
  std::uint64_t normal_pages = 0;   ///< sent as bytes, again where asked for again
  std::uint64_t zero_pages = 0;
  std::uint64_t urgent_requests = 0;
  std::uint64_t wire_bytes = 0;
  std::uint64_t connections_lost = 0;  ///< page connections that ended with an error
  Time time{};                         ///< from RUNNING until the destination had all pages
  Time paused{};                       ///< of that, without a connection
};

}  // namespace multifd::migrate
