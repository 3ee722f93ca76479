// SPDX-License-Identifier: MIT
//
// OpenSSL's failures as errors: an Errc where a user can do something about the failure, OpenSSL's number and text
// otherwise.
#pragma once

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_alert.hpp"

namespace multifd::detail {

/// Error codes of OpenSSL: its packed library and reason.
class OpensslCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "OpenSSL"; }
  std::string message(int value) const override {
    const char* const reason = ::ERR_reason_error_string(static_cast<unsigned>(value));
    return reason != nullptr ? reason : "unknown error " + std::to_string(value);
  }
  std::error_condition default_error_condition(int value) const noexcept override {
    // What a peer sends is looked at by these; everything else is this side's files and memory.
    const int library = ERR_GET_LIB(static_cast<unsigned>(value));
    if (library == ERR_LIB_SSL || library == ERR_LIB_ASN1 || library == ERR_LIB_EC || library == ERR_LIB_RSA)
      return make_error_condition(Condition::peer_protocol);
    return make_error_condition(Condition::local_io);
  }
};

inline const std::error_category& openssl_category() noexcept {
  static const OpensslCategory instance;
  return instance;
}

/// An error of the library's SSL part, by its reason (SSL_R_...).
inline std::unexpected<Error> fail_ssl(int reason, Stage stage, const char* op) noexcept {
  const std::error_code code(static_cast<int>(ERR_PACK(ERR_LIB_SSL, 0, reason)), openssl_category());
  return std::unexpected(Error{.code = code, .stage = stage, .op = op});
}

/// The error behind a call of OpenSSL that has just failed in this thread: the first one of its queue, which is emptied.
inline std::unexpected<Error> fail_openssl(Stage stage, const char* op) noexcept {
  const unsigned long first = ::ERR_peek_error();
  ::ERR_clear_error();
  if (first == 0) return fail_ssl(ERR_R_INTERNAL_ERROR, stage, op);
  if (ERR_SYSTEM_ERROR(first)) return fail_errno(stage, op, ERR_GET_REASON(first));
  if (ERR_GET_REASON(first) == ERR_R_MALLOC_FAILURE) return fail_errno(stage, op, ENOMEM);
  return std::unexpected(
      Error{.code = std::error_code(static_cast<int>(first), openssl_category()), .stage = stage, .op = op});
}

/// What is wrong with the peer's certificate: SSL_get_verify_result().
inline Errc certificate_fault(long result) noexcept {
  switch (result) {
    case X509_V_ERR_CERT_REVOKED: return Errc::tls_revoked_certificate;
    case X509_V_ERR_CERT_HAS_EXPIRED:
    case X509_V_ERR_CERT_NOT_YET_VALID: return Errc::tls_expired_certificate;
    case X509_V_ERR_INVALID_PURPOSE: return Errc::tls_wrong_purpose;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH: return Errc::tls_wrong_hostname;
    case X509_V_ERR_APPLICATION_VERIFICATION: return Errc::tls_no_common_ground;  // a certificate in place of a key
    default: return Errc::tls_untrusted_certificate;
  }
}

/// The error for an alert of the peer that ends the stream.
inline Error error_of_alert(int alert, bool with_keys, Stage stage) noexcept {
  const auto known = static_cast<TlsAlert>(alert);
  const char* const name =
      known == TlsAlert::certificate_required ? "certificate required" : ::SSL_alert_desc_string_long(alert);
  return error_of_alert(known, name, with_keys, stage);
}

/// The error for a handshake that has just failed in this thread, of the queue, which is emptied.
/// `heard`: whether it was the peer's alert that ended it.
inline Error handshake_error(const SSL* session, bool with_keys, bool& heard) noexcept {
  int reason = 0;
  const Error other = [&] {
    for (unsigned long code = ::ERR_peek_error(); code != 0 && reason == 0;) {
      if (ERR_GET_LIB(code) == ERR_LIB_SSL) reason = ERR_GET_REASON(code);
      if (reason != 0) break;
      ::ERR_get_error();
      code = ::ERR_peek_error();
    }
    return fail_openssl(Stage::handshake, "TLS handshake").error();
  }();
  Error error = other;
  heard = reason > SSL_AD_REASON_OFFSET && reason <= SSL_AD_REASON_OFFSET + 255;
  if (heard) return error_of_alert(reason - SSL_AD_REASON_OFFSET, with_keys, Stage::handshake);
  switch (reason) {
    case SSL_R_CERTIFICATE_VERIFY_FAILED: error.code = certificate_fault(::SSL_get_verify_result(session)); break;
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE: error.code = Errc::tls_no_certificate; break;
    case SSL_R_BINDER_DOES_NOT_VERIFY:
    case SSL_R_BAD_PSK:
    case SSL_R_PSK_IDENTITY_NOT_FOUND:
    case SSL_R_DIGEST_CHECK_FAILED:
    case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC:
      if (with_keys) error.code = Errc::tls_wrong_key;
      break;
    case SSL_R_UNEXPECTED_MESSAGE:  // of a server with keys alone, where a certificate was expected
      if (!with_keys) error.code = Errc::tls_no_common_ground;
      break;
    case SSL_R_NO_SHARED_CIPHER:
    case SSL_R_NO_SHARED_GROUPS:
    case SSL_R_NO_SUITABLE_KEY_SHARE:
    case SSL_R_NO_SUITABLE_GROUPS:
    case SSL_R_NO_SUITABLE_SIGNATURE_ALGORITHM:
    case SSL_R_NO_SHARED_SIGNATURE_ALGORITHMS:
    case SSL_R_NO_PROTOCOLS_AVAILABLE:
    case SSL_R_UNSUPPORTED_PROTOCOL: error.code = Errc::tls_no_common_ground; break;
    default: break;
  }
  return error;
}

}  // namespace multifd::detail
