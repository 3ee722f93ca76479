// SPDX-License-Identifier: MIT
//
// What GnuTLS does for a BasicTlsSession.
//
// Two threads: GnuTLS lets one thread send and another receive on the same session once the handshake is done, because
// each direction has its own keys, sequence and buffers. State that both would touch is kept apart here: each direction
// has its own state of a call (TlsSocket), and there is no renegotiation.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_batch.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/detail/basic_tls_session.hpp"
#include "multifd/transport/detail/tls_error.hpp"
#include "multifd/transport/detail/tls_socket.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/tls_credentials.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

/// Threads: step() by one; then write() and finish() by one, read() and look() by one; shutdown() by any.
class GnutlsEngine {
 public:
  using Credentials = TlsCredentials;

  GnutlsEngine(FdTransport link, const TlsCredentials& credentials, const TlsOptions& options)
      : socket_(std::move(link)), credentials_(credentials), options_(options) {}
  GnutlsEngine(const GnutlsEngine&) = delete;
  GnutlsEngine& operator=(const GnutlsEngine&) = delete;
  ~GnutlsEngine() {
    if (session_ != nullptr) ::gnutls_deinit(session_);
  }

  [[nodiscard]] Result<void> init() {
    if (const int code = make_session(); code < 0) return fail_tls(code, Stage::setup, "TLS session");
    return {};
  }

  /// Goes on with the handshake as far as possible without waiting. A failure is sent to the peer as an alert.
  [[nodiscard]] Result<TlsProgress> step() noexcept {
    for (;;) {
      const Call reading(socket_.reads, &no_wait);
      const Call writing(socket_.writes, &no_wait);
      const int code = ::gnutls_handshake(session_);
      if (code == GNUTLS_E_SUCCESS) return TlsProgress::done;
      if (code == GNUTLS_E_AGAIN && socket_.writes.error) return blocked(socket_.writes, TlsProgress::wants_write);
      if (code == GNUTLS_E_AGAIN && socket_.reads.error) return blocked(socket_.reads, TlsProgress::wants_read);
      if (::gnutls_error_is_fatal(code) == 0) continue;  // a warning, or half of a message
      return give_up(code);
    }
  }

  /// Writes full records, as many as are sent in one go, or all in the last one.
  [[nodiscard]] Result<std::size_t> write(ConstBuffers buffers, const TlsWait* wait) noexcept {
    std::size_t left = total_bytes(buffers);
    if (left == 0) return left;
    const Call writing(socket_.writes, wait);
    if (auto begun = socket_.begin_batch(); !begun) return std::unexpected(begun.error());
    Pieces pieces(buffers);
    std::size_t taken = 0;
    for (std::size_t records = socket_.batch_records(wait); records > 0 && left > 0; --records) {
      const std::size_t count = std::min(left, tls_record_bytes);
      if (auto sent = send(pieces, count); !sent) return std::unexpected(sent.error());
      taken += count;
      left -= count;
    }
    if (auto sent = socket_.send_batch(); !sent) return std::unexpected(sent.error());
    return taken;
  }

  /// Reads a record, or the rest of one, and what else has come with it.
  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    const Call reading(socket_.reads, wait);
    if (total_bytes(buffers) >= tls_record_bytes) {
      if (auto room = socket_.receive_several(); !room) return std::unexpected(room.error());
    }
    std::size_t arrived = 0;
    for (const iovec& buffer : buffers) {
      auto* bytes = static_cast<std::byte*>(buffer.iov_base);
      for (std::size_t left = buffer.iov_len; left > 0;) {
        if (arrived > 0 && !more_without_waiting()) return arrived;
        const Result<std::size_t> count = receive(bytes, left, arrived > 0);
        if (!count) return count;
        if (*count == 0) return arrived;
        arrived += *count;
        bytes += *count;
        left -= *count;
      }
    }
    return arrived;
  }

  [[nodiscard]] Result<void> close_notify() noexcept {
    const Call writing(socket_.writes, nullptr);
    int code = 0;
    do code = ::gnutls_bye(session_, GNUTLS_SHUT_WR);
    while (code == GNUTLS_E_INTERRUPTED || (code == GNUTLS_E_AGAIN && !socket_.writes.error));
    if (code < 0) return std::unexpected(failure(code, socket_.writes, Stage::close, "close_notify"));
    return {};
  }

  std::string cipher() const {
    const auto text = [](const char* name) { return std::string(name != nullptr ? name : "?"); };
    return text(::gnutls_protocol_get_name(::gnutls_protocol_get_version(session_))) + ' ' +
           text(::gnutls_cipher_get_name(::gnutls_cipher_get(session_)));
  }

  TlsLink& link() noexcept { return socket_.link(); }

 private:
  using Direction = TlsSocket::Direction;

  /// Begins a call in a direction, and takes what ends its waits away again when the call returns: a time limit lies on
  /// the caller's stack. GnuTLS may read or write outside of any call of that direction, for instance an alert.
  class Call {
   public:
    Call(Direction& direction, const TlsWait* wait) noexcept : direction_(direction) { direction_ = {.wait = wait}; }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() {
      direction_.wait = nullptr;
      direction_.several = false;
    }

   private:
    Direction& direction_;
  };

  int make_session() {
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

  [[nodiscard]] static Result<TlsProgress> blocked(const Direction& direction, TlsProgress progress) noexcept {
    if (direction.error->code == Errc::timed_out) return progress;
    return std::unexpected(*direction.error);
  }

  /// Under TLS 1.3: new keys ahead of what is written next, when the old ones have served for long enough.
  [[nodiscard]] Result<void> renew_keys() noexcept {
    if (sent_records_ < options_.records_per_key) return {};
    // New keys are the one thing that GnuTLS cannot do beside a thread that reads: then they have to wait for the next
    // write.
    const std::unique_lock lock(reading_, std::try_to_lock);
    if (!lock) return {};
    sent_records_ = 0;
    if (::gnutls_protocol_get_version(session_) != GNUTLS_TLS1_3) return {};
    int code = 0;
    do code = ::gnutls_session_key_update(session_, 0);
    while (code == GNUTLS_E_INTERRUPTED || (code == GNUTLS_E_AGAIN && !socket_.writes.error));
    if (code < 0) return std::unexpected(failure(code, socket_.writes, Stage::write, "new keys"));
    return {};
  }

  /// Seals the next `count` bytes of `pieces`, which a record can hold; a peer may want smaller ones. Bytes that lie side
  /// by side are sealed from where they are. Smaller pieces (a header, the pages after it) are gathered first, because
  /// otherwise each would be a record of its own.
  [[nodiscard]] Result<void> send(Pieces& pieces, std::size_t count) noexcept {
    std::span<const std::byte> bytes = pieces.next(count);
    if (bytes.size() < count) {
      std::size_t gathered = 0;
      for (;; bytes = pieces.next(count - gathered)) {
        std::ranges::copy(bytes, record_.begin() + static_cast<std::ptrdiff_t>(gathered));
        gathered += bytes.size();
        if (gathered == count) break;
      }
      bytes = std::span(record_).first(count);
    }
    while (!bytes.empty()) {
      if (auto renewed = renew_keys(); !renewed) return renewed;
      ++sent_records_;
      ssize_t sent = ::gnutls_record_send(session_, bytes.data(), bytes.size());
      while (sent == GNUTLS_E_INTERRUPTED || (sent == GNUTLS_E_AGAIN && !socket_.writes.error))
        sent = ::gnutls_record_send(session_, nullptr, 0);  // the rest of the same record
      if (sent < 0) return std::unexpected(failure(static_cast<int>(sent), socket_.writes, Stage::write, "write"));
      bytes = bytes.subspan(static_cast<std::size_t>(sent));
    }
    return {};
  }

  /// Whether there is data, or a record that has come whole.
  bool more_without_waiting() const noexcept {
    return ::gnutls_record_check_pending(session_) > 0 || socket_.record_ahead();
  }

  /// Reads a record or the rest of one. Params `or_nothing`: return 0 where that would be a call of the socket.
  [[nodiscard]] Result<std::size_t> receive(std::byte* to, std::size_t room, bool or_nothing) noexcept {
    for (;;) {
      const ssize_t count = ::gnutls_record_recv(session_, to, room);
      if (count >= 0) return static_cast<std::size_t>(count);
      // Records without data (a ticket, new keys, a warning) are returned as failures that are not fatal.
      if (!socket_.reads.error && ::gnutls_error_is_fatal(static_cast<int>(count)) == 0 &&
          count != GNUTLS_E_REHANDSHAKE) {
        if (or_nothing && !socket_.record_ahead()) return std::size_t{0};
        continue;
      }
      if (count == GNUTLS_E_PREMATURE_TERMINATION && options_.end == TlsEnd::fin && socket_.between_records())
        return std::size_t{0};
      return std::unexpected(failure(static_cast<int>(count), socket_.reads, Stage::read, "read"));
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
    if (code == GNUTLS_E_PREMATURE_TERMINATION || (stage == Stage::read && socket_.link().ended()))
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
    } else if (const auto alert = socket_.plain_alert(); alert && code == GNUTLS_E_DECRYPTION_FAILED) {
      error = error_of_alert(static_cast<gnutls_alert_description_t>(*alert), !credentials_.uses_certificates(),
                             Stage::handshake);
      heard = false;
    } else if (!socket_.link().may_speak_tls()) {
      error = fail(Errc::tls_not_spoken, Stage::handshake, "TLS handshake").error();
      heard = false;
    } else if (heard && socket_.link().ended()) {
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
  std::array<gnutls_typed_vdata_st, 2> verify_{};   // GnuTLS keeps the pointers
  std::mutex reading_;                              // held by a call of read()
  std::uint64_t sent_records_ = 0;                  // under these keys
  std::array<std::byte, tls_record_bytes> record_;  // of the sending thread
};

}  // namespace multifd::detail
