// SPDX-License-Identifier: MIT
//
// Waits for a descriptor that end by a deadline, an Interrupt, or both.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>

#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd {

namespace detail {

using Clock = std::chrono::steady_clock;

/// Milliseconds to a deadline, for poll() and epoll_wait(). Rounded up, so that no wait returns early and spins.
inline int poll_timeout(Clock::time_point deadline) noexcept {
  if (deadline == Clock::time_point::max()) return -1;
  const Clock::time_point now = Clock::now();
  if (deadline <= now) return 0;
  constexpr std::int64_t longest = std::numeric_limits<int>::max();
  const std::int64_t left = std::chrono::ceil<std::chrono::milliseconds>(deadline - now).count();
  return static_cast<int>(std::min(left, longest));
}

/// Waits until `fd` (or nothing: -1) has one of `events`, an error or a hang-up.
/// Errors: `cancelled` once `interrupt` (may be null) is triggered, `timed_out` at the deadline, errno.
[[nodiscard]] inline Result<void> wait_for(int fd, short events, Clock::time_point deadline, const Interrupt* interrupt,
                                           Stage stage, const char* op) noexcept {
  pollfd entries[] = {{.fd = fd, .events = events, .revents = 0},
                      {.fd = interrupt ? interrupt->native_handle() : -1, .events = POLLIN, .revents = 0}};
  for (;;) {
    const int ready = ::poll(entries, 2, poll_timeout(deadline));
    if (ready < 0 && errno != EINTR) return fail_errno(stage, op);
    if (ready > 0) {
      if (entries[1].revents != 0) return fail(Errc::cancelled, stage, op);
      return {};
    }
    if (Clock::now() >= deadline) return fail(Errc::timed_out, stage, op);
  }
}

}  // namespace detail
}  // namespace multifd
