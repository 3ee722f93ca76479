// SPDX-License-Identifier: MIT
//
// Which side has the guest when a relay ends: the one place that decides this and puts it into words. Also the texts
// for a lost destination, which are the same wherever the loss is noticed first.
#pragma once

#include <multifd/peer_profile.hpp>

#include <chrono>
#include <cstdint>
#include <string>

#include "common/program.hpp"

namespace relay {

/// What the destination answered on the return path, and how far its answer got.
enum class Answer {
  none,       ///< nothing: it has not come to the end, or has gone before
  refused,    ///< SHUT with a status that is not 0
  confirmed,  ///< SHUT(0), but the source did not get it
  passed_on,  ///< SHUT(0), written to the source, which has not closed its connection
  taken,      ///< SHUT(0), and the source ended in order behind it
};

/// The facts that decide which side has the guest.
struct EndState {
  bool return_path = false;  ///< the source opened it: it completes when it is answered, else with its last byte
  Answer answer = Answer::none;
  bool all_forwarded = false;      ///< the destination has been sent the whole stream, so it may have loaded it
  bool destination_ended = false;  ///< it closed its main connection in order after the last byte
};

enum class Guest {
  at_destination,
  at_source,
  at_source_completed,  ///< the source believes that the guest has moved, and keeps it stopped
  unknown,              ///< the destination has to be asked
  perhaps_at_both,      ///< at the destination, and the source may let its own run on
};

struct Outcome {
  Guest guest;
  bool moved;        ///< exit status 0
  std::string text;  ///< where the guest is, and what to do
};

/// One row of a table for each way in which a migration through a relay can end.
Outcome outcome(const EndState& end);

/// For --json.
const char* to_string(Guest guest);

/// A relayed migration that failed: the reason, and where the guest is.
class Unfinished : public program::Failure {
 public:
  Unfinished(const std::string& cause, const Outcome& outcome)
      : Failure(cause + "; " + outcome.text), guest(outcome.guest) {}
  const Guest guest;
};

/// A destination that has closed or reset one of its connections, or said that it failed. `status`: of its SHUT; 0:
/// none.
program::Failure destination_lost(std::uint32_t status = 0);

/// Any other failure of a connection to the destination.
program::Failure destination_failure(const multifd::Error& error);

/// Source and destination end epochs in different ways (format/packets.md section 6.1). `seen`: what shows it.
program::Failure styles_differ(multifd::SyncStyle source, const std::string& machine, const std::string& seen);

/// The failure of a destination that answered before, and no longer answers behind the first section, although the
/// source ends epochs with each round. `limit`: for how long it has not answered.
program::Failure no_answer(const std::string& machine, std::chrono::milliseconds limit);

}  // namespace relay
