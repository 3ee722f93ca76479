// SPDX-License-Identifier: MIT
//
// TLS for the programs, by their options: --tls-dir or --tls-psk, --tls-library, --tls-cipher, and what goes with them.
#pragma once

#include <multifd/transport/acceptor.hpp>
#include <multifd/transport/address.hpp>
#include <multifd/transport/basic_tls_acceptor.hpp>
#if defined(MULTIFD_HAS_TLS)
#include <multifd/transport/tls_acceptor.hpp>
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include <multifd/transport/openssl_acceptor.hpp>
#endif

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"

namespace program {

// What each library of TLS brings; std::monostate: the programs have none of them, or TLS is off.
// clang-format off
using AnyCredentials = std::variant<std::monostate
#if defined(MULTIFD_HAS_TLS)
                                    , multifd::TlsCredentials
#endif
#if defined(MULTIFD_HAS_OPENSSL)
                                    , multifd::OpensslCredentials
#endif
                                    >;
using AnyAcceptor = std::variant<multifd::PlainAcceptor
#if defined(MULTIFD_HAS_TLS)
                                 , multifd::TlsAcceptor
#endif
#if defined(MULTIFD_HAS_OPENSSL)
                                 , multifd::OpensslAcceptor
#endif
                                 >;
// clang-format on

/// The acceptor of a program whose TLS is on, over the library that its options name.
class TlsAcceptor {
 public:
  using Link = program::Link;

  template <class A>
  explicit TlsAcceptor(A held) : held_(std::move(held)) {}

  multifd::Result<std::optional<multifd::Arrival<Link>>> next(std::chrono::steady_clock::time_point deadline,
                                                              const multifd::Interrupt* interrupt = nullptr) {
    return std::visit(
        [&](auto& held) -> multifd::Result<std::optional<multifd::Arrival<Link>>> {
          auto got = held.next(deadline, interrupt);
          if (!got) return std::unexpected(got.error());
          if (!*got) return std::nullopt;
          return multifd::Arrival<Link>{Link(std::move((*got)->link)), (*got)->number, (*got)->magic};
        },
        held_);
  }
  multifd::Result<void> watch_end(const Link& link, std::uint32_t events = 0) noexcept {
    return std::visit([&](auto& held) { return held.watch_end(link, events); }, held_);
  }
  bool pending() const noexcept {
    return std::visit([](const auto& held) { return held.pending(); }, held_);
  }

 private:
  AnyAcceptor held_;
};

/// Which end of the connections a program is. The end that connects is the client.
enum class TlsSide { client, server };

class Tls {
 public:
  /// Adds --tls-dir, --tls-psk, --tls-library, --tls-cipher, --tls-records-per-key, and a client's --tls-hostname and
  /// --tls-user; `prefix`: as of StackOptions.
  void add_to(CLI::App& app, TlsSide side, const std::string& prefix = {});

  /// Reads the credentials, or says on stderr that nothing is encrypted when `address` can be reached from elsewhere.
  /// Throws Usage, Failure.
  void prepare(const multifd::Address& address);

  /// Called by a program that can connect or listen, when it listens. Before prepare().
  void be_server() noexcept { side_ = TlsSide::server; }

  /// --tls-dir or --tls-psk, --tls-library, --tls-cipher, --tls-records-per-key with their values, for another program;
  /// nothing when TLS is off.
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
  std::string library_;
  std::string cipher_ = "auto";
  std::uint64_t records_per_key_ = multifd::TlsOptions{}.records_per_key;
  bool bare_ends_ = false;
  multifd::TlsOptions options() const;

  std::shared_ptr<const AnyCredentials> credentials_ = std::make_shared<const AnyCredentials>();
};

/// The cipher as the end of a summary: "; TLS1.3 AES-128-GCM", or nothing when the connection was plain.
std::string cipher_note(const std::string& cipher);

}  // namespace program
