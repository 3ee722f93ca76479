// SPDX-License-Identifier: MIT
//
// TlsCredentials, for GnuTLS: by what one side of a TLS connection proves its identity, and what it accepts from the other side: certificates in a
// directory laid out as QEMU's tls-creds-x509 wants it, or pre-shared keys in a file (format/tls.md section 14). Files
// are read once, here; all sessions share the contents.
#pragma once

#include <gnutls/gnutls.h>

#include <cstdint>
#include <memory>
#include <string>

#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_files.hpp"
#include "multifd/transport/detail/tls_cipher.hpp"
#include "multifd/transport/detail/tls_error.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// Credentials of one side. Cheap to copy. Threads: any; any number of sessions may use them at once.
class TlsCredentials {
 public:
  using Engine = detail::GnutlsEngine;  ///< which library uses them

  /// Reads `ca-cert.pem`, `ca-crl.pem` (optional), and of this role `server-cert.pem` and `server-key.pem`, or
  /// `client-cert.pem` and `client-key.pem`. A server demands a certificate of that authority from every client. A
  /// client's pair may be missing, as with QEMU, if its server demands none.
  /// Params `role`: which pair to read.
  /// Errors (stage `setup`, op: the file): errno, or GnuTLS' own codes for a file that it cannot use.
  /// Threads: any. Cost: reads the files, once. Wire: format/tls.md section 14.
  [[nodiscard]] static Result<TlsCredentials> x509(const std::string& directory, TlsRole role) {
    return catch_bad_alloc(Stage::setup, "TLS credentials", [&] { return read_x509(directory, role); });
  }

  /// Reads a file of pre-shared keys, one `user:key` to a line, the key in hexadecimal digits.
  /// Params `user`: for a client: the user whose key it uses; a server accepts every user of the file.
  /// Errors (stage `setup`): errno; bad_option for a file without such a line, or a client without a user; GnuTLS' own
  ///   codes for a bad key.
  /// Threads: any. Cost: reads the file, at most 1 MiB of it.
  [[nodiscard]] static Result<TlsCredentials> psk(const std::string& file, TlsRole role,
                                                  const std::string& user = "qemu") {
    return catch_bad_alloc(Stage::setup, "pre-shared keys", [&] { return read_psk(file, role, user); });
  }

  TlsRole role() const noexcept { return role_; }
  /// Whether TlsOptions::hostname is needed.
  bool verifies_hostname() const noexcept { return kind_ == Kind::x509 && role_ == TlsRole::client; }
  bool uses_certificates() const noexcept { return kind_ == Kind::x509; }

  /// Gives a session these credentials and the algorithms that go with them. Returns a GnuTLS code.
  int apply(gnutls_session_t session, TlsCipher preference) const {
    const std::string algorithms = detail::tls_priorities(preference, kind_ == Kind::psk);
    if (const int code = ::gnutls_priority_set_direct(session, algorithms.c_str(), nullptr); code < 0) return code;
    if (kind_ == Kind::x509) return ::gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, shared_->x509);
    return role_ == TlsRole::server ? ::gnutls_credentials_set(session, GNUTLS_CRD_PSK, shared_->psk_server)
                                    : ::gnutls_credentials_set(session, GNUTLS_CRD_PSK, shared_->psk_client);
  }

 private:
  enum class Kind : std::uint8_t { x509, psk };

  /// GnuTLS' own objects, one of which is set.
  struct Shared {
    gnutls_certificate_credentials_t x509 = nullptr;
    gnutls_psk_server_credentials_t psk_server = nullptr;
    gnutls_psk_client_credentials_t psk_client = nullptr;

    Shared() = default;
    Shared(const Shared&) = delete;
    Shared& operator=(const Shared&) = delete;
    ~Shared() {
      if (x509 != nullptr) ::gnutls_certificate_free_credentials(x509);
      if (psk_server != nullptr) ::gnutls_psk_free_server_credentials(psk_server);
      if (psk_client != nullptr) ::gnutls_psk_free_client_credentials(psk_client);
    }
  };

  TlsCredentials(TlsRole role, Kind kind) : shared_(std::make_shared<Shared>()), role_(role), kind_(kind) {}

  [[nodiscard]] static Result<TlsCredentials> read_x509(const std::string& directory, TlsRole role) {
    TlsCredentials made(role, Kind::x509);
    if (const int code = ::gnutls_certificate_allocate_credentials(&made.shared_->x509); code < 0)
      return detail::fail_tls(code, Stage::setup, "TLS credentials");
    const gnutls_certificate_credentials_t all = made.shared_->x509;

    MULTIFD_TRY_ASSIGN(const detail::TlsPaths paths, detail::TlsPaths::of(directory, role));
    const int count = ::gnutls_certificate_set_x509_trust_file(all, paths.authority.c_str(), GNUTLS_X509_FMT_PEM);
    if (count <= 0)
      return detail::fail_tls(count < 0 ? count : GNUTLS_E_NO_CERTIFICATE_FOUND, Stage::setup, paths.authority_name);
    if (!paths.revoked.empty()) {
      const int code = ::gnutls_certificate_set_x509_crl_file(all, paths.revoked.c_str(), GNUTLS_X509_FMT_PEM);
      if (code < 0) return detail::fail_tls(code, Stage::setup, paths.revoked_name);
    }
    if (paths.certificate.empty()) return made;
    const int code =
        ::gnutls_certificate_set_x509_key_file(all, paths.certificate.c_str(), paths.key.c_str(), GNUTLS_X509_FMT_PEM);
    if (code < 0) return detail::fail_tls(code, Stage::setup, paths.certificate_name);
    return made;
  }

  [[nodiscard]] static Result<TlsCredentials> read_psk(const std::string& file, TlsRole role, const std::string& user) {
    MULTIFD_TRY_ASSIGN(const std::string text, detail::read_keys_for(file, role, user));
    TlsCredentials made(role, Kind::psk);
    Shared& shared = *made.shared_;
    int code = 0;
    if (role == TlsRole::server) {
      code = ::gnutls_psk_allocate_server_credentials(&shared.psk_server);
      if (code == 0) code = ::gnutls_psk_set_server_credentials_file(shared.psk_server, file.c_str());
    } else {
      const std::string digits(detail::key_of(text, user));
      const gnutls_datum_t datum{
          .data = reinterpret_cast<unsigned char*>(const_cast<char*>(digits.data())),  // only read
          .size = static_cast<unsigned>(digits.size())};
      code = ::gnutls_psk_allocate_client_credentials(&shared.psk_client);
      if (code == 0)
        code = ::gnutls_psk_set_client_credentials(shared.psk_client, user.c_str(), &datum, GNUTLS_PSK_KEY_HEX);
    }
    if (code < 0) return detail::fail_tls(code, Stage::setup, "pre-shared keys");
    return made;
  }

  std::shared_ptr<Shared> shared_;
  TlsRole role_;
  Kind kind_;
};

}  // namespace multifd
