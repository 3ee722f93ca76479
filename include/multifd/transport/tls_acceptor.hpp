// SPDX-License-Identifier: MIT
//
// TlsAcceptor: the acceptor of connections that begin with a TLS handshake. A source makes the handshakes of all its
// channels before any of them sends, so the acceptor makes all handshakes side by side, and waits for the first bytes
// behind them side by side, too. A stranger that speaks no TLS, or has no certificate of the right authority, is closed
// and delays no other connection.
//
//   auto credentials = TlsCredentials::x509("/etc/pki/qemu", TlsRole::server);
//   auto listener = Listener::listen(address, 17);
//   auto acceptor = TlsAcceptor::open(*listener, {.credentials = &*credentials, .tls = {.end = TlsEnd::fin}});
//   auto source = accept_source(*acceptor, 16);  // qemu/accept_source.hpp
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/tls.hpp"

namespace multifd {

/// Settings of a TlsAcceptor. `credentials` must be set.
struct TlsAcceptorOptions {
  /// This side's credentials, of role TlsRole::server. Must live as long as the acceptor.
  const TlsCredentials* credentials = nullptr;
  /// Settings of each handshake. Here `handshake_timeout` holds for one connection, until its first four bytes have
  /// come; 0: no limit. `interrupt` is not used, because next() has a parameter for it.
  TlsOptions tls{};
  /// Called when a connection was closed, with the reason: an error of its TLS, or its time limit; in the thread of
  /// next(). The connection may be a stranger's, and the source may still come. Default: none.
  std::function<void(const Error&)> on_refused{};

  std::chrono::milliseconds limit() const noexcept { return tls.handshake_timeout; }
  /// Errors: Errc::bad_option for missing credentials or a negative time limit.
  [[nodiscard]] Result<void> check() const noexcept {
    if (credentials == nullptr) return fail(Errc::bad_option, Stage::accept, "TlsAcceptorOptions::credentials");
    if (credentials->role() != TlsRole::server)
      return fail(Errc::bad_option, Stage::accept, "TlsAcceptorOptions::credentials: not of TlsRole::server");
    return check_time_limit("TlsOptions::handshake_timeout", tls.handshake_timeout, Stage::accept);
  }
};

namespace detail {

/// A connection that makes its handshake, and then sends its first bytes.
class TlsPending {
 public:
  using Link = TlsTransport;
  using Options = TlsAcceptorOptions;
  static constexpr std::uint32_t events = EPOLLIN;
  static constexpr Stage stage = Stage::handshake;
  static constexpr const char* what = "TLS handshake and first bytes";

  [[nodiscard]] static Result<TlsPending> start(FdTransport link, const Options& options) {
    auto handshake = TlsHandshake::start(std::move(link), *options.credentials, options.tls);
    if (!handshake) return std::unexpected(handshake.error());
    return TlsPending(std::move(*handshake));
  }

  int native_handle() const noexcept { return link_ ? link_->native_handle() : handshake_.native_handle(); }

  [[nodiscard]] Result<FirstSaid> step(std::uint32_t) noexcept {
    if (!link_) {
      const auto progress = handshake_.step();
      if (!progress) return std::unexpected(progress.error());
      // A server's flight fits into an empty socket buffer, so the handshake only ever waits for bytes to read.
      if (*progress != TlsHandshake::Progress::done) return FirstSaid{};
      link_.emplace(handshake_.take());
    }
    const auto first = peek_magic(*link_, std::chrono::milliseconds(0));
    if (first) return FirstSaid{.done = true, .magic = *first};
    if (first.error().code == Errc::timed_out) return FirstSaid{};
    return std::unexpected(first.error());
  }

  TlsTransport take() noexcept { return std::move(*link_); }

 private:
  explicit TlsPending(TlsHandshake handshake) noexcept : handshake_(std::move(handshake)) {}

  TlsHandshake handshake_;
  std::optional<TlsTransport> link_{};  ///< once the handshake is made
};

}  // namespace detail

/// The acceptor of connections under TLS. Each connection that it returns has made its handshake.
using TlsAcceptor = BasicAcceptor<detail::TlsPending>;

static_assert(check_acceptor<TlsAcceptor>());

}  // namespace multifd
