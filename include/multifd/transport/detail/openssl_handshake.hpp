// SPDX-License-Identifier: MIT
//
// A TLS handshake by OpenSSL on a socket, in steps that never block, and the keys that it leaves behind for the records.
#pragma once

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/detail/basic_tls_session.hpp"
#include "multifd/transport/detail/openssl_error.hpp"
#include "multifd/transport/detail/openssl_keys.hpp"
#include "multifd/transport/detail/openssl_records.hpp"
#include "multifd/transport/openssl_credentials.hpp"

namespace multifd::detail {

/// What a handshake has agreed on. `ours` protects what this side sends.
struct TlsAgreed {
  TlsSuite suite;
  std::string text;  ///< "TLS1.3 AES-128-GCM"
  TlsKeys ours, theirs;
  TlsSecret our_secret, their_secret;  ///< TLS 1.3's
  std::uint64_t first_record = 0;      ///< in both directions
  std::size_t most_content = OpensslRecords::most_content;
};

/// Threads: one. Never moved: OpenSSL has its address.
class OpensslHandshake {
 public:
  explicit OpensslHandshake(TlsLink& link) noexcept : link_(link) {}
  OpensslHandshake(const OpensslHandshake&) = delete;
  OpensslHandshake& operator=(const OpensslHandshake&) = delete;

  [[nodiscard]] Result<void> init(const OpensslCredentials& credentials, const TlsOptions& options) {
    ::ERR_clear_error();
    credentials_.emplace(credentials);
    MULTIFD_TRY_ASSIGN(session_, credentials.session(options));
    BIO* const socket = ::BIO_new(socket_method());
    if (socket == nullptr) return fail_openssl(Stage::setup, "TLS session");
    ::BIO_set_data(socket, this);
    ::BIO_set_init(socket, 1);
    ::SSL_set_bio(session_.get(), socket, socket);
    SSL_set_app_data(session_.get(), &secrets_);
    return {};
  }

  /// Goes on as far as possible without waiting. A failure is sent to the peer as an alert.
  [[nodiscard]] Result<TlsProgress> step() noexcept {
    ::ERR_clear_error();
    broken_.reset();
    const int done = ::SSL_do_handshake(session_.get());
    if (done == 1) return TlsProgress::done;
    switch (::SSL_get_error(session_.get(), done)) {
      case SSL_ERROR_WANT_READ: return blocked(TlsProgress::wants_read);
      case SSL_ERROR_WANT_WRITE: return blocked(TlsProgress::wants_write);
      default: return give_up();
    }
  }

  /// What was agreed on, once step() has returned done. This object is not used afterwards.
  /// Errors (stage `handshake`): OpenSSL's own.
  [[nodiscard]] Result<TlsAgreed> agreed() {
    constexpr const char* what = "TLS handshake";
    TlsAgreed made;
    SSL* const session = session_.get();
    const SSL_CIPHER* const cipher = ::SSL_get_current_cipher(session);
    const int kind = ::SSL_CIPHER_get_cipher_nid(cipher);
    TlsSuite& suite = made.suite;
    suite = suite_of(cipher, ::SSL_version(session) == TLS1_3_VERSION);
    // Nothing of the records that follow may have been taken from the socket.
    if (suite.cipher == nullptr || suite.hash == nullptr || ::SSL_has_pending(session) == 1)
      return fail_ssl(ERR_R_INTERNAL_ERROR, Stage::handshake, what);
    made.text = std::string(suite.tls13 ? "TLS1.3 " : "TLS1.2 ") + (kind == NID_aes_128_gcm   ? "AES-128-GCM"
                                                                    : kind == NID_aes_256_gcm ? "AES-256-GCM"
                                                                                              : "CHACHA20-POLY1305");
    if (const int limit = ::SSL_SESSION_get_max_fragment_length(::SSL_get_session(session)); limit >= 1 && limit <= 4)
      made.most_content = std::size_t{256} << limit;  // what the client has asked for: 1 is 512 bytes
    const bool server = ::SSL_is_server(session) == 1;
    if (suite.tls13) {
      made.our_secret = server ? secrets_.server : secrets_.client;
      made.their_secret = server ? secrets_.client : secrets_.server;
      if (made.our_secret.size == 0 || made.their_secret.size == 0 ||
          !keys_of(suite.hash, made.our_secret, suite.key_bytes(), made.ours) ||
          !keys_of(suite.hash, made.their_secret, suite.key_bytes(), made.theirs))
        return fail_ssl(ERR_R_INTERNAL_ERROR, Stage::handshake, what);
      return made;
    }
    SecretBytes<SSL_MAX_MASTER_KEY_LENGTH> master;
    master.size = ::SSL_SESSION_get_master_key(::SSL_get_session(session), master.bytes.data(), master.bytes.size());
    std::array<std::uint8_t, SSL3_RANDOM_SIZE> client{}, server_random{};
    ::SSL_get_client_random(session, client.data(), client.size());
    ::SSL_get_server_random(session, server_random.data(), server_random.size());
    if (!keys_of(suite.hash, master.view(), client, server_random, suite.key_bytes(), suite.iv_bytes(),
                 server ? made.theirs : made.ours, server ? made.ours : made.theirs))
      return fail_ssl(ERR_R_INTERNAL_ERROR, Stage::handshake, what);
    // Each side's Finished was record 0. Its explicit nonce was random: that one of ours is the same has a chance of
    // 2^-32 at the most, for any number of records.
    made.first_record = 1;
    return made;
  }

 private:
  static TlsSuite suite_of(const SSL_CIPHER* cipher, bool tls13) noexcept {
    const int kind = ::SSL_CIPHER_get_cipher_nid(cipher);
    return {.cipher = kind == NID_aes_128_gcm         ? ::EVP_aes_128_gcm()
                      : kind == NID_aes_256_gcm       ? ::EVP_aes_256_gcm()
                      : kind == NID_chacha20_poly1305 ? ::EVP_chacha20_poly1305()
                                                      : nullptr,
            .hash = ::SSL_CIPHER_get_handshake_digest(cipher),
            .tls13 = tls13,
            .explicit_nonce = !tls13 && kind != NID_chacha20_poly1305};
  }

  /// The socket as OpenSSL sees it. It asks for exactly what it needs, so that no byte behind the handshake is taken.
  static const BIO_METHOD* socket_method() noexcept {
    static BIO_METHOD* const method = [] {
      BIO_METHOD* const made = ::BIO_meth_new(::BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "multifd socket");
      if (made == nullptr) return made;
      ::BIO_meth_set_read(made, [](BIO* bio, char* to, int size) {
        const iovec buffer{.iov_base = to, .iov_len = static_cast<std::size_t>(size)};
        auto& self = *static_cast<OpensslHandshake*>(::BIO_get_data(bio));
        BIO_clear_retry_flags(bio);
        return self.moved(bio, self.link_.receive(std::span(&buffer, 1), &no_wait), BIO_FLAGS_READ);
      });
      ::BIO_meth_set_write(made, [](BIO* bio, const char* from, int size) {
        const iovec buffer{.iov_base = const_cast<char*>(from), .iov_len = static_cast<std::size_t>(size)};
        auto& self = *static_cast<OpensslHandshake*>(::BIO_get_data(bio));
        BIO_clear_retry_flags(bio);
        return self.moved(bio, self.link_.send(std::span(&buffer, 1), &no_wait), BIO_FLAGS_WRITE);
      });
      ::BIO_meth_set_ctrl(made, [](BIO*, int command, long, void*) -> long { return command == BIO_CTRL_FLUSH; });
      return made;
    }();
    return method;
  }

  int moved(BIO* bio, const Result<std::size_t>& count, int direction) noexcept {
    if (count) return static_cast<int>(*count);
    if (count.error().code == Errc::timed_out)
      ::BIO_set_flags(bio, direction | BIO_FLAGS_SHOULD_RETRY);
    else
      broken_ = count.error();
    return -1;
  }

  [[nodiscard]] Result<TlsProgress> blocked(TlsProgress progress) const noexcept {
    if (!broken_) return progress;
    return std::unexpected(*broken_);
  }

  /// Ends a handshake that failed; OpenSSL has sent the alert. Returns the error.
  std::unexpected<Error> give_up() noexcept {
    constexpr const char* doubt = "TLS handshake (is TLS on at the peer, too?)";
    bool heard = false;
    Error error = handshake_error(session_.get(), !credentials_->uses_certificates(), heard);
    if (broken_) {
      error = *broken_;
      error.stage = Stage::handshake;
      error.op = doubt;
    } else if (!link_.may_speak_tls()) {
      error = fail(Errc::tls_not_spoken, Stage::handshake, "TLS handshake").error();
    } else if (!heard && link_.ended()) {
      error = fail(Errc::peer_closed, Stage::handshake, doubt).error();
    } else if (!heard) {
      (void)link_.finish();  // a reset would overtake the alert
    }
    return std::unexpected(error);
  }

  TlsLink& link_;
  std::optional<OpensslCredentials> credentials_;
  OpensslSession session_;
  std::optional<Error> broken_;  ///< why the socket gave up in this step
  TlsSecrets secrets_;
};

}  // namespace multifd::detail
