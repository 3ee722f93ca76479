// SPDX-License-Identifier: MIT
//
// TlsAcceptor: the acceptor of connections that begin with a TLS handshake, by GnuTLS (basic_tls_acceptor.hpp).
// OpensslAcceptor (openssl_acceptor.hpp) is the same by OpenSSL.
//
//   auto credentials = TlsCredentials::x509("/etc/pki/qemu", TlsRole::server);
//   auto listener = Listener::listen(address, 17);
//   auto acceptor = TlsAcceptor::open(*listener, {.credentials = &*credentials, .tls = {.end = TlsEnd::fin}});
//   auto source = accept_source(*acceptor, 16);  // qemu/accept_source.hpp
#pragma once

#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/basic_tls_acceptor.hpp"
#include "multifd/transport/tls.hpp"

namespace multifd {

/// Settings of a TlsAcceptor. `credentials` must be set.
using TlsAcceptorOptions = BasicTlsAcceptorOptions<TlsCredentials>;

/// The acceptor of connections under TLS. Each connection that it returns has made its handshake.
using TlsAcceptor = TlsAcceptorOf<TlsCredentials>;

static_assert(check_acceptor<TlsAcceptor>());

}  // namespace multifd
