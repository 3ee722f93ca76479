// SPDX-License-Identifier: MIT
//
// One GnuTLS session on top of a socket: the handshake in steps that never block, then records. GnuTLS reads and writes
// through pull() and push() here, so that every wait of it is one of ours: with a deadline, an Interrupt, or the
// socket's own shutdown().
//
// Two threads: GnuTLS lets one thread send and another receive on the same session once the handshake is done, because
// each direction has its own keys, sequence and buffers. What both would touch is kept apart here: the state of a call
// is held per direction, errors travel in errno (which belongs to a thread) and never through
// gnutls_transport_set_errno(), and there is no renegotiation. Receiving is behind a lock, for the one case in which
// the sender looks, too: a broken stream whose reason may lie unread in front of it.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/tls_error.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/tls_credentials.hpp"

namespace multifd {

/// What counts as the orderly end of a stream that is received.
enum class TlsEnd : std::uint8_t {
  close_notify,  ///< only the peer's close_notify: what is cut by somebody else is an error
  fin,           ///< the connection's end between two records, too: QEMU's main stream, and QEMU's channels before 10.0
};

namespace detail {

/// What ends a wait besides the socket. The default is nothing.
struct TlsWait {
  Clock::time_point deadline = Clock::time_point::max();
  const Interrupt* interrupt = nullptr;
};

/// Threads: step() by one; then write() and finish() by one, read() and look() by one; shutdown() by any.
class TlsSession {
 public:
  enum class Progress { done, wants_read, wants_write };
  static constexpr std::chrono::milliseconds handshake_timeout{10'000};
  static constexpr const char* silent_peer =
      "TLS handshake: the peer is silent; is it alive, and is TLS on there, too?";

  /// Params `hostname`: what the server's certificate must be for; a client with certificates needs it.
  static Result<std::unique_ptr<TlsSession>> create(FdTransport link, const TlsCredentials& credentials,
                                                    std::string hostname, TlsEnd end) {
    if (credentials.verifies_hostname() && hostname.empty())
      return fail(Errc::bad_option, Stage::setup, "TLS: the name to expect in the server's certificate is missing");
    std::unique_ptr<TlsSession> made(new TlsSession(std::move(link), credentials, std::move(hostname), end));
    if (const int code = made->init(); code < 0) return fail_tls(code, Stage::setup, "TLS session");
    return made;
  }

  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;
  ~TlsSession() {
    if (session_ != nullptr) ::gnutls_deinit(session_);
  }

  /// Goes on with the handshake as far as it gets without waiting. A failure is told to the peer.
  Result<Progress> step() noexcept {
    const TlsWait no_wait{.deadline = Clock::time_point::min()};
    for (;;) {
      reads_ = {.wait = &no_wait};
      writes_ = {.wait = &no_wait};
      const int code = ::gnutls_handshake(session_);
      if (code == GNUTLS_E_SUCCESS) {
        established_ = true;
        return Progress::done;
      }
      if (code == GNUTLS_E_AGAIN && writes_.error) return blocked(writes_, Progress::wants_write);
      if (code == GNUTLS_E_AGAIN && reads_.error) return blocked(reads_, Progress::wants_read);
      if (::gnutls_error_is_fatal(code) == 0) continue;  // a warning, or half of a message
      return give_up(code);
    }
  }

  /// The whole handshake, where step() has not made it: in the writing thread, before anything is read.
  Result<void> handshake() noexcept {
    for (const Clock::time_point deadline = deadline_after(handshake_timeout);;) {
      const auto progress = step();
      if (!progress) return std::unexpected(progress.error());
      if (*progress == Progress::done) return {};
      const short wanted = *progress == Progress::wants_write ? POLLOUT : POLLIN;
      if (auto ready = wait_for(link_.native_handle(), wanted, deadline, nullptr, Stage::handshake, silent_peer);
          !ready)
        return ready;
    }
  }

  /// Writes all of `buffers`, in records as large as TLS has them.
  Result<std::size_t> write(ConstBuffers buffers, const TlsWait* wait) noexcept {
    if (finished_) return fail(Errc::already_closed, Stage::write, "write");
    if (write_failed_) return std::unexpected(*write_failed_);
    if (!established_) {
      if (auto done = handshake(); !done) {
        write_failed_ = done.error();
        return std::unexpected(done.error());
      }
    }
    writes_ = {.wait = wait};
    for (const iovec& buffer : buffers) {
      const auto* bytes = static_cast<const std::byte*>(buffer.iov_base);
      for (std::size_t left = buffer.iov_len; left > 0;) {
        // A record that one buffer fills goes out from there; smaller pieces (a header, the pages after it) are
        // gathered first, or each would be a record and a system call of its own.
        std::size_t taken = record_bytes;
        Result<void> sent;
        if (gathered_ == 0 && left >= record_bytes) {
          sent = send(bytes, record_bytes);
        } else {
          taken = std::min(left, record_bytes - gathered_);
          std::memcpy(record_.data() + gathered_, bytes, taken);
          gathered_ += taken;
          if (gathered_ == record_bytes) sent = flush();
        }
        if (!sent) return std::unexpected(sent.error());
        bytes += taken;
        left -= taken;
      }
    }
    if (auto sent = flush(); !sent) return std::unexpected(sent.error());
    return total_bytes(buffers);
  }

  /// Reads what one record brings, or what is left of one.
  Result<std::size_t> read(MutableBuffers buffers, const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    std::size_t arrived = 0;
    for (const iovec& buffer : buffers) {
      auto* bytes = static_cast<std::byte*>(buffer.iov_base);
      for (std::size_t left = buffer.iov_len; left > 0;) {
        if (arrived > 0 && ahead_bytes_ == 0 && ::gnutls_record_check_pending(session_) == 0) return arrived;
        const Result<std::size_t> count =
            ahead_bytes_ > 0 ? Result<std::size_t>(take_ahead(bytes, left)) : receive(bytes, left, wait);
        if (!count) return count;
        if (*count == 0) return arrived;
        arrived += *count;
        bytes += *count;
        left -= *count;
      }
    }
    return arrived;
  }

  /// Up to four bytes that read() will deliver next. Fewer: there are no more yet, or none will come (`ended`).
  struct Ahead {
    std::array<std::byte, 4> bytes{};
    std::size_t count = 0;
    bool ended = false;
  };
  Result<Ahead> look(const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    return look_under_lock(wait);
  }

  /// Looks, without waiting, whether the peer's alert has come. Errors: that, or how else the stream is broken.
  Result<void> probe() noexcept {
    if (!established_) {
      auto progress = step();
      return progress ? Result<void>{} : std::unexpected(progress.error());
    }
    const TlsWait no_wait{.deadline = Clock::time_point::min()};
    auto ahead = look(&no_wait);
    return ahead ? Result<void>{} : std::unexpected(ahead.error());
  }

  /// close_notify, then FIN.
  Result<void> finish() noexcept {
    if (finished_) return {};
    if (write_failed_) {
      Error error = *write_failed_;
      error.stage = Stage::close;
      return std::unexpected(error);
    }
    writes_ = {};
    int code = 0;
    do code = ::gnutls_bye(session_, GNUTLS_SHUT_WR);
    while (code == GNUTLS_E_INTERRUPTED || (code == GNUTLS_E_AGAIN && !writes_.error));
    if (code < 0) return std::unexpected(failure(code, writes_, Stage::close, "close_notify"));
    // A peer that needs nothing more may have closed, and then the close_notify itself is what breaks the connection.
    if (auto ended = link_.finish(); !ended && ended.error().code != std::errc::not_connected) return ended;
    finished_ = true;
    return {};
  }

  void shutdown() noexcept { link_.shutdown(); }
  int native_handle() const noexcept { return link_.native_handle(); }
  std::string version() const {
    const std::unique_ptr<char, void (*)(void*)> text(::gnutls_session_get_desc(session_), ::gnutls_free);
    return text ? text.get() : "";
  }

 private:
  static constexpr std::size_t record_bytes = 16 * 1024;  // the most that a record holds
  static constexpr std::size_t header_bytes = 5;          // of a record

  /// One direction of the call that is under way.
  struct Direction {
    const TlsWait* wait = nullptr;  ///< null: the socket alone ends it
    std::optional<Error> error{};   ///< why pull() or push() gave up
  };

  TlsSession(FdTransport link, const TlsCredentials& credentials, std::string hostname, TlsEnd end)
      : link_(std::move(link)), credentials_(credentials), hostname_(std::move(hostname)), end_(end) {}

  int init() noexcept {
    const bool server = credentials_.role() == TlsRole::server;
    // No tickets: a source never reads, and what it has not read makes its kernel reset the connection when it closes,
    // which loses data on the way (PROTOCOL.md section 14).
    // A client shows its certificate even when the server's list of authorities says that it will be refused: then the
    // server says why.
    const unsigned flags = server ? GNUTLS_SERVER | GNUTLS_NO_TICKETS : GNUTLS_CLIENT | GNUTLS_FORCE_CLIENT_CERT;
    if (const int code = ::gnutls_init(&session_, flags); code < 0) return code;
    if (const int code = credentials_.apply(session_); code < 0) return code;
    if (credentials_.uses_certificates()) {
      const char* const purpose = server ? GNUTLS_KP_TLS_WWW_CLIENT : GNUTLS_KP_TLS_WWW_SERVER;
      const auto text = [](const char* from) { return reinterpret_cast<unsigned char*>(const_cast<char*>(from)); };
      verify_[0] = {.type = GNUTLS_DT_KEY_PURPOSE_OID, .data = text(purpose), .size = 0};
      verify_[1] = {.type = GNUTLS_DT_DNS_HOSTNAME, .data = text(hostname_.c_str()), .size = 0};
      ::gnutls_session_set_verify_cert2(session_, verify_.data(), server ? 1 : 2, 0);
      if (server) {
        ::gnutls_certificate_server_set_request(session_, GNUTLS_CERT_REQUIRE);
        // Not which authorities are taken: a client of another one would show no certificate, and nobody would know why.
        ::gnutls_certificate_send_x509_rdn_sequence(session_, 1);
      }
    }
    ::gnutls_handshake_set_timeout(session_, 0);  // the caller's deadline is the one
    ::gnutls_transport_set_ptr(session_, this);
    ::gnutls_transport_set_vec_push_function(session_, [](void* self, const giovec_t* buffers, int count) {
      return static_cast<TlsSession*>(self)->push({buffers, static_cast<std::size_t>(count)});
    });
    ::gnutls_transport_set_pull_function(session_, [](void* self, void* data, std::size_t size) {
      return static_cast<TlsSession*>(self)->pull(data, size);
    });
    ::gnutls_transport_set_pull_timeout_function(session_, [](void* self, unsigned milliseconds) {
      return static_cast<TlsSession*>(self)->readable(milliseconds);
    });
    return 0;
  }

  // What GnuTLS calls. -1 with errno: EAGAIN can be taken up again, EIO cannot.

  ssize_t push(ConstBuffers buffers) noexcept {
    const auto count = [&]() -> Result<std::size_t> {
      if (writes_.wait == nullptr) return link_.write_some(buffers);
      for (;;) {
        const int fd = link_.native_handle();
        if (auto ready = wait_for(fd, POLLOUT, writes_.wait->deadline, writes_.wait->interrupt, Stage::write, "write");
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
    return refuse(writes_, count.error());
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
      if (reads_.wait != nullptr) {
        if (auto ready = wait_for(link_.native_handle(), POLLIN, reads_.wait->deadline, reads_.wait->interrupt,
                                  Stage::read, "read");
            !ready)
          return std::unexpected(ready.error());
      }
      // GnuTLS asks for a record's header, then for the rest. The next header comes with the rest: one system call.
      const iovec buffers[] = {{data, size}, {next_header_.data(), size > header_bytes ? header_bytes : 0}};
      return link_.read_some(buffers);
    }();
    if (!count) return refuse(reads_, count.error());
    if (*count == 0) {
      stream_ended_ = true;
      between_records_ = size == header_bytes;  // it waited for a whole header, and for nothing of one
    }
    if (*count > size) header_ahead_ = *count - size;
    if (!established_ && *count > 0 && !first_byte_) first_byte_ = *static_cast<std::byte*>(data);
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

  static Result<Progress> blocked(const Direction& direction, Progress progress) noexcept {
    if (direction.error->code == Errc::timed_out) return progress;
    return std::unexpected(*direction.error);
  }

  Result<void> flush() noexcept {
    if (gathered_ == 0) return {};
    return send(record_.data(), std::exchange(gathered_, 0));
  }

  Result<void> send(const std::byte* bytes, std::size_t size) noexcept {
    ssize_t sent = ::gnutls_record_send(session_, bytes, size);
    while (sent == GNUTLS_E_INTERRUPTED || (sent == GNUTLS_E_AGAIN && !writes_.error))
      sent = ::gnutls_record_send(session_, nullptr, 0);  // the rest of the same record
    if (sent >= 0) return {};
    write_failed_ = failure(static_cast<int>(sent), writes_, Stage::write, "write");
    // Under TLS 1.3 a server checks the client's certificate when the client already writes. Its alert says more than
    // the broken connection after it. A reader of this side finds it by itself.
    const std::unique_lock lock(reading_, std::try_to_lock);
    if (lock && write_failed_->code == Condition::peer_gone) {
      const TlsWait no_wait{.deadline = Clock::time_point::min()};
      if (auto reason = look_under_lock(&no_wait); !reason && reason.error().code == Condition::peer_protocol) {
        write_failed_ = reason.error();
        write_failed_->stage = Stage::write;
      }
    }
    return std::unexpected(*write_failed_);
  }

  Result<Ahead> look_under_lock(const TlsWait* wait) noexcept {
    bool ended = false;
    while (ahead_bytes_ < ahead_.size() && !ended) {
      const auto count = receive(ahead_.data() + ahead_bytes_, ahead_.size() - ahead_bytes_, wait);
      if (!count) return std::unexpected(count.error());
      ended = *count == 0;
      ahead_bytes_ += *count;
    }
    return Ahead{ahead_, ahead_bytes_, ended};
  }

  std::size_t take_ahead(std::byte* to, std::size_t room) noexcept {
    const std::size_t count = std::min(room, ahead_bytes_);
    std::memcpy(to, ahead_.data(), count);
    ahead_bytes_ -= count;
    std::memmove(ahead_.data(), ahead_.data() + count, ahead_bytes_);
    return count;
  }

  Result<std::size_t> receive(std::byte* to, std::size_t room, const TlsWait* wait) noexcept {
    if (read_failed_) return std::unexpected(*read_failed_);
    reads_ = {.wait = wait};
    for (;;) {
      const ssize_t count = ::gnutls_record_recv(session_, to, room);
      if (count >= 0) return static_cast<std::size_t>(count);
      // What is no data (a ticket, new keys, a warning) comes back as a failure that is none.
      if (!reads_.error && ::gnutls_error_is_fatal(static_cast<int>(count)) == 0 && count != GNUTLS_E_REHANDSHAKE)
        continue;
      if (count == GNUTLS_E_PREMATURE_TERMINATION && end_ == TlsEnd::fin && between_records_) return std::size_t{0};
      const Error error = failure(static_cast<int>(count), reads_, Stage::read, "read");
      if (!reads_.error || count != GNUTLS_E_AGAIN) read_failed_ = error;
      return std::unexpected(error);
    }
  }

  Error failure(int code, const Direction& direction, Stage stage, const char* op) noexcept {
    if (direction.error) {
      Error error = *direction.error;
      error.stage = stage;
      return error;
    }
    if (code == GNUTLS_E_FATAL_ALERT_RECEIVED)
      return error_of_alert(::gnutls_alert_get(session_), !credentials_.uses_certificates(), stage);
    if (code == GNUTLS_E_PREMATURE_TERMINATION || (stage == Stage::read && stream_ended_))
      return fail(Errc::tls_truncated, stage, op).error();
    return fail_tls(code, stage, op).error();
  }

  /// Ends a handshake that failed, tells the peer why, and says what to do.
  std::unexpected<Error> give_up(int code) noexcept {
    constexpr const char* op = "TLS handshake";
    const bool not_tls = first_byte_ && *first_byte_ != std::byte{0x16} && *first_byte_ != std::byte{0x15};
    const bool with_keys = !credentials_.uses_certificates();
    Error error = fail_tls(code, Stage::handshake, op).error();
    if (const auto& broken = writes_.error ? writes_.error : reads_.error; broken) {
      error = *broken;
      error.stage = Stage::handshake;
      error.op = "TLS handshake (is TLS on at the peer, too?)";
    } else if (not_tls) {
      error.code = Errc::tls_not_spoken;
    } else if (code == GNUTLS_E_FATAL_ALERT_RECEIVED) {
      error = error_of_alert(::gnutls_alert_get(session_), with_keys, Stage::handshake);
    } else if (stream_ended_) {
      error.code = Errc::peer_closed;
      error.op = "TLS handshake (is TLS on at the peer, too?)";
    } else if (code == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
      error.code = certificate_fault(::gnutls_session_get_verify_cert_status(session_));
    } else if (code == GNUTLS_E_NO_CERTIFICATE_FOUND || code == GNUTLS_E_CERTIFICATE_REQUIRED) {
      error.code = Errc::tls_no_certificate;
    } else if (with_keys && (code == GNUTLS_E_RECEIVED_ILLEGAL_PARAMETER || code == GNUTLS_E_DECRYPTION_FAILED ||
                             code == GNUTLS_E_KEYFILE_ERROR)) {
      error.code = Errc::tls_wrong_key;
    } else if (code == GNUTLS_E_NO_CIPHER_SUITES || code == GNUTLS_E_INSUFFICIENT_CREDENTIALS ||
               code == GNUTLS_E_UNSUPPORTED_VERSION_PACKET || code == GNUTLS_E_NO_COMMON_KEY_SHARE) {
      error.code = Errc::tls_no_common_ground;
    }
    if (code != GNUTLS_E_FATAL_ALERT_RECEIVED && !writes_.error && !reads_.error && !not_tls && !stream_ended_) {
      ::gnutls_alert_send(session_, GNUTLS_AL_FATAL, alert_for(error, code));
      (void)link_.finish();  // a reset would overtake the alert
    }
    return std::unexpected(error);
  }

  FdTransport link_;
  const TlsCredentials credentials_;
  const std::string hostname_;
  const TlsEnd end_;
  gnutls_session_t session_ = nullptr;
  std::array<gnutls_typed_vdata_st, 2> verify_{};  // GnuTLS keeps the pointers
  bool established_ = false;
  std::optional<std::byte> first_byte_;  ///< of the peer: says whether it speaks TLS at all

  // The sending thread's.
  Direction writes_;
  std::optional<Error> write_failed_;
  bool finished_ = false;
  std::size_t gathered_ = 0;
  std::array<std::byte, record_bytes> record_;

  // The receiving thread's, under the lock.
  alignas(cache_line) std::mutex reading_;
  Direction reads_;
  std::optional<Error> read_failed_;
  bool stream_ended_ = false;
  bool between_records_ = false;
  std::size_t header_ahead_ = 0;
  std::array<std::byte, header_bytes> next_header_{};
  std::size_t ahead_bytes_ = 0;
  std::array<std::byte, 4> ahead_{};
};

}  // namespace detail
}  // namespace multifd
