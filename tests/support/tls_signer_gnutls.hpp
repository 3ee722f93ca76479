// SPDX-License-Identifier: MIT
//
// Certificates for tests (tls_files.hpp), by GnuTLS.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

#include <ctime>
#include <stdexcept>
#include <string>
#include <utility>

#include "support/tls_certificate.hpp"

namespace test {

/// A certificate authority. Threads: one at a time, of all.
class TlsSigner {
 public:
  explicit TlsSigner(const std::string& name) : key_(make_key()) {
    certificate_ = draft({.common_name = name}, key_);
    must(::gnutls_x509_crt_set_basic_constraints(certificate_, 1, -1));
    must(::gnutls_x509_crt_set_key_usage(certificate_, GNUTLS_KEY_KEY_CERT_SIGN | GNUTLS_KEY_CRL_SIGN));
    must(::gnutls_x509_crt_sign2(certificate_, certificate_, key_, GNUTLS_DIG_SHA256, 0));
  }
  TlsSigner(const TlsSigner&) = delete;
  TlsSigner& operator=(const TlsSigner&) = delete;
  ~TlsSigner() {
    ::gnutls_x509_crt_deinit(certificate_);
    ::gnutls_x509_privkey_deinit(key_);
  }

  /// Its own certificate, in PEM, as all here.
  std::string own() const { return pem(certificate_); }

  /// A certificate and its key.
  std::pair<std::string, std::string> issue(const Certificate& wanted) const {
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
    gnutls_datum_t text{};
    must(::gnutls_x509_privkey_export2(key, GNUTLS_X509_FMT_PEM, &text));
    std::pair both(pem(made), take(text));
    ::gnutls_x509_crt_deinit(made);
    ::gnutls_x509_privkey_deinit(key);
    return both;
  }

  /// A list of what it has revoked: `certificate`, or nothing if that is empty. Params `next_update`: from now.
  std::string revoke(std::string certificate, std::time_t next_update) const {
    const std::time_t now = std::time(nullptr);
    gnutls_x509_crl_t list = nullptr;
    must(::gnutls_x509_crl_init(&list));
    must(::gnutls_x509_crl_set_version(list, 2));
    must(::gnutls_x509_crl_set_this_update(list, now + next_update - 30 * day_s));
    must(::gnutls_x509_crl_set_next_update(list, now + next_update));
    must(::gnutls_x509_crl_set_number(list, "\1", 1));
    if (!certificate.empty()) {
      const gnutls_datum_t datum{reinterpret_cast<unsigned char*>(certificate.data()),
                                 static_cast<unsigned>(certificate.size())};
      gnutls_x509_crt_t revoked = nullptr;
      must(::gnutls_x509_crt_init(&revoked));
      must(::gnutls_x509_crt_import(revoked, &datum, GNUTLS_X509_FMT_PEM));
      must(::gnutls_x509_crl_set_crt(list, revoked, now - 40 * day_s));
      ::gnutls_x509_crt_deinit(revoked);
    }
    must(::gnutls_x509_crl_sign2(list, certificate_, key_, GNUTLS_DIG_SHA256, 0));
    gnutls_datum_t text{};
    must(::gnutls_x509_crl_export2(list, GNUTLS_X509_FMT_PEM, &text));
    ::gnutls_x509_crl_deinit(list);
    return take(text);
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

}  // namespace test
