// SPDX-License-Identifier: MIT
//
// The socket below a GnuTLS session. GnuTLS reads and writes through pull() and push() here, so that each of its waits
// ends by a deadline, an Interrupt, or the socket's own shutdown().
#pragma once

#include <gnutls/gnutls.h>
#include <poll.h>

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
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/fd.hpp"

namespace multifd::detail {

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

  TlsLink& link() noexcept { return link_; }
  int native_handle() const noexcept { return link_.native_handle(); }

  /// Whether the stream, once link().ended(), ended between two records.
  bool ended_between_records() const noexcept { return between_records_; }

  /// The alert in the last record that came, if that was one in plain text. Under TLS 1.3 a client by OpenSSL sends its
  /// alerts so until its last flight, and GnuTLS takes them for records that do not decrypt.
  std::optional<int> plain_alert() const noexcept { return plain_alert_; }

  Direction writes;                     ///< of the sending thread
  alignas(cache_line) Direction reads;  ///< of the receiving thread

 private:
  static constexpr std::size_t header_bytes = 5;  // of a record

  // The functions that GnuTLS calls. -1 with errno: after EAGAIN the call can be repeated, after EIO it cannot.

  ssize_t push(ConstBuffers buffers) noexcept {
    const Result<std::size_t> count = link_.send(buffers, writes.wait);
    if (count) return static_cast<ssize_t>(*count);
    return refuse(writes, count.error());
  }

  ssize_t pull(void* data, std::size_t size) noexcept {
    if (header_ahead_ > 0) {
      const std::size_t count = std::min(size, header_ahead_);
      std::memcpy(data, next_header_.data(), count);
      header_ahead_ -= count;
      note(data, count, size);
      std::memmove(next_header_.data(), next_header_.data() + count, header_ahead_);
      return static_cast<ssize_t>(count);
    }
    // GnuTLS asks for a record's header, then for the rest. The next header comes with the rest: one system call.
    const iovec buffers[] = {{data, size}, {next_header_.data(), size > header_bytes ? header_bytes : 0}};
    const Result<std::size_t> count = link_.receive(buffers, reads.wait);
    if (!count) return refuse(reads, count.error());
    if (*count == 0) between_records_ = size == header_bytes;  // nothing of the next header had come
    if (*count > size) header_ahead_ = *count - size;
    note(data, std::min(*count, size), size);
    return static_cast<ssize_t>(std::min(*count, size));
  }

  /// Keeps a record's header, and what an alert in plain text says.
  void note(const void* data, std::size_t count, std::size_t asked) noexcept {
    const auto* const bytes = static_cast<const std::byte*>(data);
    if (asked == header_bytes && count > 0) in_alert_ = bytes[0] == std::byte{0x15};
    if (in_alert_ && asked == 2 && count == 2) plain_alert_ = std::to_integer<int>(bytes[1]);
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

  // Used by the receiving thread.
  bool between_records_ = false;
  bool in_alert_ = false;
  std::optional<int> plain_alert_{};
  std::size_t header_ahead_ = 0;
  std::array<std::byte, header_bytes> next_header_{};

  TlsLink link_;
};

}  // namespace multifd::detail
