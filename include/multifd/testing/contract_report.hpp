// SPDX-License-Identifier: MIT
//
// The findings of a contract check as text, for any test framework or none. Every contract check of this folder
// returns such a report: `auto report = check_...(policy); CHECK_MESSAGE(report.ok(), report.text());`
// Like everything in testing/, it may allocate and throw; the library itself never includes it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace multifd {

/// The outcome of a contract check: empty `failures` means that the contract was kept.
struct ContractReport {
  std::vector<std::string> failures;  ///< one sentence for each broken rule
  std::vector<std::string> notes;     ///< observations that the contract leaves open

  bool ok() const { return failures.empty(); }

  /// Adds one failure.
  void fail(std::string what) { failures.push_back(std::move(what)); }

  /// Adds one observation that breaks no rule.
  void note(std::string what) { notes.push_back(std::move(what)); }

  /// Adds `what` as a failure unless `held`. Returns `held`, so that a check can stop at its first failure.
  bool expect(bool held, std::string what) {
    if (!held) fail(std::move(what));
    return held;
  }

  /// Adds the contents of another report.
  void merge(const ContractReport& other) {
    failures.insert(failures.end(), other.failures.begin(), other.failures.end());
    notes.insert(notes.end(), other.notes.begin(), other.notes.end());
  }

  /// All failures, one on each line, for a test's message.
  std::string text() const {
    std::string all;
    for (const std::string& failure : failures) {
      if (!all.empty()) all += '\n';
      all += failure;
    }
    return all;
  }
};

}  // namespace multifd
