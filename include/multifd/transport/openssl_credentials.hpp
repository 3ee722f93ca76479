// SPDX-License-Identifier: MIT
//
// OpensslCredentials, for OpenSSL: what TlsCredentials (tls_credentials.hpp) is for GnuTLS, of the same files.
#pragma once

#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_files.hpp"
#include "multifd/transport/detail/openssl_cipher.hpp"
#include "multifd/transport/detail/openssl_error.hpp"
#include "multifd/transport/detail/openssl_keys.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

namespace detail {
using OpensslSession = std::unique_ptr<SSL, OpensslDeleter<::SSL_free>>;
}  // namespace detail

/// Credentials of one side. Cheap to copy. Threads: any; any number of sessions may use them at once.
class OpensslCredentials {
 public:
  using Engine = detail::OpensslEngine;  ///< which library uses them

  /// Reads `ca-cert.pem`, `ca-crl.pem` (optional), and of this role `server-cert.pem` and `server-key.pem`, or
  /// `client-cert.pem` and `client-key.pem`: TlsCredentials::x509().
  /// Errors (stage `setup`, op: the file): errno, or OpenSSL's own codes for a file that it cannot use; a key with a pass
  ///   phrase is one.
  /// Threads: any. Cost: reads the files, once. Wire: format/tls.md section 14.
  [[nodiscard]] static Result<OpensslCredentials> x509(const std::string& directory, TlsRole role) {
    return catch_bad_alloc(Stage::setup, "TLS credentials", [&] { return read_x509(directory, role); });
  }

  /// Reads a file of pre-shared keys, one `user:key` to a line, the key in hexadecimal digits: TlsCredentials::psk().
  /// Params `user`: for a client: the user whose key it uses; a server accepts every user of the file.
  /// Errors (stage `setup`): errno; bad_option for a file without such a line, a client without a user, or a bad key.
  /// Threads: any. Cost: reads the file, at most 1 MiB of it.
  [[nodiscard]] static Result<OpensslCredentials> psk(const std::string& file, TlsRole role,
                                                      const std::string& user = "qemu") {
    return catch_bad_alloc(Stage::setup, "pre-shared keys", [&] { return read_psk(file, role, user); });
  }

  TlsRole role() const noexcept { return role_; }
  /// Whether TlsOptions::hostname is needed.
  bool verifies_hostname() const noexcept { return uses_certificates() && role_ == TlsRole::client; }
  bool uses_certificates() const noexcept { return shared_->keys.empty(); }

  /// A session with these credentials and the algorithms that go with them. Errors (stage `setup`): ENOMEM; OpenSSL's own.
  [[nodiscard]] Result<detail::OpensslSession> session(const TlsOptions& options) const {
    constexpr const char* what = "TLS session";
    detail::OpensslSession made(::SSL_new(shared_->context.get()));
    const auto ciphers = detail::OpensslCiphers::of(options.cipher, !uses_certificates());
    if (!made || ::SSL_set_ciphersuites(made.get(), ciphers.suites.c_str()) != 1 ||
        ::SSL_set_cipher_list(made.get(), ciphers.list.c_str()) != 1)
      return detail::fail_openssl(Stage::setup, what);
    if (verifies_hostname()) {
      X509_VERIFY_PARAM* const wanted = ::SSL_get0_param(made.get());
      ::X509_VERIFY_PARAM_set_hostflags(wanted, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
      const char* const name = options.hostname.c_str();
      if (::X509_VERIFY_PARAM_set1_ip_asc(wanted, name) != 1 && ::X509_VERIFY_PARAM_set1_host(wanted, name, 0) != 1)
        return detail::fail_openssl(Stage::setup, what);
      ::ERR_clear_error();  // a name is no address
    }
    if (role_ == TlsRole::server)
      ::SSL_set_accept_state(made.get());
    else
      ::SSL_set_connect_state(made.get());
    return made;
  }

 private:
  static constexpr std::size_t most_key_bytes = 256;

  struct Shared {
    std::unique_ptr<SSL_CTX, detail::OpensslDeleter<::SSL_CTX_free>> context;
    std::string keys{};  ///< the text of a file of pre-shared keys; empty: certificates
    std::string user{};  ///< a client's

    Shared() = default;
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    ~Shared() { ::OPENSSL_cleanse(keys.data(), keys.size()); }
  };

  explicit OpensslCredentials(TlsRole role) : shared_(std::make_shared<Shared>()), role_(role) {
    Shared& shared = *shared_;
    shared.context.reset(::SSL_CTX_new(::TLS_method()));
    SSL_CTX* const context = shared.context.get();
    if (context == nullptr) return;
    ::SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    // No tickets: a source never reads them, and unread bytes make its kernel reset the connection when it closes,
    // which loses data that is still under way (format/tls.md section 14).
    ::SSL_CTX_set_num_tickets(context, 0);
    ::SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    ::SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    ::SSL_CTX_set_dh_auto(context, 1);
    SSL_CTX_set_app_data(context, &shared);
    // The only public way to TLS 1.3's traffic secrets. They are kept by the session's handshake alone.
    ::SSL_CTX_set_keylog_callback(context, [](const SSL* session, const char* line) {
      auto* const secrets = static_cast<detail::TlsSecrets*>(SSL_get_app_data(session));
      if (secrets != nullptr) secrets->note(line);
    });
    // Without this the library would ask the terminal.
    ::SSL_CTX_set_default_passwd_cb(context, [](char*, int, int, void*) { return 0; });
  }

  [[nodiscard]] static Result<OpensslCredentials> read_x509(const std::string& directory, TlsRole role) {
    ::ERR_clear_error();
    OpensslCredentials made(role);
    SSL_CTX* const context = made.shared_->context.get();
    if (context == nullptr) return detail::fail_openssl(Stage::setup, "TLS credentials");
    MULTIFD_TRY_ASSIGN(const detail::TlsPaths paths, detail::TlsPaths::of(directory, role));
    if (::SSL_CTX_load_verify_file(context, paths.authority.c_str()) != 1)
      return detail::fail_openssl(Stage::setup, paths.authority_name);
    X509_VERIFY_PARAM* const rules = ::SSL_CTX_get0_param(context);
    // Every certificate of the file is trusted by itself, as with GnuTLS; it need not be a root.
    ::X509_VERIFY_PARAM_set_flags(rules, X509_V_FLAG_PARTIAL_CHAIN);
    if (!paths.revoked.empty()) {
      X509_STORE* const store = ::SSL_CTX_get_cert_store(context);
      X509_LOOKUP* const lookup = ::X509_STORE_add_lookup(store, ::X509_LOOKUP_file());
      if (lookup == nullptr || ::X509_load_crl_file(lookup, paths.revoked.c_str(), X509_FILETYPE_PEM) < 1)
        return detail::fail_openssl(Stage::setup, paths.revoked_name);
      ::X509_VERIFY_PARAM_set_flags(rules, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
    }
    const int demanded = role == TlsRole::server ? SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT : SSL_VERIFY_PEER;
    ::SSL_CTX_set_verify(context, demanded, [](int good, X509_STORE_CTX* chain) {
      if (good != 0) return good;
      // As with GnuTLS: an authority of which the file has no list has revoked nothing, and an old list still counts.
      const int why = ::X509_STORE_CTX_get_error(chain);
      const bool passes = why == X509_V_ERR_CRL_HAS_EXPIRED || why == X509_V_ERR_CRL_NOT_YET_VALID ||
                          (why == X509_V_ERR_UNABLE_TO_GET_CRL && !has_list(chain));
      if (passes) ::X509_STORE_CTX_set_error(chain, X509_V_OK);
      return passes ? 1 : 0;
    });
    if (paths.certificate.empty()) return made;
    if (::SSL_CTX_use_certificate_chain_file(context, paths.certificate.c_str()) != 1 ||
        ::SSL_CTX_use_PrivateKey_file(context, paths.key.c_str(), SSL_FILETYPE_PEM) != 1)
      return detail::fail_openssl(Stage::setup, paths.certificate_name);
    return made;
  }

  [[nodiscard]] static Result<OpensslCredentials> read_psk(const std::string& file, TlsRole role,
                                                           const std::string& user) {
    ::ERR_clear_error();
    OpensslCredentials made(role);
    SSL_CTX* const context = made.shared_->context.get();
    if (context == nullptr) return detail::fail_openssl(Stage::setup, "pre-shared keys");
    MULTIFD_TRY_ASSIGN(made.shared_->keys, detail::read_keys_for(file, role, user));
    if (role == TlsRole::server) {
      ::SSL_CTX_set_psk_server_callback(
          context, [](SSL* session, const char* identity, unsigned char* key, unsigned room) {
            // Without a user key_of() returns the first key.
            const std::string_view digits =
                *identity == '\0' ? std::string_view() : detail::key_of(shared_of(session).keys, identity);
            const unsigned size = decode(digits, key, room);
            if (size > 0) return size;
            // A stranger gets a key that nobody has, so that a wrong user and a wrong key fail in the same way.
            const unsigned made_up = std::min(room, 32U);
            return ::RAND_bytes(key, static_cast<int>(made_up)) == 1 ? made_up : 0U;
          });
      return made;
    }
    made.shared_->user = user;
    std::array<unsigned char, most_key_bytes> key{};
    const bool usable = decode(detail::key_of(made.shared_->keys, user), key.data(), most_key_bytes) > 0;
    ::OPENSSL_cleanse(key.data(), key.size());
    if (!usable)
      return fail(Errc::bad_option, Stage::setup, "pre-shared keys: this user's key is not of hexadecimal digits");
    ::SSL_CTX_set_psk_client_callback(context, [](SSL* session, const char*, char* identity, unsigned identity_room,
                                                  unsigned char* key_bytes, unsigned room) {
      const Shared& shared = shared_of(session);
      if (shared.user.size() >= identity_room) return 0U;
      identity[shared.user.copy(identity, identity_room)] = '\0';
      return decode(detail::key_of(shared.keys, shared.user), key_bytes, room);
    });
    // A server that answers with a certificate has no key.
    ::SSL_CTX_set_verify(context, SSL_VERIFY_PEER, nullptr);
    ::SSL_CTX_set_cert_verify_callback(
        context,
        [](X509_STORE_CTX* chain, void*) {
          ::X509_STORE_CTX_set_error(chain, X509_V_ERR_APPLICATION_VERIFICATION);
          return 0;
        },
        nullptr);
    return made;
  }

  /// Whether there is a list of revoked certificates by the authority of the certificate that is being verified.
  static bool has_list(X509_STORE_CTX* chain) noexcept {
    const X509* const certificate = ::X509_STORE_CTX_get_current_cert(chain);
    if (certificate == nullptr) return true;
    const std::unique_ptr<STACK_OF(X509_CRL),
                          decltype([](STACK_OF(X509_CRL) * lists) { sk_X509_CRL_pop_free(lists, ::X509_CRL_free); })>
        lists(::X509_STORE_CTX_get1_crls(chain, ::X509_get_issuer_name(certificate)));
    return lists && sk_X509_CRL_num(lists.get()) > 0;
  }

  static const Shared& shared_of(const SSL* session) noexcept {
    return *static_cast<const Shared*>(SSL_CTX_get_app_data(::SSL_get_SSL_CTX(session)));
  }

  /// Hexadecimal digits as bytes. Returns how many; 0: they are none, or more than `room` takes.
  static unsigned decode(std::string_view digits, unsigned char* bytes, unsigned room) noexcept {
    const auto value = [](char digit) {
      constexpr std::string_view all = "0123456789abcdef";
      const char lower = digit >= 'A' && digit <= 'F' ? static_cast<char>(digit - 'A' + 'a') : digit;
      return all.find(lower);
    };
    if (digits.size() % 2 != 0 || digits.size() / 2 > std::min<std::size_t>(room, most_key_bytes)) return 0;
    for (std::size_t i = 0; i < digits.size(); i += 2) {
      const std::size_t high = value(digits[i]), low = value(digits[i + 1]);
      if (high > 15 || low > 15) return 0;
      bytes[i / 2] = static_cast<unsigned char>(high << 4 | low);
    }
    return static_cast<unsigned>(digits.size() / 2);
  }

  std::shared_ptr<Shared> shared_;
  TlsRole role_;
};

}  // namespace multifd
