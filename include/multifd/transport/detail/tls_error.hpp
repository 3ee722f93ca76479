// SPDX-License-Identifier: MIT
//
// GnuTLS' failures as errors: an Errc where a user can do something about the failure, GnuTLS' number and text
// otherwise.
#pragma once

#include <gnutls/gnutls.h>

#include <string>
#include <system_error>

#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_alert.hpp"

namespace multifd::detail {

/// Error codes of GnuTLS: negative numbers.
class TlsCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "GnuTLS"; }
  std::string message(int value) const override { return ::gnutls_strerror(value); }
  std::error_condition default_error_condition(int value) const noexcept override {
    switch (value) {
      // Failures of this side's own files, or of its memory.
      case GNUTLS_E_MEMORY_ERROR:
      case GNUTLS_E_INTERNAL_ERROR:
      case GNUTLS_E_RANDOM_FAILED:
      case GNUTLS_E_FILE_ERROR:
      case GNUTLS_E_KEYFILE_ERROR:
      case GNUTLS_E_PARSING_ERROR:
      case GNUTLS_E_BASE64_DECODING_ERROR:
      case GNUTLS_E_BASE64_UNEXPECTED_HEADER_ERROR:
      case GNUTLS_E_CERTIFICATE_KEY_MISMATCH:
      case GNUTLS_E_NO_CERTIFICATE_FOUND:
      case GNUTLS_E_UNIMPLEMENTED_FEATURE: return make_error_condition(Condition::local_io);
      default: return make_error_condition(Condition::peer_protocol);
    }
  }
};

inline const std::error_category& tls_category() noexcept {
  static const TlsCategory instance;
  return instance;
}

inline std::unexpected<Error> fail_tls(int code, Stage stage, const char* op) noexcept {
  return std::unexpected(Error{.code = std::error_code(code, tls_category()), .stage = stage, .op = op});
}

/// What is wrong with the peer's certificate: gnutls_session_get_verify_cert_status().
inline Errc certificate_fault(unsigned status) noexcept {
  // The order counts: nothing else in a certificate of an unknown authority can be trusted, its dates neither.
  if ((status & (GNUTLS_CERT_SIGNER_NOT_FOUND | GNUTLS_CERT_SIGNATURE_FAILURE | GNUTLS_CERT_SIGNER_NOT_CA)) != 0)
    return Errc::tls_untrusted_certificate;
  if ((status & GNUTLS_CERT_REVOKED) != 0) return Errc::tls_revoked_certificate;
  if ((status & (GNUTLS_CERT_EXPIRED | GNUTLS_CERT_NOT_ACTIVATED)) != 0) return Errc::tls_expired_certificate;
  if ((status & GNUTLS_CERT_PURPOSE_MISMATCH) != 0) return Errc::tls_wrong_purpose;
  if ((status & GNUTLS_CERT_UNEXPECTED_OWNER) != 0) return Errc::tls_wrong_hostname;
  return Errc::tls_untrusted_certificate;
}

/// The alert that tells the peer why the handshake failed.
inline gnutls_alert_description_t alert_for(const Error& error, int code) noexcept {
  if (error.code.category() == category()) {
    switch (static_cast<Errc>(error.code.value())) {
      case Errc::tls_untrusted_certificate: return GNUTLS_A_UNKNOWN_CA;
      case Errc::tls_expired_certificate: return GNUTLS_A_CERTIFICATE_EXPIRED;
      case Errc::tls_revoked_certificate: return GNUTLS_A_CERTIFICATE_REVOKED;
      case Errc::tls_wrong_purpose: return GNUTLS_A_UNSUPPORTED_CERTIFICATE;
      case Errc::tls_wrong_hostname: return GNUTLS_A_BAD_CERTIFICATE;
      case Errc::tls_no_certificate: return GNUTLS_A_CERTIFICATE_REQUIRED;
      default: break;
    }
  }
  int level = 0;
  const int alert = ::gnutls_error_to_alert(code, &level);
  return alert > 0 ? static_cast<gnutls_alert_description_t>(alert) : GNUTLS_A_HANDSHAKE_FAILURE;
}

/// The error for an alert of the peer that ends the stream.
inline Error error_of_alert(gnutls_alert_description_t alert, bool with_keys, Stage stage) noexcept {
  return error_of_alert(static_cast<TlsAlert>(alert), ::gnutls_alert_get_name(alert), with_keys, stage);
}

/// The error for a handshake that failed with GnuTLS' `code`.
inline Error handshake_error(gnutls_session_t session, int code, bool with_keys) noexcept {
  if (code == GNUTLS_E_FATAL_ALERT_RECEIVED)
    return error_of_alert(::gnutls_alert_get(session), with_keys, Stage::handshake);
  Error error = fail_tls(code, Stage::handshake, "TLS handshake").error();
  switch (code) {
    case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
      error.code = certificate_fault(::gnutls_session_get_verify_cert_status(session));
      break;
    case GNUTLS_E_NO_CERTIFICATE_FOUND:
    case GNUTLS_E_CERTIFICATE_REQUIRED: error.code = Errc::tls_no_certificate; break;
    case GNUTLS_E_RECEIVED_ILLEGAL_PARAMETER:
    case GNUTLS_E_DECRYPTION_FAILED:
    case GNUTLS_E_KEYFILE_ERROR:
      if (with_keys) error.code = Errc::tls_wrong_key;
      break;
    case GNUTLS_E_NO_CIPHER_SUITES:
    case GNUTLS_E_INSUFFICIENT_CREDENTIALS:
    case GNUTLS_E_UNSUPPORTED_VERSION_PACKET:
    case GNUTLS_E_NO_COMMON_KEY_SHARE: error.code = Errc::tls_no_common_ground; break;
    default: break;
  }
  return error;
}

}  // namespace multifd::detail
