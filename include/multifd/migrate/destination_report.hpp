// SPDX-License-Identifier: MIT
//
// ArrivalReport: what a destination knows about its migration at the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "multifd/error_value.hpp"
#include "multifd/migrate/base_report.hpp"
#include "multifd/migrate/postcopy_options.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/stats.hpp"

namespace multifd::migrate {

/// What migrate_from() returns. The guest runs here.
struct ArrivalReport {
  ReceiverStats stats{};                     ///< of the channels
  std::uint64_t zero_on_main = 0;            ///< zero pages that came on the main stream
  std::uint64_t ram_bytes = 0;               ///< of all blocks
  std::size_t page_bytes = 0;                ///< as the source has said
  std::uint64_t pages_verified = 0;          ///< that were compared with the source's digests
  Time total{};                              ///< from the source's first connection to the end
  std::optional<PostcopyReport> postcopy{};  ///< where the memory followed
  std::optional<BaseReport> base{};          ///< where the source has asked what the older copy holds
  std::string cipher;                        ///< of the main connection; empty: it was not encrypted
  std::optional<Error> late{};  ///< what went wrong behind RUNNING: the source may not have heard that the guest runs
};

}  // namespace multifd::migrate
