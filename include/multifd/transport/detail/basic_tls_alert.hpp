// SPDX-License-Identifier: MIT
//
// The peer's alerts as errors, whichever library hears them. The numbers are TLS' own.
#pragma once

#include <cstdint>

#include "multifd/result.hpp"

namespace multifd::detail {

/// Alerts by which something can be told (RFC 8446 section 6, RFC 5246 section 7.2).
enum class TlsAlert : std::uint8_t {
  close_notify = 0,
  unexpected_message = 10,
  bad_record_mac = 20,
  handshake_failure = 40,
  illegal_parameter = 47,
  decrypt_error = 51,
  protocol_version = 70,
  insufficient_security = 71,
  user_canceled = 90,
  missing_extension = 109,
  unknown_psk_identity = 115,
  certificate_required = 116,
};

/// The error for an alert of the peer that ends the stream. Params `name`: the library's text for it, may be null.
inline Error error_of_alert(TlsAlert alert, const char* name, bool with_keys, Stage stage) noexcept {
  Error error{.code = Errc::tls_refused,
              .stage = stage,
              .op = name != nullptr ? name : "unknown TLS alert",
              .detail = static_cast<std::uint64_t>(alert)};
  switch (alert) {
    // Servers differ in the alert that they send for a wrong key.
    case TlsAlert::illegal_parameter:
    case TlsAlert::decrypt_error:
    case TlsAlert::unknown_psk_identity:
    case TlsAlert::bad_record_mac:
      if (with_keys) error.code = Errc::tls_wrong_key;
      break;
    case TlsAlert::unexpected_message:  // of a client that expects a certificate, by OpenSSL
      if (with_keys) error.code = Errc::tls_no_common_ground;
      break;
    case TlsAlert::handshake_failure:
    case TlsAlert::insufficient_security:
    case TlsAlert::protocol_version:
    case TlsAlert::missing_extension: error.code = Errc::tls_no_common_ground; break;
    default: break;
  }
  return error;
}

}  // namespace multifd::detail
