// SPDX-License-Identifier: MIT
//
// The acceptor of connections that begin with a TLS handshake, whichever library makes it. A source makes the handshakes
// of all its channels before any of them sends, so the acceptor makes all handshakes side by side, and waits for the
// first bytes behind them side by side, too. A stranger that speaks no TLS, or has no certificate of the right authority,
// is closed and delays no other connection.
//
// Not included by users: tls_acceptor.hpp (GnuTLS) and openssl_acceptor.hpp (OpenSSL) have the names.
#pragma once

#include <sys/epoll.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>

#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/basic_tls.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// Settings of an acceptor under TLS. `credentials` must be set.
template <class Credentials>
struct BasicTlsAcceptorOptions {
  /// This side's credentials, of role TlsRole::server. Must live as long as the acceptor.
  const Credentials* credentials = nullptr;
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
template <class Engine>
class BasicTlsPending {
 public:
  using Link = BasicTlsTransport<Engine>;
  using Options = BasicTlsAcceptorOptions<typename Engine::Credentials>;
  static constexpr std::uint32_t events = EPOLLIN;
  static constexpr Stage stage = Stage::handshake;
  static constexpr const char* what = "TLS handshake and first bytes";

  [[nodiscard]] static Result<BasicTlsPending> start(FdTransport link, const Options& options) {
    auto handshake = BasicTlsHandshake<Engine>::start(std::move(link), *options.credentials, options.tls);
    if (!handshake) return std::unexpected(handshake.error());
    return BasicTlsPending(std::move(*handshake));
  }

  int native_handle() const noexcept { return link_ ? link_->native_handle() : handshake_.native_handle(); }

  [[nodiscard]] Result<FirstSaid> step(std::uint32_t) noexcept {
    if (!link_) {
      const auto progress = handshake_.step();
      if (!progress) return std::unexpected(progress.error());
      // A server's flight fits into an empty socket buffer, so the handshake only ever waits for bytes to read.
      if (*progress != TlsProgress::done) return FirstSaid{};
      link_.emplace(handshake_.take());
    }
    const auto first = peek_magic(*link_, std::chrono::milliseconds(0));
    if (first) return FirstSaid{.done = true, .magic = *first};
    if (first.error().code == Errc::timed_out) return FirstSaid{};
    return std::unexpected(first.error());
  }

  Link take() noexcept { return std::move(*link_); }

 private:
  explicit BasicTlsPending(BasicTlsHandshake<Engine> handshake) noexcept : handshake_(std::move(handshake)) {}

  BasicTlsHandshake<Engine> handshake_;
  std::optional<Link> link_{};  ///< once the handshake is made
};

}  // namespace detail

/// The acceptor that goes with some credentials, so with a library.
template <class Credentials>
using TlsAcceptorOf = BasicAcceptor<detail::BasicTlsPending<typename Credentials::Engine>>;

}  // namespace multifd
