// SPDX-License-Identifier: MIT
//
// MigrationReport: what a source knows about its migration at the end.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "multifd/migrate/base_report.hpp"
#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/postcopy_options.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/stats.hpp"

namespace multifd::migrate {

/// What migrate_to() returns. The guest runs at the destination.
struct MigrationReport {
  std::vector<Round> rounds;         ///< the last one with the guest stopped
  Decision switchover{};             ///< why the guest was stopped; its `downtime` is what was promised
  Downtime downtime{};               ///< what it was, from pause() to the destination's word that the guest runs
  Time verify{};                     ///< reading and comparing all memory meanwhile, which is not in `downtime`
  Time total{};                      ///< from the first connection's first byte to the end
  std::uint64_t pages_verified = 0;  ///< that the destination has compared
  SenderStats stats{};               ///< of the channels
  std::optional<SourcePostcopyReport> postcopy{};  ///< where the memory followed
  std::optional<BaseReport> base{};                ///< where the destination held an older copy
  bool own_peer = false;                           ///< whether the destination was migrate_from(); else a QEMU
};

}  // namespace multifd::migrate
