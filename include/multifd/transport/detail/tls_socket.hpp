// SPDX-License-Identifier: MIT
//
// The socket below a GnuTLS session. GnuTLS reads and writes through pull() and push() here, so that each of its waits
// ends by a deadline, an Interrupt, or the socket's own shutdown(). GnuTLS makes a call for each record, or two. A system
// call comes of several: the records of one write leave together, and what has come behind a record is received with it.
#pragma once

#include <gnutls/gnutls.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_batch.hpp"
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
    bool several = false;           ///< records are gathered, until send_batch(); more is received than was asked for
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

  /// How many full records the next write should gather. Threads: the sending one.
  std::size_t batch_records(const TlsWait* wait) const noexcept { return batch_.records(wait); }

  /// From now on, and while writes.several, what is pushed is gathered. Errors: ENOMEM. Threads: the sending one.
  [[nodiscard]] Result<void> begin_batch() noexcept {
    if (auto begun = batch_.begin(); !begun) return begun;
    writes.several = true;
    return {};
  }

  /// Sends what has been gathered. Threads: the sending one.
  [[nodiscard]] Result<void> send_batch() noexcept { return batch_.send(link_, writes.wait); }

  /// Memory for reads.several. Errors: ENOMEM. Threads: the receiving one.
  [[nodiscard]] Result<void> receive_several() noexcept {
    if (auto room = allocate(behind_, tls_receive_bytes); !room) return room;
    reads.several = true;
    return {};
  }

  /// Whether GnuTLS can take another whole record without a call of the socket. Threads: the receiving one.
  bool record_ahead() const noexcept {
    const std::span<const std::byte> ahead = this->ahead();
    return between_records() && ahead.size() >= header_bytes && ahead.size() - header_bytes >= body_of(ahead);
  }

  /// Whether GnuTLS has whole records: then a stream that has ended did so between two. Threads: the receiving one.
  bool between_records() const noexcept { return head_bytes_ == 0 && body_left_ == 0; }

  /// The alert in the last record that came, if that was one in plain text. Under TLS 1.3 a client by OpenSSL sends its
  /// alerts so until its last flight, and GnuTLS takes them for records that do not decrypt.
  std::optional<int> plain_alert() const noexcept { return plain_alert_; }

  Direction writes;                     ///< of the sending thread
  alignas(cache_line) Direction reads;  ///< of the receiving thread

 private:
  static constexpr std::size_t header_bytes = 5;  // of a record

  // The functions that GnuTLS calls. -1 with errno: after EAGAIN the call can be repeated, after EIO it cannot.

  ssize_t push(ConstBuffers buffers) noexcept {
    if (!writes.several) {
      const Result<std::size_t> count = link_.send(buffers, writes.wait);
      return count ? static_cast<ssize_t>(*count) : refuse(writes, count.error());
    }
    const std::size_t size = total_bytes(buffers);
    // Where the peer wants small records, a batch has more of them.
    if (!batch_.fits(size)) {
      if (auto sent = send_batch(); !sent) return refuse(writes, sent.error());
    }
    for (const iovec& buffer : buffers) {
      if (buffer.iov_len > 0) std::memcpy(batch_.room(), buffer.iov_base, buffer.iov_len);
      batch_.add(buffer.iov_len);
    }
    return static_cast<ssize_t>(size);
  }

  /// GnuTLS asks for a record's header, then for the rest.
  ssize_t pull(void* data, std::size_t size) noexcept {
    std::size_t count = std::min(size, ahead().size());
    if (count > 0) {
      std::memcpy(data, ahead().data(), count);
      behind_begin_ += count;
    } else {
      // Into GnuTLS' memory, and what lies behind it into this object's: at the least the next header.
      const iovec into[] = {{data, size}, behind(size)};
      const Result<std::size_t> received = link_.receive(into, reads.wait);
      if (!received) return refuse(reads, received.error());
      count = std::min(*received, size);
      behind_begin_ = 0;
      behind_end_ = *received - count;
      in_memory_ = reads.several;
    }
    note({static_cast<const std::byte*>(data), count});
    return static_cast<ssize_t>(count);
  }

  /// Where bytes go that were not asked for, with `size` that were. A small read, which may be a look at the first bytes,
  /// leaves at the socket what it does not need: others ask the socket whether there is more.
  iovec behind(std::size_t size) noexcept {
    if (reads.several) return mutable_buffer(std::span(behind_.get(), tls_receive_bytes));
    return mutable_buffer(std::span(next_header_).first(size > header_bytes ? header_bytes : 0));
  }

  /// What has been received, and GnuTLS has not asked for.
  std::span<const std::byte> ahead() const noexcept {
    const std::byte* const begin = in_memory_ ? behind_.get() : next_header_.data();
    return {begin + behind_begin_, behind_end_ - behind_begin_};
  }

  static std::size_t body_of(std::span<const std::byte> header) noexcept {
    return std::to_integer<std::size_t>(header[3]) << 8 | std::to_integer<std::size_t>(header[4]);
  }

  /// Follows the records in what GnuTLS gets, and keeps what an alert in plain text says.
  void note(std::span<const std::byte> bytes) noexcept {
    while (!bytes.empty()) {
      if (body_left_ == 0) {
        head_[head_bytes_++] = bytes.front();
        bytes = bytes.subspan(1);
        if (head_bytes_ < header_bytes) continue;
        head_bytes_ = 0;
        body_left_ = body_of(head_);
        in_alert_ = head_[0] == std::byte{0x15} && body_left_ == 2;
        continue;
      }
      const std::size_t count = std::min(bytes.size(), body_left_);
      body_left_ -= count;
      if (in_alert_ && body_left_ == 0) plain_alert_ = std::to_integer<int>(bytes[count - 1]);
      bytes = bytes.subspan(count);
    }
  }

  int readable(unsigned milliseconds) noexcept {
    if (!ahead().empty()) return 1;
    pollfd entry{.fd = link_.native_handle(), .events = POLLIN, .revents = 0};
    return ::poll(&entry, 1, milliseconds == GNUTLS_INDEFINITE_TIMEOUT ? -1 : static_cast<int>(milliseconds));
  }

  static ssize_t refuse(Direction& direction, const Error& error) noexcept {
    direction.error = error;
    errno = ended_by_wait(error) ? EAGAIN : EIO;
    return -1;
  }

  TlsBatch batch_;  // of the sending thread

  // Used by the receiving thread.
  alignas(cache_line) TlsMemory behind_;
  std::array<std::byte, header_bytes> next_header_{};
  std::size_t behind_begin_ = 0, behind_end_ = 0;  ///< of `behind_`, or of `next_header_`
  bool in_memory_ = false;                         ///< of `behind_`
  std::array<std::byte, header_bytes> head_{};     ///< of the record that GnuTLS gets
  std::size_t head_bytes_ = 0;
  std::size_t body_left_ = 0;
  bool in_alert_ = false;
  std::optional<int> plain_alert_{};

  TlsLink link_;
};

}  // namespace multifd::detail
