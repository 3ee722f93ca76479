// SPDX-License-Identifier: MIT
//
// Channels under TLS: both ends of plain links, their handshakes made at the same time.
#pragma once

#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/transport/tls.hpp"
#include "support/links.hpp"
#include "support/tls_files.hpp"

namespace test {

using multifd::TlsCredentials;
using multifd::TlsOptions;
using multifd::TlsRole;
using multifd::TlsTransport;

/// Of a directory of tls_files(), or of a file of keys.
inline TlsCredentials credentials(const std::string& name, TlsRole role, const std::string& user = "qemu") {
  const std::string path = tls_files() + "/" + name;
  auto made = name.ends_with(".psk") ? TlsCredentials::psk(path, role, user) : TlsCredentials::x509(path, role);
  REQUIRE_MESSAGE(made.has_value(), text(made));
  return *made;
}

using Secured = multifd::Result<std::vector<TlsTransport>>;

/// Handshakes with both ends; first the client's outcome, then the server's.
inline std::pair<Secured, Secured> handshake_both(Links<FdTransport> links, const TlsCredentials& client,
                                                  const TlsCredentials& server, TlsOptions options = {}) {
  if (options.hostname.empty()) options.hostname = "localhost";
  Secured served;
  std::thread serving([&] { served = multifd::tls_handshakes(std::move(links.receiver), server, options); });
  Secured connected = multifd::tls_handshakes(std::move(links.sender), client, options);
  serving.join();
  return {std::move(connected), std::move(served)};
}

inline Links<TlsTransport> tls_links(Links<FdTransport> links, const std::string& name = "good",
                                     const TlsOptions& options = {}) {
  auto [client, server] =
      handshake_both(std::move(links), credentials(name, TlsRole::client), credentials(name, TlsRole::server), options);
  REQUIRE_MESSAGE(client.has_value(), text(client));
  REQUIRE_MESSAGE(server.has_value(), text(server));
  return {std::move(*client), std::move(*server)};
}

}  // namespace test
