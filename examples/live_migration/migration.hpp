// SPDX-License-Identifier: MIT
//
// The two halves of a live migration, each run in a process of its own: source() drives rounds until the guest is to be
// stopped, destination() receives and lets the guest go on. And what tells beforehand whether that will end: the dirty rate.
#pragma once

#include <multifd/migrate/source_options.hpp>

#include <chrono>
#include <cstdint>
#include <string>

#include "common/paths.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tls.hpp"
#include "live_migration/guest.hpp"

namespace live {

struct Settings {
  GuestConfig guest;
  Backend backend = Backend::automatic;
  program::StackOptions stack;
  program::TimeLimits limits;
  program::Tls tls;
  program::PathOptions paths;
  program::ResumeOptions resume;
  multifd::migrate::ConvergeOptions converge;
  multifd::migrate::PostcopyOptions postcopy;
  multifd::migrate::Verify verify = multifd::migrate::Verify::where_possible;
  bool skip_unchanged = false;
  double run_before_s = 0.5;  ///< the guest runs that long before its migration starts
  double run_after_s = 1.0;   ///< and that long on the other side before the verdict
  std::string json_path;
};

/// Waits for a time. Throws program::Failure when a signal came meanwhile.
void wait_for(double seconds, const multifd::Interrupt& interrupt);

/// For a progress line: what the migration is at.
std::string text_of(const multifd::migrate::MigrationProgress& progress, bool source);

/// Boots a guest and measures what it dirties, second by second; prints and returns it. Throws program::Failure.
nlohmann::json dirty_rate(const Settings& settings, std::chrono::milliseconds time,
                          const multifd::Interrupt& interrupt);

/// Boots a guest, migrates it over the paths and prints what happened; returns the report. Throws program::Failure.
nlohmann::json source(const Settings& settings, const multifd::Interrupt& interrupt);

/// Takes one guest from `listener` and runs it; returns the report. `memory_limit` bounds what a source may announce.
/// Throws program::Failure.
nlohmann::json destination(multifd::Listener& listener, const Settings& settings, std::uint64_t memory_limit,
                           const multifd::Interrupt& interrupt);

}  // namespace live
