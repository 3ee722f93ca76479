// SPDX-License-Identifier: MIT
//
// Channels under TLS, of any of the libraries at either end: both ends of plain links, their handshakes made at the same
// time.
#pragma once

#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(MULTIFD_HAS_TLS)
#include "multifd/transport/tls_acceptor.hpp"
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include "multifd/transport/openssl_acceptor.hpp"
#endif
#include "support/links.hpp"
#include "support/tls_files.hpp"

namespace test {

using multifd::TlsOptions;
using multifd::TlsRole;

/// The libraries that make TLS, of those that this build has.
#if defined(MULTIFD_HAS_TLS)
struct Gnutls {
  using Credentials = multifd::TlsCredentials;
  using Transport = multifd::TlsTransport;
  using Handshake = multifd::TlsHandshake;
};
#endif
#if defined(MULTIFD_HAS_OPENSSL)
struct Openssl {
  using Credentials = multifd::OpensslCredentials;
  using Transport = multifd::OpensslTransport;
  using Handshake = multifd::OpensslHandshake;
};
#endif
/// TLS_LIBRARIES: each; TLS_SIDES: which one is the client, and which the server; SomeTls: for what is the same with all.
#if defined(MULTIFD_HAS_TLS) && defined(MULTIFD_HAS_OPENSSL)
#define TLS_LIBRARIES Gnutls, Openssl
#define TLS_SIDES Sides<Gnutls, Gnutls>, Sides<Openssl, Openssl>, Sides<Gnutls, Openssl>, Sides<Openssl, Gnutls>
using SomeTls = Gnutls;
#elif defined(MULTIFD_HAS_TLS)
#define TLS_LIBRARIES Gnutls
#define TLS_SIDES Sides<Gnutls, Gnutls>
using SomeTls = Gnutls;
#else
#define TLS_LIBRARIES Openssl
#define TLS_SIDES Sides<Openssl, Openssl>
using SomeTls = Openssl;
#endif
template <class C, class S>
struct Sides {
  using Client = C;
  using Server = S;
};

/// Of a directory of tls_files(), or of a file of keys.
template <class Library = SomeTls>
typename Library::Credentials credentials(const std::string& name, TlsRole role, const std::string& user = "qemu") {
  using Credentials = typename Library::Credentials;
  const std::string path = tls_files() + "/" + name;
  auto made = name.ends_with(".psk") ? Credentials::psk(path, role, user) : Credentials::x509(path, role);
  REQUIRE_MESSAGE(made.has_value(), text(made));
  return *made;
}

template <class Credentials>
using Secured = multifd::Result<std::vector<multifd::TlsTransportOf<Credentials>>>;

/// Handshakes with both ends; first the client's outcome, then the server's.
template <class Client, class Server>
std::pair<Secured<Client>, Secured<Server>> handshake_both(Links<FdTransport> links, const Client& client,
                                                           const Server& server, TlsOptions options = {}) {
  if (options.hostname.empty()) options.hostname = "localhost";
  Secured<Server> served;
  std::thread serving([&] { served = multifd::tls_handshakes(std::move(links.receiver), server, options); });
  Secured<Client> connected = multifd::tls_handshakes(std::move(links.sender), client, options);
  serving.join();
  return {std::move(connected), std::move(served)};
}

/// The client is the sender.
template <class Client, class Server>
struct SecuredLinks {
  std::vector<typename Client::Transport> sender;
  std::vector<typename Server::Transport> receiver;
};

template <class P>
SecuredLinks<typename P::Client, typename P::Server> tls_links_of(Links<FdTransport> links,
                                                                  const std::string& name = "good",
                                                                  const TlsOptions& options = {}) {
  auto [client, server] = handshake_both(std::move(links), credentials<typename P::Client>(name, TlsRole::client),
                                         credentials<typename P::Server>(name, TlsRole::server), options);
  REQUIRE_MESSAGE(client.has_value(), text(client));
  REQUIRE_MESSAGE(server.has_value(), text(server));
  return {std::move(*client), std::move(*server)};
}

/// The same with one library at both ends.
template <class Library = SomeTls>
Links<typename Library::Transport> tls_links(Links<FdTransport> links, const std::string& name = "good",
                                             const TlsOptions& options = {}) {
  auto secured = tls_links_of<Sides<Library, Library>>(std::move(links), name, options);
  return {std::move(secured.sender), std::move(secured.receiver)};
}

}  // namespace test
