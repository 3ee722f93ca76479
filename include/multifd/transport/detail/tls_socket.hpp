// SPDX-License-Identifier: MIT
//
// The socket below a GnuTLS session. GnuTLS reads and writes through pull() and push() here, so that each of its waits
// ends by a deadline, an Interrupt, or the socket's own shutdown().
#pragma once

#include <gnutls/gnutls.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"

namespace multifd::detail {

/// What ends a wait besides the socket. Default: nothing.
struct TlsWait {
  Clock::time_point deadline = Clock::time_point::max();
  const Interrupt* interrupt = nullptr;
};

/// Threads: after the handshake one for `writes`, another for `reads` and what was read; each direction's state is in a
/// cache line of its own. Errors are passed in errno, which is per thread, and in Direction, never through
/// gnutls_transport_set_errno().
class TlsSocket {
 public:
  /// One direction of the call that is under way.
  struct Direction {
    const TlsWait* wait = nullptr;  ///< null: only the socket ends the wait
    std::optional<Error> error{};   ///< why pull() or push() gave up
  };

  explicit TlsSocket(FdTransport link) noexcept : link_(std::move(link)) {}

  /// Makes `session` read and write here. This object must not move afterwards.
  void attach(gnutls_session_t session) noexcept {
    ::gnutls_transport_set_ptr(session, this);
    ::gnutls_transport_set_vec_push_function(session, [](void* self, const giovec_t* buffers, int count) {
      return static_cast<TlsSocket*>(self)->push({buffers, static_cast<std::size_t>(count)});
    });
    ::gnutls_transport_set_pull_function(session, [](void* self, void* data, std::size_t size) {
      return static_cast<TlsSocket*>(self)->pull(data, size);
    });
    ::gnutls_transport_set_pull_timeout_function(session, [](void* self, unsigned milliseconds) {
      return static_cast<TlsSocket*>(self)->readable(milliseconds);
    });
  }

  FdTransport& link() noexcept { return link_; }
  int native_handle() const noexcept { return link_.native_handle(); }

  /// Whether the peer's stream has ended, and whether it ended between two records.
  bool ended() const noexcept { return ended_; }
  bool ended_between_records() const noexcept { return between_records_; }

  /// False when the peer's first byte cannot begin a TLS record.
  bool may_speak_tls() const noexcept {
    return !first_byte_ || *first_byte_ == std::byte{0x16} || *first_byte_ == std::byte{0x15};
  }

  Direction writes;                     ///< of the sending thread
  alignas(cache_line) Direction reads;  ///< of the receiving thread

 private:
  static constexpr std::size_t header_bytes = 5;  // of a record

  // The functions that GnuTLS calls. -1 with errno: after EAGAIN the call can be repeated, after EIO it cannot.

  ssize_t push(ConstBuffers buffers) noexcept {
    const auto count = [&]() -> Result<std::size_t> {
      if (writes.wait == nullptr) return link_.write_some(buffers);
      for (;;) {
        const int fd = link_.native_handle();
        if (auto ready = wait_for(fd, POLLOUT, writes.wait->deadline, writes.wait->interrupt, Stage::write, "write");
            !ready)
          return std::unexpected(ready.error());
        msghdr message{};
        message.msg_iov = const_cast<iovec*>(buffers.data());
        message.msg_iovlen = buffers.size();
        const ssize_t sent = ::sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) return static_cast<std::size_t>(sent);
        if (errno != EAGAIN && errno != EINTR) return fail_errno(Stage::write, "write");
      }
    }();
    if (count) return static_cast<ssize_t>(*count);
    return refuse(writes, count.error());
  }

  ssize_t pull(void* data, std::size_t size) noexcept {
    if (header_ahead_ > 0) {
      const std::size_t count = std::min(size, header_ahead_);
      std::memcpy(data, next_header_.data(), count);
      header_ahead_ -= count;
      std::memmove(next_header_.data(), next_header_.data() + count, header_ahead_);
      return static_cast<ssize_t>(count);
    }
    const auto count = [&]() -> Result<std::size_t> {
      if (reads.wait != nullptr) {
        if (auto ready = wait_for(link_.native_handle(), POLLIN, reads.wait->deadline, reads.wait->interrupt,
                                  Stage::read, "read");
            !ready)
          return std::unexpected(ready.error());
      }
      // GnuTLS asks for a record's header, then for the rest. The next header comes with the rest: one system call.
      const iovec buffers[] = {{data, size}, {next_header_.data(), size > header_bytes ? header_bytes : 0}};
      return link_.read_some(buffers);
    }();
    if (!count) return refuse(reads, count.error());
    if (*count == 0) {
      ended_ = true;
      between_records_ = size == header_bytes;  // nothing of the next header had come
    }
    if (*count > size) header_ahead_ = *count - size;
    if (*count > 0 && !first_byte_) first_byte_ = *static_cast<std::byte*>(data);
    return static_cast<ssize_t>(std::min(*count, size));
  }

  int readable(unsigned milliseconds) noexcept {
    if (header_ahead_ > 0) return 1;
    pollfd entry{.fd = link_.native_handle(), .events = POLLIN, .revents = 0};
    return ::poll(&entry, 1, milliseconds == GNUTLS_INDEFINITE_TIMEOUT ? -1 : static_cast<int>(milliseconds));
  }

  static ssize_t refuse(Direction& direction, const Error& error) noexcept {
    direction.error = error;
    errno = ended_by_wait(error) ? EAGAIN : EIO;
    return -1;
  }

  static bool ended_by_wait(const Error& error) noexcept {
    return error.code == Errc::timed_out || error.code == Errc::cancelled;
  }

  // Used by the receiving thread.
  bool ended_ = false;
  bool between_records_ = false;
  std::optional<std::byte> first_byte_;  // of the peer
  std::size_t header_ahead_ = 0;
  std::array<std::byte, header_bytes> next_header_{};

  FdTransport link_;
};

}  // namespace multifd::detail
