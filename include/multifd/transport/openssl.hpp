// SPDX-License-Identifier: MIT
//
// OpensslTransport: the Transport over TLS on a connected socket, by OpenSSL (basic_tls.hpp). It speaks with any TLS, so
// with TlsTransport (tls.hpp, GnuTLS) and with a QEMU, at less than half of their cost.
//
//   auto credentials = OpensslCredentials::x509("/etc/pki/qemu", TlsRole::client);
//   auto links = connect_channels(address, 4);
//   auto secured = tls_handshakes(std::move(*links), *credentials, {.hostname = "192.0.2.7"});
//   auto tx = Sender<OpensslTransport, Zstd, ZeroPagesMultifd>::open(ram, std::move(*secured));
#pragma once

#include "multifd/transport/basic_tls.hpp"
#include "multifd/transport/detail/openssl_engine.hpp"
#include "multifd/transport/openssl_credentials.hpp"
#include "multifd/transport/policy.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// A Transport over a TLS session of OpenSSL: TLS 1.3, or 1.2 with an AEAD (AES-GCM, ChaCha20-Poly1305).
/// Cost: the cipher. Several records go in one system call, in either direction. What is written is encrypted from where
///   it lies; what is read is decrypted to where it belongs, but for a record that belongs to two reads, which is copied.
///   Memory: up to 0.4 MiB for a connection that sends and receives, allocated with the first bytes; nothing after that.
using OpensslTransport = BasicTlsTransport<detail::OpensslEngine>;

/// A handshake by OpenSSL that never waits.
using OpensslHandshake = BasicTlsHandshake<detail::OpensslEngine>;

static_assert(check_transport<OpensslTransport>());

}  // namespace multifd
