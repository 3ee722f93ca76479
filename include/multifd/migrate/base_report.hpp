// SPDX-License-Identifier: MIT
//
// BaseReport: what an older copy at the destination was good for.
#pragma once

#include <cstdint>

#include "multifd/migrate/round.hpp"

namespace multifd::migrate {

/// A part of MigrationReport and of ArrivalReport.
struct BaseReport {
  std::uint64_t pages = 0;         ///< that were compared: all
  std::uint64_t equal_pages = 0;   ///< at the source: that were not sent
  std::uint64_t digest_bytes = 0;  ///< that went from the destination to the source, beside the channels
  Time time{};                     ///< from the source's question to the last digest
};

}  // namespace multifd::migrate
