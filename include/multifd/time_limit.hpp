// SPDX-License-Identifier: MIT
//
// The one rule for time limits that are settings, which means every std::chrono field of an options struct and what
// accept_channels() takes:
//
//   0         no limit; for what the kernel has a default for (keepalive, user_timeout), that default
//   positive  that long
//   negative  refused as Errc::bad_option with the setting's name, before anything is begun
//
// Calls that look once, Listener::accept(), peek_magic() and Receiver::finish(limit) among them, are told how long to wait instead: with 0 they do
// not wait, with no_timeout they wait for ever.
#pragma once

#include <chrono>

#include "multifd/result.hpp"

namespace multifd {

/// A time limit that never passes.
inline constexpr std::chrono::milliseconds no_timeout = std::chrono::milliseconds::max();

/// A setting as a length of time.
constexpr std::chrono::milliseconds as_timeout(std::chrono::milliseconds limit) noexcept {
  return limit.count() == 0 ? no_timeout : limit;
}

/// Errors: Errc::bad_option (op: the setting's name), for a negative one.
template <class Duration>
Result<void> check_time_limit(const char* name, Duration limit, Stage stage) noexcept {
  if (limit.count() < 0) return fail(Errc::bad_option, stage, name);
  return {};
}

}  // namespace multifd
