// SPDX-License-Identifier: MIT
//
// Settings of a connection under TLS.
#pragma once

#include <chrono>
#include <string>

#include "multifd/transport/interrupt.hpp"

namespace multifd {

/// What counts as the orderly end of a stream that is received.
enum class TlsEnd : unsigned char {
  close_notify,  ///< only the peer's close_notify: what is cut by somebody else is an error
  fin,           ///< the connection's end between two records, too: QEMU's main stream, and QEMU's channels before 10.0
};

/// Which cipher a side likes best. Only the order changes: whatever cipher both sides have is taken.
enum class TlsCipher : unsigned char {
  /// AES-128-GCM where this CPU has instructions for it (x86: AES-NI and PCLMUL, arm64: AES and PMULL), else ChaCha20.
  automatic,
  aes,       ///< AES-128-GCM, then AES-256-GCM: for a CPU whose instructions `automatic` does not see
  chacha20,  ///< ChaCha20-Poly1305: for a peer whose CPU lacks the instructions, when it matters more than this side's
};

/// Settings of a handshake, and of the stream after it.
struct TlsOptions {
  /// Of a client with certificates: the name or number that the server's certificate must be for. Needed.
  std::string hostname = {};
  /// How long the handshakes may take, all together; 0: no limit (time_limit.hpp).
  std::chrono::milliseconds handshake_timeout{10'000};
  const Interrupt* interrupt = nullptr;  ///< ends the handshakes from outside; not owned, may be null
  TlsEnd end = TlsEnd::close_notify;
  /// What this side offers first, as a client, and chooses among what the client offers, as a server.
  TlsCipher cipher = TlsCipher::automatic;
};

}  // namespace multifd
