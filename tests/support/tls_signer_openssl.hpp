// SPDX-License-Identifier: MIT
//
// Certificates for tests (tls_files.hpp), by OpenSSL.
#pragma once

#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <ctime>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "support/tls_certificate.hpp"

namespace test {

/// A certificate authority. Threads: one at a time, of all.
class TlsSigner {
 public:
  explicit TlsSigner(const std::string& name) : key_(make_key()), certificate_(draft({.common_name = name}, key_)) {
    X509* const own = certificate_.get();
    must(::X509_set_issuer_name(own, ::X509_get_subject_name(own)));
    extend(own, own, NID_basic_constraints, "critical,CA:TRUE");
    extend(own, own, NID_key_usage, "critical,keyCertSign,cRLSign");
    must(::X509_sign(own, key_.get(), ::EVP_sha256()));
  }

  /// Its own certificate, in PEM, as all here.
  std::string own() const { return pem(&::PEM_write_bio_X509, certificate_.get()); }

  /// A certificate and its key.
  std::pair<std::string, std::string> issue(const Certificate& wanted) const {
    const Held<EVP_PKEY> key = make_key();
    const Held<X509> made = draft(wanted, key);
    X509* const own = certificate_.get();
    must(::X509_set_issuer_name(made.get(), ::X509_get_subject_name(own)));
    extend(made.get(), own, NID_basic_constraints, "critical,CA:FALSE");
    extend(made.get(), own, NID_key_usage, "critical,digitalSignature");
    extend(made.get(), own, NID_ext_key_usage, wanted.purpose);
    std::string names = wanted.dns_name.empty() ? "" : "DNS:" + wanted.dns_name;
    if (wanted.loopback_address) names += (names.empty() ? "" : ",") + std::string("IP:127.0.0.1");
    if (!names.empty()) extend(made.get(), own, NID_subject_alt_name, names.c_str());
    must(::X509_sign(made.get(), key_.get(), ::EVP_sha256()));
    const auto write_key = [](BIO* to, const EVP_PKEY* from) {
      return ::PEM_write_bio_PrivateKey(to, from, nullptr, nullptr, 0, nullptr, nullptr);
    };
    return {pem(&::PEM_write_bio_X509, made.get()), pem(write_key, key.get())};
  }

  /// A list of what it has revoked: `certificate`, or nothing if that is empty. Params `next_update`: from now.
  std::string revoke(const std::string& certificate, std::time_t next_update) const {
    const std::time_t now = std::time(nullptr);
    const Held<X509_CRL> list(::X509_CRL_new());
    must(::X509_CRL_set_version(list.get(), 1));  // v2
    must(::X509_CRL_set_issuer_name(list.get(), ::X509_get_subject_name(certificate_.get())));
    must(::X509_CRL_set1_lastUpdate(list.get(), moment(now + next_update - 30 * day_s).get()));
    must(::X509_CRL_set1_nextUpdate(list.get(), moment(now + next_update).get()));
    const Held<ASN1_INTEGER> number(::ASN1_INTEGER_new());
    must(::ASN1_INTEGER_set(number.get(), 1));
    must(::X509_CRL_add1_ext_i2d(list.get(), NID_crl_number, number.get(), 0, 0));
    if (!certificate.empty()) {
      const Held<BIO> text(::BIO_new_mem_buf(certificate.data(), static_cast<int>(certificate.size())));
      const Held<X509> revoked(::PEM_read_bio_X509(text.get(), nullptr, nullptr, nullptr));
      must(revoked != nullptr);
      X509_REVOKED* const entry = ::X509_REVOKED_new();
      must(::X509_REVOKED_set_serialNumber(entry, ::X509_get_serialNumber(revoked.get())));
      must(::X509_REVOKED_set_revocationDate(entry, moment(now - 40 * day_s).get()));
      must(::X509_CRL_add0_revoked(list.get(), entry));
    }
    must(::X509_CRL_sign(list.get(), key_.get(), ::EVP_sha256()));
    return pem(&::PEM_write_bio_X509_CRL, list.get());
  }

 private:
  struct Release {
    void operator()(EVP_PKEY* made) const { ::EVP_PKEY_free(made); }
    void operator()(X509* made) const { ::X509_free(made); }
    void operator()(X509_CRL* made) const { ::X509_CRL_free(made); }
    void operator()(X509_EXTENSION* made) const { ::X509_EXTENSION_free(made); }
    void operator()(ASN1_INTEGER* made) const { ::ASN1_INTEGER_free(made); }
    void operator()(BIO* made) const { ::BIO_free(made); }
  };
  template <class T>
  using Held = std::unique_ptr<T, Release>;

  template <class Code>
  static void must(Code code) {
    if (!(code > Code{})) throw std::runtime_error("making a certificate: OpenSSL has failed");
  }
  static void must(bool good) {
    if (!good) throw std::runtime_error("making a certificate: OpenSSL has failed");
  }
  static Held<EVP_PKEY> make_key() {
    Held<EVP_PKEY> key(EVP_EC_gen("P-256"));
    must(key != nullptr);
    return key;
  }
  static Held<ASN1_INTEGER> moment(std::time_t at) {
    Held<ASN1_INTEGER> made(::ASN1_TIME_set(nullptr, at));  // one type for both
    must(made != nullptr);
    return made;
  }
  static Held<X509> draft(const Certificate& wanted, const Held<EVP_PKEY>& key) {
    static unsigned char serial = 0;
    Held<X509> made(::X509_new());
    must(::X509_set_version(made.get(), 2));  // v3
    must(::ASN1_INTEGER_set(::X509_get_serialNumber(made.get()), ++serial));
    must(::X509_NAME_add_entry_by_txt(::X509_get_subject_name(made.get()), "CN", MBSTRING_UTF8,
                                      reinterpret_cast<const unsigned char*>(wanted.common_name.c_str()), -1, -1, 0));
    const std::time_t now = std::time(nullptr);
    must(::X509_set1_notBefore(made.get(), moment(now + wanted.valid_from).get()));
    must(::X509_set1_notAfter(made.get(), moment(now + wanted.valid_until).get()));
    must(::X509_set_pubkey(made.get(), key.get()));
    return made;
  }
  static void extend(X509* made, X509* issuer, int kind, const char* value) {
    X509V3_CTX context{};
    X509V3_set_ctx_nodb(&context);
    ::X509V3_set_ctx(&context, issuer, made, nullptr, nullptr, 0);
    const Held<X509_EXTENSION> extension(::X509V3_EXT_conf_nid(nullptr, &context, kind, value));
    must(extension != nullptr);
    must(::X509_add_ext(made, extension.get(), -1));
  }
  template <class Write, class T>
  static std::string pem(Write write, T* from) {
    const Held<BIO> memory(::BIO_new(::BIO_s_mem()));
    must(write(memory.get(), from));
    char* text = nullptr;
    const long size = BIO_get_mem_data(memory.get(), &text);
    return std::string(text, static_cast<std::size_t>(size));
  }

  Held<EVP_PKEY> key_;
  Held<X509> certificate_;
};

}  // namespace test
