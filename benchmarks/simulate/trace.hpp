// SPDX-License-Identifier: MIT
//
// Trace: what a guest writes and what its link carries, over time. Generated (generate.hpp), or read from a file that a
// migration has left (README.md has the format).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "simulate/steps.hpp"

namespace simulate {

/// Pages that the guest writes to at random, each as likely as another.
struct WriteSet {
  Steps pages{};   ///< how many there are
  Steps writes{};  ///< how often each of them is written to, per second
};

/// A guest and its link.
struct Trace {
  std::string kind;
  std::string name;
  double ram_pages = 0;  ///< the bulk pass
  std::vector<WriteSet> sets{};
  Steps link{};  ///< pages per second; what zeros and compression save is in it
  Steps sync{};  ///< seconds that fetching the dirty bitmap takes
  double device_state_s = 0;
  double round_trip_s = 0;
  double time_limit_s = 1200;
};

/// The JSON object of a trace: format, version and "sets".
nlohmann::json to_json(const Trace& trace);

/// Reads a trace, with "sets" or "rounds", or the report of a migration. Throws program::Failure that names what is wrong.
Trace trace_from_json(const nlohmann::json& object, const std::string& name);

/// Reads a file. Throws program::Failure.
Trace read_trace(const std::string& path);

}  // namespace simulate
