// SPDX-License-Identifier: MIT
//
// A switch that ends waits: pass its address to connect_to(), Listener::accept() and peek_magic(), and trigger it from
// another thread or from a signal handler. The switch is an eventfd, so that poll() can wait for it beside a socket.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <functional>
#include <utility>

#include "multifd/result.hpp"
#include "multifd/transport/detail/unique_fd.hpp"

namespace multifd {

/// Ends waits from outside. Once triggered it stays triggered.
/// Threads: any; trigger() also in a signal handler. Lifetime: it has to outlive the waits that got it.
class Interrupt {
 public:
  /// Errors: the errno of eventfd(), when the process has no descriptors left. Cost: one descriptor.
  [[nodiscard]] static Result<Interrupt> create() noexcept {
    detail::UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (fd.get() < 0) return fail_errno(Stage::setup, "eventfd");
    return Interrupt(std::move(fd));
  }

  /// Ends all waits that got this object, those under way and later ones.
  /// Threads: any thread, any number of times; async-signal-safe (keeps errno, too).
  void trigger() noexcept {
    const int saved_errno = errno;
    const std::uint64_t one = 1;
    // write() fails only when the counter is full, and then the switch is triggered already.
    [[maybe_unused]] const ssize_t written = ::write(fd_.get(), &one, sizeof one);
    errno = saved_errno;
  }

  /// Whether trigger() was called. Threads: any thread. Cost: one poll().
  bool triggered() const noexcept {
    pollfd entry{.fd = fd_.get(), .events = POLLIN, .revents = 0};
    return ::poll(&entry, 1, 0) == 1;
  }

  /// A descriptor that is readable from the first trigger() on. Poll it, do not read it.
  int native_handle() const noexcept { return fd_.get(); }

 private:
  explicit Interrupt(detail::UniqueFd fd) noexcept : fd_(std::move(fd)) {}

  detail::UniqueFd fd_;
};

/// For who polls: whether `interrupt` (not owned, may be null) has been triggered.
inline std::function<bool()> when_triggered(const Interrupt* interrupt) {
  if (interrupt == nullptr) return {};
  return [interrupt] { return interrupt->triggered(); };
}

}  // namespace multifd
