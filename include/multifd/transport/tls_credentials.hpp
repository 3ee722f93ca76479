// SPDX-License-Identifier: MIT
//
// By what one side of a TLS connection proves its identity, and what it accepts from the other side: certificates in a
// directory laid out as QEMU's tls-creds-x509 wants it, or pre-shared keys in a file (format/tls.md section 14). Files
// are read once, here; all sessions share the contents.
#pragma once

#include <gnutls/gnutls.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

#include "multifd/result.hpp"
#include "multifd/transport/detail/tls_cipher.hpp"
#include "multifd/transport/detail/tls_error.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// Which side of the handshake: the source connects and is the client, the destination is the server.
enum class TlsRole : std::uint8_t { client, server };

/// Credentials of one side. Cheap to copy. Threads: any; any number of sessions may use them at once.
class TlsCredentials {
 public:
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

    const std::string authority = directory + "/ca-cert.pem";
    if (auto there = readable(authority, "ca-cert.pem"); !there) return std::unexpected(there.error());
    const int count = ::gnutls_certificate_set_x509_trust_file(all, authority.c_str(), GNUTLS_X509_FMT_PEM);
    if (count <= 0)
      return detail::fail_tls(count < 0 ? count : GNUTLS_E_NO_CERTIFICATE_FOUND, Stage::setup, "ca-cert.pem");

    const std::string revoked = directory + "/ca-crl.pem";
    if (::access(revoked.c_str(), F_OK) == 0) {
      const int code = ::gnutls_certificate_set_x509_crl_file(all, revoked.c_str(), GNUTLS_X509_FMT_PEM);
      if (code < 0) return detail::fail_tls(code, Stage::setup, "ca-crl.pem");
    }

    const bool server = role == TlsRole::server;
    const char* const certificate_name = server ? "server-cert.pem" : "client-cert.pem";
    const char* const key_name = server ? "server-key.pem" : "client-key.pem";
    const std::string certificate = directory + '/' + certificate_name;
    const std::string key = directory + '/' + key_name;
    if (!server && ::access(certificate.c_str(), F_OK) != 0 && ::access(key.c_str(), F_OK) != 0) return made;
    if (auto there = readable(certificate, certificate_name); !there) return std::unexpected(there.error());
    if (auto there = readable(key, key_name); !there) return std::unexpected(there.error());
    const int code = ::gnutls_certificate_set_x509_key_file(all, certificate.c_str(), key.c_str(), GNUTLS_X509_FMT_PEM);
    if (code < 0) return detail::fail_tls(code, Stage::setup, certificate_name);
    return made;
  }

  [[nodiscard]] static Result<TlsCredentials> read_psk(const std::string& file, TlsRole role, const std::string& user) {
    if (role == TlsRole::client && user.empty())
      return fail(Errc::bad_option, Stage::setup, "pre-shared keys: a client needs a user");
    const Result<std::string> text = read_small_file(file);
    if (!text) return std::unexpected(text.error());
    const std::string_view key = key_of(*text, role == TlsRole::client ? user : std::string());
    if (key.empty())
      return fail(Errc::bad_option, Stage::setup,
                  role == TlsRole::client ? "the file of pre-shared keys has no line USER:HEXKEY for this user"
                                          : "the file of pre-shared keys has no line USER:HEXKEY");
    TlsCredentials made(role, Kind::psk);
    Shared& shared = *made.shared_;
    int code = 0;
    if (role == TlsRole::server) {
      code = ::gnutls_psk_allocate_server_credentials(&shared.psk_server);
      if (code == 0) code = ::gnutls_psk_set_server_credentials_file(shared.psk_server, file.c_str());
    } else {
      const std::string digits(key);
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

  /// Checks that a file can be read: GnuTLS itself only says "error while reading file".
  [[nodiscard]] static Result<void> readable(const std::string& path, const char* name) {
    if (::access(path.c_str(), R_OK) != 0) return fail_errno(Stage::setup, name);
    return {};
  }

  [[nodiscard]] static Result<std::string> read_small_file(const std::string& path) {
    constexpr std::size_t most = 1 << 20;
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "re"), std::fclose);
    if (!file) return fail_errno(Stage::setup, "file of pre-shared keys");
    std::string text(most, '\0');
    text.resize(std::fread(text.data(), 1, text.size(), file.get()));
    if (std::ferror(file.get()) != 0) return fail_errno(Stage::setup, "file of pre-shared keys");
    return text;
  }

  /// The key in `user`'s line, or in the first valid line when `user` is empty.
  static std::string_view key_of(std::string_view text, std::string_view user) noexcept {
    while (!text.empty()) {
      std::string_view line = text.substr(0, text.find('\n'));
      text.remove_prefix(std::min(text.size(), line.size() + 1));
      if (line.ends_with('\r')) line.remove_suffix(1);
      const std::size_t colon = line.find(':');
      if (colon == line.npos || colon == 0 || line.starts_with('#')) continue;
      if (user.empty() || line.substr(0, colon) == user) return line.substr(colon + 1);
    }
    return {};
  }

  std::shared_ptr<Shared> shared_;
  TlsRole role_;
  Kind kind_;
};

}  // namespace multifd
