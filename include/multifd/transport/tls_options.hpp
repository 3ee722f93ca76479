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

/// Settings of a handshake, and of the stream after it.
struct TlsOptions {
  /// Of a client with certificates: the name or number that the server's certificate must be for. Needed.
  std::string hostname = {};
  /// How long the handshakes may take, all together.
  std::chrono::milliseconds handshake_timeout{10'000};
  const Interrupt* interrupt = nullptr;  ///< ends the handshakes from outside; not owned, may be null
  TlsEnd end = TlsEnd::close_notify;
};

}  // namespace multifd
