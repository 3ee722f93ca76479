// SPDX-License-Identifier: MIT
//
// Certificates and keys for tests, made when they are needed: nothing of the kind lies in the repository. Each kind has
// a directory of its own, laid out as TlsCredentials and QEMU read it.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <unistd.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

namespace test {

inline constexpr std::time_t day_s = 24 * 60 * 60;

/// What a certificate is made with.
struct Certificate {
  std::string common_name;
  std::string dns_name = {};
  bool loopback_address = false;  ///< 127.0.0.1 as a subject, too
  const char* purpose = GNUTLS_KP_TLS_WWW_SERVER;
  std::time_t valid_from = -day_s;  ///< from now
  std::time_t valid_until = 30 * day_s;
};

/// An authority that signs certificates, and the directories to put them in.
class TlsAuthority {
 public:
  explicit TlsAuthority(const std::string& name) : key_(make_key()) {
    certificate_ = draft({.common_name = name}, key_);
    must(::gnutls_x509_crt_set_basic_constraints(certificate_, 1, -1));
    must(::gnutls_x509_crt_set_key_usage(certificate_, GNUTLS_KEY_KEY_CERT_SIGN | GNUTLS_KEY_CRL_SIGN));
    must(::gnutls_x509_crt_sign2(certificate_, certificate_, key_, GNUTLS_DIG_SHA256, 0));
  }
  TlsAuthority(const TlsAuthority&) = delete;
  TlsAuthority& operator=(const TlsAuthority&) = delete;
  ~TlsAuthority() {
    ::gnutls_x509_crt_deinit(certificate_);
    ::gnutls_x509_privkey_deinit(key_);
  }

  void write_ca(const std::filesystem::path& directory) const {
    std::filesystem::create_directories(directory);
    write(directory / "ca-cert.pem", pem(certificate_));
  }

  /// Writes PREFIX-cert.pem and PREFIX-key.pem.
  void issue(const std::filesystem::path& directory, const std::string& prefix, const Certificate& wanted) const {
    const gnutls_x509_privkey_t key = make_key();
    const gnutls_x509_crt_t made = draft(wanted, key);
    must(::gnutls_x509_crt_set_basic_constraints(made, 0, -1));
    must(::gnutls_x509_crt_set_key_usage(made, GNUTLS_KEY_DIGITAL_SIGNATURE));
    must(::gnutls_x509_crt_set_key_purpose_oid(made, wanted.purpose, 0));
    if (!wanted.dns_name.empty())
      must(::gnutls_x509_crt_set_subject_alt_name(made, GNUTLS_SAN_DNSNAME, wanted.dns_name.data(),
                                                  static_cast<unsigned>(wanted.dns_name.size()), GNUTLS_FSAN_APPEND));
    if (wanted.loopback_address) {
      const unsigned char address[] = {127, 0, 0, 1};
      must(::gnutls_x509_crt_set_subject_alt_name(made, GNUTLS_SAN_IPADDRESS, address, sizeof address,
                                                  GNUTLS_FSAN_APPEND));
    }
    must(::gnutls_x509_crt_sign2(made, certificate_, key_, GNUTLS_DIG_SHA256, 0));
    write(directory / (prefix + "-cert.pem"), pem(made));
    gnutls_datum_t text{};
    must(::gnutls_x509_privkey_export2(key, GNUTLS_X509_FMT_PEM, &text));
    write(directory / (prefix + "-key.pem"), take(text));
    ::gnutls_x509_crt_deinit(made);
    ::gnutls_x509_privkey_deinit(key);
  }

  /// Writes ca-crl.pem, which revokes what is in `directory` by PREFIX-cert.pem, or nothing for no prefix.
  /// Params `next_update`: from now.
  void revoke(const std::filesystem::path& directory, const std::string& prefix, std::time_t next_update) const {
    const std::time_t now = std::time(nullptr);
    gnutls_x509_crl_t list = nullptr;
    must(::gnutls_x509_crl_init(&list));
    must(::gnutls_x509_crl_set_version(list, 2));
    must(::gnutls_x509_crl_set_this_update(list, now + next_update - 30 * day_s));
    must(::gnutls_x509_crl_set_next_update(list, now + next_update));
    must(::gnutls_x509_crl_set_number(list, "\1", 1));
    if (!prefix.empty()) {
      std::ifstream file(directory / (prefix + "-cert.pem"), std::ios::binary);
      std::string text(std::istreambuf_iterator<char>(file), {});
      const gnutls_datum_t datum{reinterpret_cast<unsigned char*>(text.data()), static_cast<unsigned>(text.size())};
      gnutls_x509_crt_t revoked = nullptr;
      must(::gnutls_x509_crt_init(&revoked));
      must(::gnutls_x509_crt_import(revoked, &datum, GNUTLS_X509_FMT_PEM));
      must(::gnutls_x509_crl_set_crt(list, revoked, now - 40 * day_s));
      ::gnutls_x509_crt_deinit(revoked);
    }
    must(::gnutls_x509_crl_sign2(list, certificate_, key_, GNUTLS_DIG_SHA256, 0));
    gnutls_datum_t text{};
    must(::gnutls_x509_crl_export2(list, GNUTLS_X509_FMT_PEM, &text));
    write(directory / "ca-crl.pem", take(text));
    ::gnutls_x509_crl_deinit(list);
  }

  /// A whole directory: both roles, the server for `localhost` and 127.0.0.1 or another name.
  void fill(const std::filesystem::path& directory, const std::string& server_name = "localhost",
            std::time_t valid_until = 30 * day_s) const {
    const std::time_t from = valid_until < 0 ? valid_until - day_s : -day_s;
    write_ca(directory);
    issue(directory, "server",
          {.common_name = server_name,
           .dns_name = server_name,
           .loopback_address = server_name == "localhost",
           .valid_from = from,
           .valid_until = valid_until});
    issue(
        directory, "client",
        {.common_name = "source", .purpose = GNUTLS_KP_TLS_WWW_CLIENT, .valid_from = from, .valid_until = valid_until});
  }

  static void write(const std::filesystem::path& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
  }

 private:
  static void must(int code) {
    if (code < 0) throw std::runtime_error(std::string("making a certificate: ") + ::gnutls_strerror(code));
  }
  static gnutls_x509_privkey_t make_key() {
    gnutls_x509_privkey_t key = nullptr;
    must(::gnutls_x509_privkey_init(&key));
    must(::gnutls_x509_privkey_generate(key, GNUTLS_PK_ECDSA, GNUTLS_CURVE_TO_BITS(GNUTLS_ECC_CURVE_SECP256R1), 0));
    return key;
  }
  static gnutls_x509_crt_t draft(const Certificate& wanted, gnutls_x509_privkey_t key) {
    static unsigned char serial = 0;
    gnutls_x509_crt_t made = nullptr;
    must(::gnutls_x509_crt_init(&made));
    must(::gnutls_x509_crt_set_version(made, 3));
    ++serial;
    must(::gnutls_x509_crt_set_serial(made, &serial, sizeof serial));
    must(::gnutls_x509_crt_set_dn_by_oid(made, GNUTLS_OID_X520_COMMON_NAME, 0, wanted.common_name.data(),
                                         static_cast<unsigned>(wanted.common_name.size())));
    const std::time_t now = std::time(nullptr);
    must(::gnutls_x509_crt_set_activation_time(made, now + wanted.valid_from));
    must(::gnutls_x509_crt_set_expiration_time(made, now + wanted.valid_until));
    must(::gnutls_x509_crt_set_key(made, key));
    return made;
  }
  static std::string pem(gnutls_x509_crt_t certificate) {
    gnutls_datum_t text{};
    must(::gnutls_x509_crt_export2(certificate, GNUTLS_X509_FMT_PEM, &text));
    return take(text);
  }
  static std::string take(gnutls_datum_t& text) {
    std::string copy(reinterpret_cast<const char*>(text.data), text.size);
    ::gnutls_free(text.data);
    return copy;
  }

  gnutls_x509_privkey_t key_;
  gnutls_x509_crt_t certificate_ = nullptr;
};

/// Below `root`: good/, other/ (another authority), expired/, name/ (the server's is for another name), swapped/ (each
/// role has the other's purpose), bare/ (the client has no certificate), keys.psk, other.psk.
inline void make_tls_files(const std::filesystem::path& root) {
  const TlsAuthority ours("our authority"), theirs("another authority");
  ours.fill(root / "good");
  theirs.fill(root / "other");
  ours.fill(root / "expired", "localhost", -day_s);
  ours.fill(root / "name", "elsewhere.example");
  ours.write_ca(root / "bare");
  ours.write_ca(root / "swapped");
  ours.issue(root / "swapped", "server",
             {.common_name = "localhost", .dns_name = "localhost", .purpose = GNUTLS_KP_TLS_WWW_CLIENT});
  ours.issue(root / "swapped", "client", {.common_name = "source", .purpose = GNUTLS_KP_TLS_WWW_SERVER});
  TlsAuthority::write(root / "keys.psk",
                      "# for tests\nsomebody:00112233445566778899aabbccddeeff\n"
                      "qemu:0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0\n");
  TlsAuthority::write(root / "other.psk", "qemu:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff\n");
}

/// The same in a directory of its own, made once for a test program and removed at its end.
inline const std::string& tls_files() {
  struct Folder {
    std::string path = "/tmp/multifd-tls-XXXXXX";
    Folder() {
      if (::mkdtemp(path.data()) == nullptr) throw std::runtime_error("mkdtemp");
      make_tls_files(path);
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static const Folder folder;
  return folder.path;
}

}  // namespace test
