// SPDX-License-Identifier: MIT
//
// Settings of a connection under TLS, whichever library makes it (tls.hpp: GnuTLS, openssl.hpp: OpenSSL).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "multifd/transport/interrupt.hpp"

namespace multifd {

/// Which side of the handshake: the source connects and is the client, the destination is the server.
enum class TlsRole : unsigned char { client, server };

/// What counts as the orderly end of a received stream.
enum class TlsEnd : unsigned char {
  close_notify,  ///< only the peer's close_notify; a stream that anybody cuts is an error
  fin,           ///< also a FIN between two records: QEMU's main stream, and QEMU's channels before 10.0
};

/// Which cipher a side prefers. Only the order changes: any cipher that both sides have can be chosen.
enum class TlsCipher : unsigned char {
  /// AES-128-GCM where this CPU has instructions for it (x86: AES-NI and PCLMUL, arm64: AES and PMULL), else ChaCha20.
  automatic,
  aes,       ///< AES-128-GCM, then AES-256-GCM: for a CPU whose instructions `automatic` does not detect
  chacha20,  ///< ChaCha20-Poly1305: for a peer whose CPU lacks the instructions, when the peer's speed counts more
};

/// Settings of a handshake, and of the stream after it. A client with certificates sets `hostname`; most callers leave
/// the rest alone.
struct TlsOptions {
  /// For a client with certificates: the name or numeric address that the server's certificate must have. Without it
  /// the handshake fails with bad_option. Servers, and both sides with pre-shared keys, ignore it.
  std::string hostname = {};
  /// How long the handshakes of all channels may take together; 0: no limit (time_limit.hpp). Shorter notices a peer
  /// without TLS sooner; longer is needed on slow links with many channels.
  std::chrono::milliseconds handshake_timeout{10'000};
  /// Ends the handshakes from outside. Default: nothing does. Not owned, may be null.
  const Interrupt* interrupt = nullptr;
  /// What counts as the end of a received stream. Set `fin` where a QEMU sends that ends without close_notify. With
  /// `fin` an attacker can cut a stream between two records and it looks complete, so let the main stream tell the end
  /// there.
  TlsEnd end = TlsEnd::close_notify;
  /// The cipher that a client offers first, and that a server chooses first among what the client offers. A wrong
  /// choice costs speed, never the connection.
  TlsCipher cipher = TlsCipher::automatic;
  /// After how many records this side sends under new keys (TLS 1.3's KeyUpdate; TLS 1.2 has none). The default, 256 GiB
  /// in full records, is two thirds of what AES-GCM may encrypt under one key (2^24.5 records, RFC 8446 section 5.5).
  /// Smaller only for tests: GnuTLS, so a QEMU, ends a connection with more than eight new keys in a second.
  /// GnuTLS renews its own with the next write beside which nobody reads the same connection.
  std::uint64_t records_per_key = std::uint64_t{1} << 24;
};

}  // namespace multifd
