// SPDX-License-Identifier: MIT
//
// Which ciphers a side offers, and in which order: the fast one of this CPU first. GnuTLS' own order ("NORMAL") has
// AES-256-GCM first, which a pre-shared key cannot have under TLS 1.3 (its hash is SHA-256), and then
// ChaCha20-Poly1305, which GnuTLS computes without vector instructions: 0.25 GB/s on a core where AES-128-GCM reaches
// several.
#pragma once

#include <string>

#include "multifd/transport/tls_options.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace multifd::detail {

class GnutlsEngine;  // TlsCredentials names it

/// Whether this CPU has instructions for AES and for the multiplication of GCM.
inline bool has_aes_instructions() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("aes") != 0 && __builtin_cpu_supports("pclmul") != 0;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long aes = 1UL << 3, pmull = 1UL << 4;  // HWCAP_AES, HWCAP_PMULL of the kernel's ABI
  return (::getauxval(AT_HWCAP) & (aes | pmull)) == (aes | pmull);
#else
  return false;
#endif
}

/// GnuTLS' priority string of one side: the same protocols, key exchanges and ciphers as QEMU's defaults, without the
/// outdated protocol versions, and in this library's order. The server's order decides, where GnuTLS' default is the
/// client's.
inline std::string tls_priorities(TlsCipher preference, bool with_keys) {
  const bool aes_first = preference == TlsCipher::aes || (preference == TlsCipher::automatic && has_aes_instructions());
  std::string text = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:-CIPHER-ALL";
  text += aes_first ? ":+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305" : ":+CHACHA20-POLY1305:+AES-128-GCM:+AES-256-GCM";
  text += ":+AES-128-CCM:+AES-256-CCM:+AES-128-CBC:+AES-256-CBC:%SERVER_PRECEDENCE";
  if (with_keys) text += ":+ECDHE-PSK:+DHE-PSK:+PSK";
  return text;
}

}  // namespace multifd::detail
