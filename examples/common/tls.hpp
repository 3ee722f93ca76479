// SPDX-License-Identifier: MIT
//
// TLS for the programs, by their options: --tls-dir or --tls-psk, --tls-cipher, and what goes with them.
#pragma once

#include <multifd/transport/acceptor.hpp>
#include <multifd/transport/address.hpp>
#if defined(MULTIFD_HAS_TLS)
#include <multifd/transport/tls_acceptor.hpp>
#endif

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"

namespace program {

#if defined(MULTIFD_HAS_TLS)
using multifd::TlsAcceptor;
#else
using TlsAcceptor = multifd::PlainAcceptor;  // none is ever made: Tls::on() is false
#endif

/// Which end of the connections a program is. The end that connects is the client.
enum class TlsSide { client, server };

class Tls {
 public:
  /// Adds --tls-dir, --tls-psk, --tls-cipher, and a client's --tls-hostname and --tls-user; `prefix`: as of
  /// StackOptions.
  void add_to(CLI::App& app, TlsSide side, const std::string& prefix = {});

  /// Reads the credentials, or says on stderr that nothing is encrypted when `address` can be reached from elsewhere.
  /// Throws Usage, Failure.
  void prepare(const multifd::Address& address);

  /// Called by a program that can connect or listen, when it listens. Before prepare().
  void be_server() noexcept { side_ = TlsSide::server; }

  /// --tls-dir or --tls-psk and --tls-cipher with their values, for another program; nothing when TLS is off.
  std::vector<std::string> arguments() const;

  /// For a QEMU on the other side: its connections may end without a close_notify.
  void take_bare_ends() noexcept { bare_ends_ = true; }

  bool on() const noexcept { return !directory_.empty() || !keys_.empty(); }

  /// Makes the handshakes of all links at once, when TLS is on.
  multifd::Result<std::vector<Link>> secure(std::vector<multifd::FdTransport> links,
                                            const multifd::Interrupt& interrupt,
                                            std::chrono::milliseconds timeout = std::chrono::seconds(10)) const;
  multifd::Result<Link> secure(multifd::FdTransport link, const multifd::Interrupt& interrupt,
                               std::chrono::milliseconds timeout = std::chrono::seconds(10)) const;
  /// The same for the channels to a QEMU: each makes its handshake with its first write, beside the others.
  multifd::Result<std::vector<Link>> secure_with_first_write(std::vector<multifd::FdTransport> links) const;
  /// For a program whose TLS is on: lets connections in that it trusts, and says on stderr which it closes. This object
  /// and `listener` have to outlive it. Throws Failure.
  ///
  /// Params `each`: how long a connection may take to say its first bytes, its handshake included; 0: no limit.
  TlsAcceptor acceptor(multifd::Listener& listener, std::chrono::milliseconds each) const;

 private:
  TlsSide side_ = TlsSide::client;
  std::string directory_;
  std::string keys_;
  std::string hostname_;
  std::string user_ = "qemu";
  std::string cipher_ = "auto";
  bool bare_ends_ = false;
#if defined(MULTIFD_HAS_TLS)
  multifd::TlsOptions options() const;

  std::shared_ptr<const multifd::TlsCredentials> credentials_;
#endif
};

/// The cipher as the end of a summary: "; TLS1.3 AES-128-GCM", or nothing when the connection was plain.
std::string cipher_note(const std::string& cipher);

}  // namespace program
