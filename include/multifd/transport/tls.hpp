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
/// Cost: a system call for each record, in either direction. A write copies what does not fill a record by itself; a read
///   copies from GnuTLS' buffer into the caller's. Nothing is allocated here after the handshake; GnuTLS allocates for
///   each record.
using TlsTransport = BasicTlsTransport<detail::GnutlsEngine>;

/// A handshake by GnuTLS that never waits.
using TlsHandshake = BasicTlsHandshake<detail::GnutlsEngine>;

static_assert(check_transport<TlsTransport>());

}  // namespace multifd
