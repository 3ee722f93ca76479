// SPDX-License-Identifier: MIT
//
// The destination's half that ram_receive and live_migration share: channels into memory, epochs closed as the main
// connection says.
#pragma once

#include "common/accept_peer.hpp"

namespace program {

/// What came over the main connection and the channels.
struct Received {
  double seconds = 0;
  double memory_seconds = 0;  ///< until the last epoch was whole: without what the source does then, its digest
  multifd::ReceiverStats stats;
  std::uint64_t main_zero_pages = 0;
  std::vector<std::byte> state;  ///< of the virtual CPU, when the source sent one
  nlohmann::json done;
};

/// Receives one RAM block until the source is done. Throws the Failure that came first on any connection.
///
/// Params: `compression`: a name of compressor_names().
Received receive_ram(const std::string& compression, Accepted& source, const multifd::RamMap& ram,
                     multifd::BlockId block, const multifd::Interrupt& interrupt, const TimeLimits& limits,
                     multifd::Populate populate = multifd::Populate::off);

}  // namespace program
