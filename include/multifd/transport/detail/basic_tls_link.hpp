// SPDX-License-Identifier: MIT
//
// The socket below a TLS session, of any library: each of its waits ends by a deadline, an Interrupt, or the socket's
// own shutdown().
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstddef>
#include <optional>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::detail {

/// What ends a wait besides the socket. Default: nothing.
struct TlsWait {
  Clock::time_point deadline = Clock::time_point::max();
  const Interrupt* interrupt = nullptr;
};

/// A wait that ends at once.
inline constexpr TlsWait no_wait{.deadline = Clock::time_point::min()};

/// Whether a wait ended, and the same call can be made again.
inline bool ended_by_wait(const Error& error) noexcept {
  return error.code == Errc::timed_out || error.code == Errc::cancelled;
}

/// Threads: one calls send(), another receive(); shutdown() any.
class TlsLink {
 public:
  explicit TlsLink(FdTransport link) noexcept : link_(std::move(link)) {}

  /// Sends some bytes. Params `wait`: null: only the socket ends the wait.
  [[nodiscard]] Result<std::size_t> send(ConstBuffers buffers, const TlsWait* wait) noexcept {
    if (wait == nullptr) return link_.write_some(buffers);
    for (;;) {
      const int fd = link_.native_handle();
      if (auto ready = wait_for(fd, POLLOUT, wait->deadline, wait->interrupt, Stage::write, "write"); !ready)
        return std::unexpected(ready.error());
      msghdr message{};
      message.msg_iov = const_cast<iovec*>(buffers.data());
      message.msg_iovlen = buffers.size();
      const ssize_t sent = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent >= 0) return static_cast<std::size_t>(sent);
      if (errno != EAGAIN && errno != EINTR) return fail_errno(Stage::write, "write");
    }
  }

  /// Receives some bytes; 0 at the end. Params `wait`: as send().
  [[nodiscard]] Result<std::size_t> receive(MutableBuffers buffers, const TlsWait* wait) noexcept {
    if (wait != nullptr) {
      if (auto ready = wait_for(link_.native_handle(), POLLIN, wait->deadline, wait->interrupt, Stage::read, "read");
          !ready)
        return std::unexpected(ready.error());
    }
    const Result<std::size_t> count = link_.read_some(buffers);
    if (count && *count == 0) ended_ = true;
    if (count && *count > 0 && !first_byte_) first_byte_ = *static_cast<const std::byte*>(buffers[0].iov_base);
    return count;
  }

  [[nodiscard]] Result<void> finish() noexcept { return link_.finish(); }
  void shutdown() noexcept { link_.shutdown(); }
  int native_handle() const noexcept { return link_.native_handle(); }

  /// Whether the peer's stream has ended. Threads: the receiving one.
  bool ended() const noexcept { return ended_; }

  /// False when the peer's first byte cannot begin a TLS record. Threads: the receiving one.
  bool may_speak_tls() const noexcept {
    return !first_byte_ || *first_byte_ == std::byte{0x16} || *first_byte_ == std::byte{0x15};
  }

 private:
  // Used by the receiving thread.
  bool ended_ = false;
  std::optional<std::byte> first_byte_;  // of the peer

  FdTransport link_;
};

}  // namespace multifd::detail
