// SPDX-License-Identifier: MIT
//
// What a contract check found, as text: for any test framework, or none. Every contract helper of this folder
// returns one: `auto report = check_...(policy); CHECK_MESSAGE(report.ok(), report.text());`
// Like everything in testing/, it may allocate and throw; the library itself never includes it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace multifd {

/// The outcome of a contract check: empty `failures` means that the contract was kept.
struct ContractReport {
  std::vector<std::string> failures;  ///< one sentence for each broken rule
  std::vector<std::string> notes;     ///< what the contract leaves open, and what was seen

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

  /// Adds all that another report holds.
  void merge(const ContractReport& other) {
    failures.insert(failures.end(), other.failures.begin(), other.failures.end());
    notes.insert(notes.end(), other.notes.begin(), other.notes.end());
  }

  /// All failures, one a line, for a test's message.
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
