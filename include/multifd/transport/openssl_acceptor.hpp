// SPDX-License-Identifier: MIT
//
// OpensslAcceptor: the acceptor of connections that begin with a TLS handshake, by OpenSSL (basic_tls_acceptor.hpp). All
// else as TlsAcceptor (tls_acceptor.hpp).
#pragma once

#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/basic_tls_acceptor.hpp"
#include "multifd/transport/openssl.hpp"

namespace multifd {

/// Settings of an OpensslAcceptor. `credentials` must be set.
using OpensslAcceptorOptions = BasicTlsAcceptorOptions<OpensslCredentials>;

/// The acceptor of connections under TLS. Each connection that it returns has made its handshake.
using OpensslAcceptor = TlsAcceptorOf<OpensslCredentials>;

static_assert(check_acceptor<OpensslAcceptor>());

}  // namespace multifd
