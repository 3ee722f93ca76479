// SPDX-License-Identifier: MIT
//
// The programs' reports at their end: the JSON object with the keys that all of them share.
#pragma once

#include <multifd/stats.hpp>

#include <chrono>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "common/part_file.hpp"

namespace program {

/// Seconds since construction.
class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// The CPU time and page faults of a piece of work, over all threads of this process.
struct Spent {
  double began = 0;  ///< CLOCK_MONOTONIC, which all processes of a machine share
  double seconds = 0;
  double user_seconds = 0;
  double system_seconds = 0;
  std::uint64_t minor_faults = 0;
};

/// Counts from its construction.
class Meter {
 public:
  Meter() : start_(whole_process()) {}
  Spent spent() const;

 private:
  static Spent whole_process();
  Spent start_;
};

/// The keys that every program's JSON has, for a run that went well.
///
/// `ram_bytes`: page bytes moved, zero pages included; `main_zero_pages`: reported on the main connection.
nlohmann::json report(double seconds, std::uint64_t ram_bytes, std::uint64_t main_zero_pages,
                      const std::vector<multifd::ChannelStats>& channels);

/// Adds the keys "began", "cpu_seconds" with its parts "user_seconds" and "system_seconds", and "minor_faults".
void add_spent(nlohmann::json& object, const Spent& spent);

/// The value of a key that may have none: null when `text` is empty.
nlohmann::json text_or_null(const std::string& text);

/// The same keys for a run that failed.
nlohmann::json failure_report(const std::string& error, double seconds);

/// Where --json goes: a file, stdout for "-", nowhere for an empty path. Opened before the work, so that a path that
/// cannot be written is found at once, and an earlier run's report is not taken for this one's. An earlier report is
/// overwritten. Any other file is refused, and so is a report that another program has open.
class JsonFile {
 public:
  /// Throws Failure.
  explicit JsonFile(std::string path);
  /// Replaces the report. The migration is over, and the other side knows its outcome: so a report that cannot be
  /// written is a warning on stderr, not a failure.
  void write(const nlohmann::json& object) noexcept;

 private:
  std::string path_;
  Descriptor file_;
};

/// How the programs write JSON: indented, with a newline at its end.
std::string json_text(const nlohmann::json& object);

/// GiB per second.
double rate(double bytes, double seconds);

}  // namespace program
