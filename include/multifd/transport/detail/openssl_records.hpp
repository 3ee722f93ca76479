// SPDX-License-Identifier: MIT
//
// The records of one direction under OpenSSL's AEADs: RFC 8446 section 5.2 (TLS 1.3), RFC 5246 section 6.2.3.3 with RFC
// 5288 and RFC 7905 (TLS 1.2).
//
// Why not SSL_write() and SSL_read(): they take one piece of memory, copy each record once more on either side, make a
// system call for each, and an SSL object must not be used by two threads at once. What is done here is what a kernel
// does with TLS in it: the handshake is the library's, and the records that follow are encrypted from the caller's pieces
// into what is sent, and decrypted from what has come into the caller's pieces.
#pragma once

#include <openssl/crypto.h>
#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "multifd/transport/detail/basic_tls_batch.hpp"
#include "multifd/transport/detail/openssl_cipher.hpp"
#include "multifd/transport/detail/openssl_keys.hpp"

namespace multifd::detail {

/// What a record carries.
enum class TlsContent : std::uint8_t { change_cipher_spec = 20, alert = 21, handshake = 22, data = 23 };

/// Protocol and cipher of a session.
struct TlsSuite {
  const EVP_CIPHER* cipher = nullptr;
  const EVP_MD* hash = nullptr;
  bool tls13 = true;
  bool explicit_nonce = false;  ///< TLS 1.2's AES-GCM: eight bytes of each nonce stand in its record

  std::size_t key_bytes() const noexcept { return static_cast<std::size_t>(::EVP_CIPHER_get_key_length(cipher)); }
  std::size_t iv_bytes() const noexcept { return explicit_nonce ? 4 : 12; }
};

/// Seals or opens the records of one direction. Threads: one.
class OpensslRecords {
 public:
  static constexpr std::size_t most_content = tls_record_bytes;
  static constexpr std::size_t header_bytes = 5;
  static constexpr std::size_t tag_bytes = 16;

  /// Begins with record `first` under `keys`: also the second time, after a KeyUpdate. False: OpenSSL has failed.
  bool start(const TlsSuite& suite, const TlsKeys& keys, bool seals, std::uint64_t first) noexcept {
    suite_ = suite;
    iv_ = keys.iv;
    number_ = first;
    if (!context_) context_.reset(::EVP_CIPHER_CTX_new());
    return context_ && ::EVP_CipherInit_ex(context_.get(), suite.cipher, nullptr, keys.key.bytes.data(), nullptr,
                                           seals ? 1 : 0) == 1;
  }

  /// How many records have been sealed or opened since start().
  std::uint64_t number() const noexcept { return number_; }

  /// The bytes that a record has beside its content.
  std::size_t overhead() const noexcept { return header_bytes + prefix_bytes() + suffix_bytes(); }

  /// Writes a record with the next `count` bytes of `pieces` to `to`, which has room for it. Returns its size; 0: OpenSSL
  /// has failed.
  std::size_t seal(TlsContent content, Pieces& pieces, std::size_t count, std::byte* to) noexcept {
    const TlsContent outer = suite_.tls13 ? TlsContent::data : content;
    const std::size_t size = header_bytes + prefix_bytes() + count + suffix_bytes();
    write_header(outer, size - header_bytes, to);
    std::byte* out = to + header_bytes;
    if (suite_.explicit_nonce) {
      const auto number = number_bytes();
      std::memcpy(out, number.data(), number.size());
      out += number.size();
    }
    if (!begin(outer, count, to, to + header_bytes)) return 0;
    for (std::size_t left = count; left > 0;) {
      const std::span<std::byte> piece = pieces.next(left);
      if (piece.empty() || !crypt(piece.data(), piece.size(), out)) return 0;
      out += piece.size();
      left -= piece.size();
    }
    if (suite_.tls13) {
      const auto inner = static_cast<std::byte>(content);
      if (!crypt(&inner, 1, out)) return 0;
      ++out;
    }
    int none = 0;
    if (::EVP_EncryptFinal_ex(context_.get(), octets(out), &none) != 1 ||
        ::EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_GET_TAG, tag_bytes, out) != 1)
      return 0;
    ++number_;
    return size;
  }

  /// The size of the record's content at the most, padding included. None: the record is too small or too large.
  std::optional<std::size_t> content_of(std::size_t record_bytes) const noexcept {
    const std::size_t least = overhead();
    const std::size_t expansion = suite_.tls13 ? 256 : 2048;
    if (record_bytes < least || record_bytes > header_bytes + most_content + expansion) return std::nullopt;
    return record_bytes - least;
  }

  /// Opens `record` into the next bytes of `pieces`, which have room for its content. Returns what it carries, under TLS
  /// 1.3 its last byte: 0 is padding. None: the record is not the peer's; then what was written is wiped. Until
  /// opened() the same record can be opened again.
  std::optional<std::uint8_t> open(std::span<const std::byte> record, const Pieces& pieces) noexcept {
    const std::size_t count = *content_of(record.size());
    const std::byte* in = record.data() + header_bytes;
    std::uint8_t type = std::to_integer<std::uint8_t>(record[0]);
    bool good = begin(static_cast<TlsContent>(type), count, record.data(), in);
    in += prefix_bytes();
    Pieces into = pieces;
    for (std::size_t left = count; good && left > 0;) {
      const std::span<std::byte> piece = into.next(left);
      good = !piece.empty() && crypt(in, piece.size(), piece.data());
      in += piece.size();
      left -= piece.size();
    }
    std::byte inner{};
    if (good && suite_.tls13) {
      good = crypt(in, 1, &inner);
      type = std::to_integer<std::uint8_t>(inner);
      ++in;
    }
    int none = 0;
    std::byte nothing{};
    good = good &&
           ::EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_SET_TAG, tag_bytes, const_cast<std::byte*>(in)) == 1 &&
           ::EVP_DecryptFinal_ex(context_.get(), octets(&nothing), &none) == 1;
    if (good) return type;
    Pieces bad = pieces;
    for (std::size_t left = count; left > 0;) {
      const std::span<std::byte> piece = bad.next(left);
      if (piece.empty()) break;
      std::ranges::fill(piece, std::byte{0});
      left -= piece.size();
    }
    return std::nullopt;
  }

  /// Goes on with the next record.
  void opened() noexcept { ++number_; }

 private:
  static unsigned char* octets(std::byte* from) noexcept { return reinterpret_cast<unsigned char*>(from); }
  static const unsigned char* octets(const std::byte* from) noexcept {
    return reinterpret_cast<const unsigned char*>(from);
  }

  std::size_t prefix_bytes() const noexcept { return suite_.explicit_nonce ? 8 : 0; }
  std::size_t suffix_bytes() const noexcept { return (suite_.tls13 ? 1 : 0) + tag_bytes; }

  std::array<std::uint8_t, 8> number_bytes() const noexcept {
    std::array<std::uint8_t, 8> bytes{};
    for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::uint8_t>(number_ >> (8 * (7 - i)));
    return bytes;
  }

  static void write_header(TlsContent type, std::size_t size, std::byte* to) noexcept {
    to[0] = static_cast<std::byte>(type);
    to[1] = to[2] = std::byte{3};
    to[3] = static_cast<std::byte>(size >> 8);
    to[4] = static_cast<std::byte>(size);
  }

  /// Sets the nonce, and authenticates what is not encrypted. Params `header`: the record's; `prefix`: what follows it.
  bool begin(TlsContent outer, std::size_t count, const std::byte* header, const std::byte* prefix) noexcept {
    if (!context_) return false;  // ahead of start(): there is no handshake yet
    std::array<std::uint8_t, 12> nonce = iv_.bytes;
    const auto number = number_bytes();
    if (suite_.explicit_nonce)
      std::memcpy(nonce.data() + 4, prefix, 8);
    else
      for (std::size_t i = 0; i < 8; ++i) nonce[4 + i] ^= number[i];
    if (::EVP_CipherInit_ex(context_.get(), nullptr, nullptr, nullptr, nonce.data(), -1) != 1) return false;
    int size = 0;
    if (suite_.tls13) return ::EVP_CipherUpdate(context_.get(), nullptr, &size, octets(header), header_bytes) == 1;
    std::array<std::uint8_t, 13> known{};
    std::ranges::copy(number, known.begin());
    const std::uint8_t rest[] = {static_cast<std::uint8_t>(outer), 3, 3, static_cast<std::uint8_t>(count >> 8),
                                 static_cast<std::uint8_t>(count)};
    std::ranges::copy(rest, known.begin() + 8);
    return ::EVP_CipherUpdate(context_.get(), nullptr, &size, known.data(), known.size()) == 1;
  }

  bool crypt(const std::byte* in, std::size_t size, std::byte* out) noexcept {
    int done = 0;
    return ::EVP_CipherUpdate(context_.get(), octets(out), &done, octets(in), static_cast<int>(size)) == 1 &&
           static_cast<std::size_t>(done) == size;
  }

  EvpContext context_{};
  TlsSuite suite_{};
  SecretBytes<12> iv_{};
  std::uint64_t number_ = 0;
};

}  // namespace multifd::detail
