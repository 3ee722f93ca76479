// SPDX-License-Identifier: MIT
//
// TlsTransport: the Transport over TLS on a connected socket, by GnuTLS (basic_tls.hpp). OpensslTransport (openssl.hpp)
// is the same by OpenSSL, and faster.
//
//   auto credentials = TlsCredentials::x509("/etc/pki/qemu", TlsRole::client);
//   auto links = connect_channels(address, 4);
//   auto secured = tls_handshakes(std::move(*links), *credentials, {.hostname = "192.0.2.7"});
//   auto tx = Sender<TlsTransport, Zstd, ZeroPagesMultifd>::open(ram, std::move(*secured));
#pragma once

#include "multifd/transport/basic_tls.hpp"
#include "multifd/transport/detail/tls_engine.hpp"
#include "multifd/transport/policy.hpp"
#include "multifd/transport/tls_credentials.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// A Transport over a TLS session of GnuTLS.
/// Cost: up to eight records in a system call that sends, more in one that receives. A write copies what does not fill a
///   record by itself, and what GnuTLS has encrypted; a read copies what came behind the record that it asked for, and what
///   GnuTLS has decrypted. Memory: up to 0.4 MiB for a connection that sends and receives, allocated with the first bytes;
///   GnuTLS allocates for each record.
using TlsTransport = BasicTlsTransport<detail::GnutlsEngine>;

/// A handshake by GnuTLS that never waits.
using TlsHandshake = BasicTlsHandshake<detail::GnutlsEngine>;

static_assert(check_transport<TlsTransport>());

}  // namespace multifd
