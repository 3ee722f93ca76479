// SPDX-License-Identifier: MIT
//
// Which ciphers a side offers over OpenSSL, and in which order. `automatic` measures, once for a process: instructions
// alone do not tell how fast a build of the library is.
//
// AES-128-GCM comes first unless ChaCha20-Poly1305 is faster by half. Where the CPU has instructions for AES both are
// limited by the same vector units and lie within a quarter of each other (OpenSSL 3.0 with AVX-512: 3.5 and 4.0 GB/s),
// but the peer's library is unknown, and GnuTLS, a QEMU's, computes ChaCha20 in plain C, 8 times slower than AES. On a CPU
// without such instructions ChaCha20 is several times faster, for a peer on such a CPU, too.
#pragma once

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <string>

#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

class OpensslEngine;  // OpensslCredentials names it

/// Deletes what OpenSSL made.
template <auto release>
struct OpensslDeleter {
  template <class T>
  void operator()(T* made) const noexcept {
    release(made);
  }
};
using EvpContext = std::unique_ptr<EVP_CIPHER_CTX, OpensslDeleter<::EVP_CIPHER_CTX_free>>;

/// The shortest of some times that encrypting a record's bytes took; the longest there is where it does not work.
inline std::chrono::nanoseconds time_of_a_record(const EVP_CIPHER* cipher) noexcept {
  constexpr int tries = 16;
  auto best = std::chrono::nanoseconds::max();
  const EvpContext context(::EVP_CIPHER_CTX_new());
  static constexpr std::array<unsigned char, 32> key{}, nonce{};
  static thread_local std::array<unsigned char, 16 * 1024> bytes{};  // too much for a small stack
  for (int i = 0; context && i < tries; ++i) {
    const auto began = std::chrono::steady_clock::now();
    int size = 0;
    if (::EVP_EncryptInit_ex(context.get(), cipher, nullptr, key.data(), nonce.data()) != 1 ||
        ::EVP_EncryptUpdate(context.get(), bytes.data(), &size, bytes.data(), static_cast<int>(bytes.size())) != 1)
      break;
    best = std::min<std::chrono::nanoseconds>(best, std::chrono::steady_clock::now() - began);
  }
  return best;
}

/// Whether ChaCha20-Poly1305 is so much faster here that it should come first. Threads: any. Cost: a millisecond at the
/// most, once.
inline bool chacha20_is_far_faster() noexcept {
  static const bool faster = [] {
    const auto aes = time_of_a_record(::EVP_aes_128_gcm());
    const auto chacha = time_of_a_record(::EVP_chacha20_poly1305());
    return chacha < aes / 3 * 2;
  }();
  return faster;
}

/// Ciphers as OpenSSL wants them: TLS 1.3's and TLS 1.2's, the preferred one first. All are AEADs (OpensslRecords).
struct OpensslCiphers {
  std::string suites;  ///< for SSL_set_ciphersuites()
  std::string list;    ///< for SSL_set_cipher_list()

  [[nodiscard]] static OpensslCiphers of(TlsCipher preference, bool with_keys) {
    const bool chacha_first =
        preference == TlsCipher::chacha20 || (preference == TlsCipher::automatic && chacha20_is_far_faster());
    struct Names {
      const char *suite, *cipher;
    };
    std::array order{Names{"TLS_AES_128_GCM_SHA256", "AESGCM+AES128"}, Names{"TLS_AES_256_GCM_SHA384", "AESGCM+AES256"},
                     Names{"TLS_CHACHA20_POLY1305_SHA256", "CHACHA20"}};
    if (chacha_first) std::ranges::rotate(order, order.end() - 1);
    OpensslCiphers made;
    for (const Names& each : order) {
      made.suites += (made.suites.empty() ? "" : ":") + std::string(each.suite);
      for (const char* const exchange : {with_keys ? "kECDHEPSK" : "ECDHE", with_keys ? "kDHEPSK" : "DHE", "kPSK"})
        if (with_keys || std::string(exchange) != "kPSK")
          made.list += (made.list.empty() ? "" : ":") + std::string(exchange) + '+' + each.cipher;
    }
    return made;
  }
};

}  // namespace multifd::detail
