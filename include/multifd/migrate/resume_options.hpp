// SPDX-License-Identifier: MIT
//
// What a migration does about connections that are lost under way.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "multifd/result.hpp"

namespace multifd::migrate {

/// Whether a source goes on when connections are lost, towards an own destination that does, too
/// (DestinationResumeOptions): what was lost with them is sent again, and they are made again.
struct ResumeOptions {
  /// Default: off: the first lost connection is the migration's end, and the guest stays. On, a bit for each page, channel and
  /// open epoch is kept, twice; what the main connection carries is kept until the destination has it.
  bool enabled = false;
  /// How long a connection may be silent until it counts as lost, 1 s at least (TCP_USER_TIMEOUT, keepalive). One whose other
  /// side lives and reads nothing counts, too: at an epoch's end channels wait for the slowest. Shorter: less standing still when a path fails; longer: outages that are shorter cost nothing.
  std::chrono::milliseconds path_timeout{5'000};
  /// How long there may be no channel with a connection, with the guest running at the source, until the migration ends. 0: no
  /// limit. Once the guest is stopped SourceOptions::load_timeout takes its place.
  std::chrono::milliseconds timeout{300'000};
  /// Where no connection is left: false: nothing is tried before Migration::resume().
  bool automatic = true;
};

/// The same at a destination.
struct DestinationResumeOptions {
  bool accepted = true;                           ///< false: the first lost connection is the end
  std::chrono::milliseconds path_timeout{5'000};  ///< as ResumeOptions has it, of the accepted connections
  std::chrono::milliseconds timeout{300'000};     ///< as ResumeOptions has it
};

/// A connection was lost, or has come back. The references are valid during the call.
struct PathEvent {
  std::size_t path = 0;         ///< its place in the list that migrate_to() got; 0 without one
  bool main = false;            ///< the main connection
  unsigned channel = 0;         ///< the channel, if it is none of that kind
  bool left_out = false;        ///< the path did not come up at the beginning, and the migration goes on without it
  const Error* lost = nullptr;  ///< why; null: it has come back
};

/// One path of a source as it is now.
struct PathProgress {
  std::string name;                 ///< LOCAL=REMOTE
  unsigned channels = 0;            ///< that it has
  unsigned connected = 0;           ///< ... now
  std::uint64_t read_bytes = 0;     ///< the same
  std::uint64_t written_bytes = 0;  ///< by all of its connections
  std::uint64_t bandwidth = 0;      ///< its cap, bytes per second; 0: none
  std::uint64_t lost = 0;           ///< connections of channels, so far
  bool left_out = false;            ///< it did not come up at the beginning
};

}  // namespace multifd::migrate
