// SPDX-License-Identifier: MIT
//
// One GnuTLS session on top of a socket: the handshake in steps that never block, then records.
//
// Two threads: GnuTLS lets one thread send and another receive on the same session once the handshake is done, because
// each direction has its own keys, sequence and buffers. State that both would touch is kept apart here: each direction
// has its own state of a call (TlsSocket), and there is no renegotiation. A lock guards receiving for the one case in
// which the sending thread reads, too: after a broken write it reads the peer's alert, which may have the reason.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/tls_error.hpp"
#include "multifd/transport/detail/tls_socket.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/tls_credentials.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

/// Threads: step() by one; then write() and finish() by one, read() and look() by one; shutdown() by any.
class TlsSession {
 public:
  enum class Progress { done, wants_read, wants_write };
  static constexpr const char* silent_peer =
      "TLS handshake: the peer is silent; is it alive, and is TLS on there, too?";

  [[nodiscard]] static Result<std::unique_ptr<TlsSession>> create(FdTransport link, const TlsCredentials& credentials,
                                                                  const TlsOptions& options) {
    if (auto checked = check_time_limit("TlsOptions::handshake_timeout", options.handshake_timeout, Stage::setup);
        !checked)
      return std::unexpected(checked.error());
    if (credentials.verifies_hostname() && options.hostname.empty())
      return fail(Errc::bad_option, Stage::setup, "TLS: the name to expect in the server's certificate is missing");
    return catch_bad_alloc(Stage::setup, "TLS session", [&]() -> Result<std::unique_ptr<TlsSession>> {
      std::unique_ptr<TlsSession> made(new TlsSession(std::move(link), credentials, options));
      if (const int code = made->init(); code < 0) return fail_tls(code, Stage::setup, "TLS session");
      return made;
    });
  }

  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;
  ~TlsSession() {
    if (session_ != nullptr) ::gnutls_deinit(session_);
  }

  /// Goes on with the handshake as far as possible without waiting. A failure is sent to the peer as an alert.
  [[nodiscard]] Result<Progress> step() noexcept {
    const TlsWait no_wait{.deadline = Clock::time_point::min()};
    for (;;) {
      const Call reading(socket_.reads, &no_wait);
      const Call writing(socket_.writes, &no_wait);
      const int code = ::gnutls_handshake(session_);
      if (code == GNUTLS_E_SUCCESS) {
        established_ = true;
        return Progress::done;
      }
      if (code == GNUTLS_E_AGAIN && socket_.writes.error) return blocked(socket_.writes, Progress::wants_write);
      if (code == GNUTLS_E_AGAIN && socket_.reads.error) return blocked(socket_.reads, Progress::wants_read);
      if (::gnutls_error_is_fatal(code) == 0) continue;  // a warning, or half of a message
      return give_up(code);
    }
  }

  /// Makes the whole handshake, if step() has not: in the writing thread, before anything is read.
  [[nodiscard]] Result<void> handshake() noexcept {
    for (const Clock::time_point deadline = deadline_after(as_timeout(options_.handshake_timeout));;) {
      const auto progress = step();
      if (!progress) return std::unexpected(progress.error());
      if (*progress == Progress::done) return {};
      const short wanted = *progress == Progress::wants_write ? POLLOUT : POLLIN;
      if (auto ready =
              wait_for(socket_.native_handle(), wanted, deadline, options_.interrupt, Stage::handshake, silent_peer);
          !ready)
        return ready;
    }
  }

  /// Writes one record with what is in front of `buffers`: as much as a record holds, or all. Returns how much. One and
  /// not all, so that whoever counts sees bytes move, and a time limit is one for each record.
  [[nodiscard]] Result<std::size_t> write(ConstBuffers buffers, const TlsWait* wait) noexcept {
    if (finished_) return fail(Errc::already_closed, Stage::write, "write");
    if (write_failed_) return std::unexpected(*write_failed_);
    if (!established_) {
      if (auto done = handshake(); !done) {
        write_failed_ = done.error();
        return std::unexpected(done.error());
      }
    }
    const Call writing(socket_.writes, wait);
    std::size_t gathered = 0;
    for (const iovec& buffer : buffers) {
      // A buffer that fills a record is sent from where it is. Smaller pieces (a header, the pages after it) are gathered
      // first, because otherwise each would be a record and a system call of its own.
      if (gathered == 0 && buffer.iov_len >= record_bytes)
        return send(static_cast<const std::byte*>(buffer.iov_base), record_bytes);
      const std::size_t taken = std::min(buffer.iov_len, record_bytes - gathered);
      if (taken > 0) std::memcpy(record_.data() + gathered, buffer.iov_base, taken);
      gathered += taken;
      if (gathered == record_bytes) break;
    }
    if (gathered == 0) return gathered;
    return send(record_.data(), gathered);
  }

  /// Reads one record, or the rest of one.
  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, const TlsWait* wait) noexcept {
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

  /// The bytes that read() will return next, up to four. Fewer have arrived yet, or the stream has `ended`.
  struct Ahead {
    std::array<std::byte, 4> bytes{};
    std::size_t count = 0;
    bool ended = false;
  };
  [[nodiscard]] Result<Ahead> look(const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    return look_under_lock(wait);
  }

  /// Checks, without waiting, whether an alert of the peer has come. Errors: that alert, or another break of the
  /// stream.
  [[nodiscard]] Result<void> probe() noexcept {
    if (!established_) {
      auto progress = step();
      return progress ? Result<void>{} : std::unexpected(progress.error());
    }
    const TlsWait no_wait{.deadline = Clock::time_point::min()};
    auto ahead = look(&no_wait);
    return ahead ? Result<void>{} : std::unexpected(ahead.error());
  }

  /// Sends close_notify, then FIN.
  [[nodiscard]] Result<void> finish() noexcept {
    if (finished_) return {};
    if (write_failed_) {
      Error error = *write_failed_;
      error.stage = Stage::close;
      return std::unexpected(error);
    }
    const Call writing(socket_.writes, nullptr);
    int code = 0;
    do code = ::gnutls_bye(session_, GNUTLS_SHUT_WR);
    while (code == GNUTLS_E_INTERRUPTED || (code == GNUTLS_E_AGAIN && !socket_.writes.error));
    if (code < 0) return std::unexpected(failure(code, socket_.writes, Stage::close, "close_notify"));
    // A peer that needs nothing more may have closed already; then the close_notify itself breaks the connection.
    if (auto ended = socket_.link().finish(); !ended && ended.error().code != std::errc::not_connected) return ended;
    finished_ = true;
    return {};
  }

  /// Whether the handshake is done; nothing can be read before. Threads: the writing one.
  bool established() const noexcept { return established_; }

  void shutdown() noexcept { socket_.link().shutdown(); }
  int native_handle() const noexcept { return socket_.native_handle(); }
  std::string cipher() const {
    if (!established_) return {};
    const auto text = [](const char* name) { return std::string(name != nullptr ? name : "?"); };
    return text(::gnutls_protocol_get_name(::gnutls_protocol_get_version(session_))) + ' ' +
           text(::gnutls_cipher_get_name(::gnutls_cipher_get(session_)));
  }

 private:
  static constexpr std::size_t record_bytes = 16 * 1024;  // the most that a record holds

  using Direction = TlsSocket::Direction;

  /// Begins a call in a direction, and takes what ends its waits away again when the call returns: a time limit lies on
  /// the caller's stack. GnuTLS may read or write outside of any call of that direction, for instance an alert.
  class Call {
   public:
    Call(Direction& direction, const TlsWait* wait) noexcept : direction_(direction) { direction_ = {.wait = wait}; }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() { direction_.wait = nullptr; }

   private:
    Direction& direction_;
  };

  TlsSession(FdTransport link, const TlsCredentials& credentials, const TlsOptions& options)
      : socket_(std::move(link)), credentials_(credentials), options_(options) {}

  int init() {
    const bool server = credentials_.role() == TlsRole::server;
    // No tickets: a source never reads them, and unread bytes make its kernel reset the connection when it closes,
    // which loses data that is still under way (format/tls.md section 14). A client sends its certificate even when the
    // server's list of authorities lacks the client's, so that the server says why it refuses.
    const unsigned flags = server ? GNUTLS_SERVER | GNUTLS_NO_TICKETS : GNUTLS_CLIENT | GNUTLS_FORCE_CLIENT_CERT;
    if (const int code = ::gnutls_init(&session_, flags); code < 0) return code;
    if (const int code = credentials_.apply(session_, options_.cipher); code < 0) return code;
    if (credentials_.uses_certificates()) {
      const char* const purpose = server ? GNUTLS_KP_TLS_WWW_CLIENT : GNUTLS_KP_TLS_WWW_SERVER;
      const auto text = [](const char* from) { return reinterpret_cast<unsigned char*>(const_cast<char*>(from)); };
      verify_[0] = {.type = GNUTLS_DT_KEY_PURPOSE_OID, .data = text(purpose), .size = 0};
      verify_[1] = {.type = GNUTLS_DT_DNS_HOSTNAME, .data = text(options_.hostname.c_str()), .size = 0};
      ::gnutls_session_set_verify_cert2(session_, verify_.data(), server ? 1 : 2, 0);
      if (server) {
        ::gnutls_certificate_server_set_request(session_, GNUTLS_CERT_REQUIRE);
        // The list of authorities is not sent: a client of another one would send no certificate, and no error would
        // say why.
        ::gnutls_certificate_send_x509_rdn_sequence(session_, 1);
      }
    }
    ::gnutls_handshake_set_timeout(session_, 0);  // the caller's deadline counts
    socket_.attach(session_);
    return 0;
  }

  [[nodiscard]] static Result<Progress> blocked(const Direction& direction, Progress progress) noexcept {
    if (direction.error->code == Errc::timed_out) return progress;
    return std::unexpected(*direction.error);
  }

  /// Sends one record. Returns its size.
  [[nodiscard]] Result<std::size_t> send(const std::byte* bytes, std::size_t size) noexcept {
    ssize_t sent = ::gnutls_record_send(session_, bytes, size);
    while (sent == GNUTLS_E_INTERRUPTED || (sent == GNUTLS_E_AGAIN && !socket_.writes.error))
      sent = ::gnutls_record_send(session_, nullptr, 0);  // the rest of the same record
    if (sent >= 0) return size;
    write_failed_ = failure(static_cast<int>(sent), socket_.writes, Stage::write, "write");
    // Under TLS 1.3 a server checks the client's certificate while the client already writes. The server's alert says
    // more than the broken connection behind it. If this side has a reader at work, that one gets the alert.
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

  [[nodiscard]] Result<Ahead> look_under_lock(const TlsWait* wait) noexcept {
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

  [[nodiscard]] Result<std::size_t> receive(std::byte* to, std::size_t room, const TlsWait* wait) noexcept {
    if (read_failed_) return std::unexpected(*read_failed_);
    const Call reading(socket_.reads, wait);
    for (;;) {
      const ssize_t count = ::gnutls_record_recv(session_, to, room);
      if (count >= 0) return static_cast<std::size_t>(count);
      // Records without data (a ticket, new keys, a warning) are returned as failures that are not fatal.
      if (!socket_.reads.error && ::gnutls_error_is_fatal(static_cast<int>(count)) == 0 &&
          count != GNUTLS_E_REHANDSHAKE)
        continue;
      if (count == GNUTLS_E_PREMATURE_TERMINATION && options_.end == TlsEnd::fin && socket_.ended_between_records())
        return std::size_t{0};
      const Error error = failure(static_cast<int>(count), socket_.reads, Stage::read, "read");
      if (!socket_.reads.error || count != GNUTLS_E_AGAIN) read_failed_ = error;
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
    if (code == GNUTLS_E_PREMATURE_TERMINATION || (stage == Stage::read && socket_.ended()))
      return fail(Errc::tls_truncated, stage, op).error();
    return fail_tls(code, stage, op).error();
  }

  /// Ends a handshake that failed, and tells the peer why. Returns the error.
  std::unexpected<Error> give_up(int code) noexcept {
    constexpr const char* doubt = "TLS handshake (is TLS on at the peer, too?)";
    Error error = handshake_error(session_, code, !credentials_.uses_certificates());
    bool heard = code != GNUTLS_E_FATAL_ALERT_RECEIVED;  // whether the peer can still be told
    if (const auto& broken = socket_.writes.error ? socket_.writes.error : socket_.reads.error; broken) {
      error = *broken;
      error.stage = Stage::handshake;
      error.op = doubt;
      heard = false;
    } else if (!socket_.may_speak_tls()) {
      error = fail(Errc::tls_not_spoken, Stage::handshake, "TLS handshake").error();
      heard = false;
    } else if (heard && socket_.ended()) {
      error = fail(Errc::peer_closed, Stage::handshake, doubt).error();
      heard = false;
    }
    if (heard) {
      ::gnutls_alert_send(session_, GNUTLS_AL_FATAL, alert_for(error, code));
      (void)socket_.link().finish();  // a reset would overtake the alert
    }
    return std::unexpected(error);
  }

  TlsSocket socket_;
  const TlsCredentials credentials_;
  const TlsOptions options_;
  gnutls_session_t session_ = nullptr;
  std::array<gnutls_typed_vdata_st, 2> verify_{};  // GnuTLS keeps the pointers
  bool established_ = false;

  // Used by the sending thread.
  std::optional<Error> write_failed_;
  bool finished_ = false;
  std::array<std::byte, record_bytes> record_;

  // Used by the receiving thread, under the lock.
  alignas(cache_line) std::mutex reading_;
  std::optional<Error> read_failed_;
  std::size_t ahead_bytes_ = 0;
  std::array<std::byte, 4> ahead_{};
};

}  // namespace multifd::detail
