// SPDX-License-Identifier: MIT
//
// The one rule for time limits that are settings, which means every std::chrono field of an options struct and what
// accept_channels() takes:
//
//   0         no limit; where the kernel has a default (keepalive, user_timeout), that default
//   positive  that long
//   negative  refused as Errc::bad_option with the setting's name, before the call does anything else
//
// Calls that poll, Listener::accept(), peek_magic() and Receiver::finish(limit) among them, take a time to wait
// instead: with 0 they do not wait, with no_timeout they wait for ever.
#pragma once

#include <chrono>

#include "multifd/result.hpp"

namespace multifd {

/// A time limit that never passes.
inline constexpr std::chrono::milliseconds no_timeout = std::chrono::milliseconds::max();

/// A setting as a time to wait: 0 becomes no_timeout.
constexpr std::chrono::milliseconds as_timeout(std::chrono::milliseconds limit) noexcept {
  return limit.count() == 0 ? no_timeout : limit;
}

/// When a wait of `timeout` that starts now is over. Without overflow for any value: behind no_timeout, never.
inline std::chrono::steady_clock::time_point deadline_after(std::chrono::milliseconds timeout) noexcept {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point now = Clock::now();
  if (timeout.count() <= 0) return now;
  const auto room = std::chrono::floor<std::chrono::milliseconds>(Clock::time_point::max() - now);
  return timeout >= room ? Clock::time_point::max() : now + timeout;
}

/// Checks a setting. Params: `name`: the setting's, static text. Errors: Errc::bad_option (op: the name) when it is
/// negative.
template <class Duration>
[[nodiscard]] Result<void> check_time_limit(const char* name, Duration limit, Stage stage) noexcept {
  if (limit.count() < 0) return fail(Errc::bad_option, stage, name);
  return {};
}

}  // namespace multifd
