// SPDX-License-Identifier: MIT
//
// The keys of TLS records, from what a handshake leaves behind: RFC 8446 section 7.3 (TLS 1.3) and RFC 5246 section 6.3
// (TLS 1.2).
#pragma once

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace multifd::detail {

using Octets = std::span<const std::uint8_t>;

/// Bytes that are wiped when they are no longer needed.
template <std::size_t capacity>
struct SecretBytes {
  std::array<std::uint8_t, capacity> bytes{};
  std::size_t size = 0;

  SecretBytes() = default;
  SecretBytes(const SecretBytes&) = default;
  SecretBytes& operator=(const SecretBytes&) = default;
  ~SecretBytes() { ::OPENSSL_cleanse(bytes.data(), bytes.size()); }

  Octets view() const noexcept { return Octets(bytes).first(size); }
  void append(Octets more) noexcept {
    const std::size_t count = std::min(more.size(), capacity - size);
    std::copy_n(more.begin(), count, bytes.begin() + static_cast<std::ptrdiff_t>(size));
    size += count;
  }
};

/// A traffic secret of TLS 1.3.
using TlsSecret = SecretBytes<EVP_MAX_MD_SIZE>;

/// The two that protect a session's data, of the lines of OpenSSL's key log.
struct TlsSecrets {
  TlsSecret client, server;

  /// Params `line`: what it is, the client's random bytes, and the secret, in hexadecimal digits.
  void note(std::string_view line) noexcept {
    const auto keep = [&](std::string_view label, TlsSecret& secret) {
      if (!line.starts_with(label)) return;
      std::string_view digits = line.substr(line.rfind(' ') + 1);
      for (secret.size = 0; digits.size() >= 2 && secret.size < secret.bytes.size(); digits.remove_prefix(2))
        secret.bytes[secret.size++] = static_cast<std::uint8_t>(value(digits[0]) << 4 | value(digits[1]));
    };
    keep("CLIENT_TRAFFIC_SECRET_0 ", client);
    keep("SERVER_TRAFFIC_SECRET_0 ", server);
  }

 private:
  static int value(char digit) noexcept { return ::OPENSSL_hexchar2int(static_cast<unsigned char>(digit)); }
};

/// What protects the records of one direction.
struct TlsKeys {
  SecretBytes<32> key;
  SecretBytes<12> iv;  ///< all of a nonce, or its first four bytes: TLS 1.2's AES-GCM
};

/// HMAC of `data`. False: OpenSSL has failed.
inline bool hmac(const EVP_MD* hash, Octets key, Octets data, TlsSecret& made) noexcept {
  unsigned size = 0;
  if (::HMAC(hash, key.data(), static_cast<int>(key.size()), data.data(), data.size(), made.bytes.data(), &size) ==
      nullptr)
    return false;
  made.size = size;
  return true;
}

/// HKDF-Expand-Label(secret, label, "", size), for no more than one block of the hash.
template <std::size_t capacity>
bool expand_label(const EVP_MD* hash, Octets secret, std::string_view label, std::size_t size,
                  SecretBytes<capacity>& made) noexcept {
  SecretBytes<64> info;
  const std::uint8_t head[] = {static_cast<std::uint8_t>(size >> 8), static_cast<std::uint8_t>(size),
                               static_cast<std::uint8_t>(label.size() + 6)};
  const std::uint8_t tail[] = {0, 1};  // no context; the number of the block
  const auto text = [](std::string_view from) {
    return Octets(reinterpret_cast<const std::uint8_t*>(from.data()), from.size());
  };
  for (const Octets part : {Octets(head), text("tls13 "), text(label), Octets(tail)}) info.append(part);
  TlsSecret block;
  if (!hmac(hash, secret, info.view(), block) || size > block.size) return false;
  made.size = 0;
  made.append(block.view().first(size));
  return made.size == size;
}

/// The keys that go with a traffic secret of TLS 1.3.
inline bool keys_of(const EVP_MD* hash, const TlsSecret& secret, std::size_t key_bytes, TlsKeys& made) noexcept {
  return expand_label(hash, secret.view(), "key", key_bytes, made.key) &&
         expand_label(hash, secret.view(), "iv", 12, made.iv);
}

/// The secret after a KeyUpdate.
inline bool update(const EVP_MD* hash, TlsSecret& secret) noexcept {
  TlsSecret next;
  if (!expand_label(hash, secret.view(), "traffic upd", secret.size, next)) return false;
  secret = next;
  return true;
}

/// The keys of both directions under TLS 1.2, of its master secret and the two hellos' random bytes.
inline bool keys_of(const EVP_MD* hash, Octets master, Octets client_random, Octets server_random,
                    std::size_t key_bytes, std::size_t iv_bytes, TlsKeys& client, TlsKeys& server) noexcept {
  constexpr std::string_view label = "key expansion";
  SecretBytes<13 + 32 + 32> seed;
  seed.append({reinterpret_cast<const std::uint8_t*>(label.data()), label.size()});
  seed.append(server_random);
  seed.append(client_random);
  SecretBytes<2 * (32 + 12) + EVP_MAX_MD_SIZE> block;
  const std::size_t wanted = 2 * (key_bytes + iv_bytes);
  TlsSecret chain;
  if (!hmac(hash, master, seed.view(), chain)) return false;
  while (block.size < wanted) {
    SecretBytes<EVP_MAX_MD_SIZE + sizeof seed.bytes> input;
    input.append(chain.view());
    input.append(seed.view());
    TlsSecret part, next;
    if (!hmac(hash, master, input.view(), part) || !hmac(hash, master, chain.view(), next)) return false;
    block.append(part.view());
    chain = next;
  }
  Octets left = block.view();
  const auto take = [&left](std::size_t count) {
    const Octets taken = left.first(count);
    left = left.subspan(count);
    return taken;
  };
  client.key.append(take(key_bytes));
  server.key.append(take(key_bytes));
  client.iv.append(take(iv_bytes));
  server.iv.append(take(iv_bytes));
  return true;
}

}  // namespace multifd::detail
