// SPDX-License-Identifier: MIT
//
// Why a migration by multifd::migrate has come to nothing, for this side's user and for the other side: the library has
// its Error, a program's own functions throw, and a mapped file fails in whatever touches it.
#pragma once

#include <multifd/migrate/migration.hpp>
#include <multifd/result.hpp>

#include <cerrno>
#include <exception>
#include <optional>
#include <string>

#include "common/program.hpp"

namespace program {

/// Threads: one, the migration's. Outlives the call that has it.
class Reasons {
 public:
  /// Calls a function of the program's, which throws, for the library, which does not; what it throws is the reason.
  template <class Call>
  [[nodiscard]] multifd::Result<void> in_guest(const char* op, const Call& call) {
    try {
      call();
      return {};
    } catch (const std::exception& error) {
      thrown_.emplace(of_thrown(error));
      return multifd::fail_errno(multifd::Stage::none, op, EIO);
    }
  }

  /// What the other side is told: SourceOptions::reason, DestinationOptions::reason.
  std::string text(const multifd::Error& error) const;

  /// What this side's user is told when migrate_to() or migrate_from() has returned `error`.
  Failure failure(const multifd::Error& error, const multifd::migrate::Migration& migration) const;

 private:
  static Failure of_thrown(const std::exception& error);

  std::optional<Failure> thrown_;
};

}  // namespace program
