// SPDX-License-Identifier: MIT
#include "common/reasons.hpp"

#include "common/limits.hpp"
#include "common/mapped_file.hpp"

namespace program {

Failure Reasons::of_thrown(const std::exception& error) {
  const auto* const failure = dynamic_cast<const Failure*>(&error);
  return cause_of(failure != nullptr ? *failure : Failure(text_of(error)));
}

std::string Reasons::text(const multifd::Error& error) const {
  return thrown_ ? thrown_->what() : cause_of(Failure(error)).what();
}

Failure Reasons::failure(const multifd::Error& error, const multifd::migrate::Migration& migration) const {
  if (thrown_) return *thrown_;
  const std::string theirs = migration.peer_text();
  return cause_of(error.code == multifd::Errc::peer_gave_up && !theirs.empty() ? Failure::of_peer(theirs)
                                                                               : Failure(error));
}

}  // namespace program
