// SPDX-License-Identifier: MIT
//
// The Transport over TLS on a connected socket, whichever library makes it, as QEMU does it: each connection is a session
// of its own from its first byte on (format/tls.md section 14). The handshake comes first, and for all connections of a
// migration at once: a server may see channels before it has read the end of the main connection's handshake.
//
// Not included by users: tls.hpp (GnuTLS) and openssl.hpp (OpenSSL) have the names.
#pragma once

#include <poll.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/detail/basic_tls_session.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd {

/// A Transport over a TLS session.
///
/// Semantics: finish() sends close_notify, then FIN. A stream that the peer cut without close_notify is an error
///   (`tls_truncated`, or a reset), never an end, unless TlsOptions::end says otherwise.
/// Errors: those of FdTransport; `tls_truncated`; `tls_refused` and its kin when the peer's alert says that it does not
///   take this side's certificate, which under TLS 1.3 shows only here; the library's own codes for records that do not
///   decrypt. After an error the buffers of a read hold anything.
/// Cost: records of 16 KiB, full ones as long as there are bytes. What else: the library's (tls.hpp, openssl.hpp).
/// Threads: one writes and finishes, one reads; shutdown() from any while they do.
template <class Engine>
class BasicTlsTransport {
 public:
  using Credentials = typename Engine::Credentials;
  /// Makes a connection that does its handshake in its first write, so in the channel's own thread, within
  /// options.handshake_timeout. options.interrupt must live until then. Nothing can be read before that write.
  /// For a client whose peer is a QEMU, which reads a channel's first packet before it does the next channel's
  /// handshake: the handshakes of all channels cannot come first.
  /// Errors: those of BasicTlsHandshake::start(); the write has those of its step().
  [[nodiscard]] static Result<BasicTlsTransport> on_first_write(FdTransport link, const Credentials& credentials,
                                                                const TlsOptions& options) {
    auto session = detail::BasicTlsSession<Engine>::create(std::move(link), credentials, options);
    if (!session) return std::unexpected(session.error());
    return BasicTlsTransport(std::move(*session));
  }

  /// Threads: one writing thread.
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    if (!session_) return fail(Errc::already_closed, Stage::write, "write");
    return session_->write(buffers, nullptr);
  }

  /// Threads: one reading thread.
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    if (!session_) return fail(Errc::already_closed, Stage::read, "read");
    return session_->read(buffers, nullptr);
  }

  /// The same with a time limit for waits, and an Interrupt (may be null) that ends them. A read that ended so can be
  /// tried again. A write cannot, because how much of it was sent is unknown.
  /// Errors: `timed_out`, `cancelled`, beside those above.
  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept {
    if (!session_) return fail(Errc::already_closed, Stage::write, "write");
    const detail::TlsWait wait{deadline_after(timeout), interrupt};
    return session_->write(buffers, &wait);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept {
    if (!session_) return fail(Errc::already_closed, Stage::read, "read");
    const detail::TlsWait wait{deadline_after(timeout), interrupt};
    return session_->read(buffers, &wait);
  }

  /// As FdTransport's. Every TLS connection can carry an answer.
  bool is_two_way() const noexcept { return true; }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept {
    if (session_ && !session_->established()) return std::size_t{0};  // the handshake would wait
    // A record that is begun has to be written to its end. What is written so, an answer, fits where there is any room.
    if (pollfd socket{.fd = native_handle(), .events = POLLOUT, .revents = 0}; ::poll(&socket, 1, 0) == 0)
      return std::size_t{0};
    return write_some(buffers, at_once, nullptr);
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept {
    if (!session_ || !session_->established()) return std::size_t{0};
    const auto arrived = read_some(buffers, at_once, nullptr);
    if (!arrived && arrived.error().code == Errc::timed_out) return std::size_t{0};
    return arrived;
  }

  /// Sends close_notify, then FIN. Errors: `cancelled` after shutdown(); the error of an earlier write that failed.
  /// Threads: the writing thread.
  [[nodiscard]] Result<void> finish() noexcept {
    if (!session_) return fail(Errc::already_closed, Stage::close, "finish");
    return session_->finish();
  }

  /// Cuts the stream, as FdTransport does. Threads: any, any number of times; not beside the destructor.
  void shutdown() noexcept {
    if (session_) session_->shutdown();
  }

  /// The socket, still owned by this object. A readable socket does not mean readable data: it carries records.
  int native_handle() const noexcept { return session_ ? session_->native_handle() : -1; }

  /// That native_handle() carries records: AnyTransport::secured(). Threads: any.
  static constexpr bool secured() noexcept { return true; }

  /// Protocol and cipher that were agreed on, in GnuTLS' names whatever the library: "TLS1.3 AES-128-GCM". Empty ahead of the handshake.
  /// Threads: any, but not beside the handshake, which may be the first write's.
  std::string cipher() const { return session_ ? session_->cipher() : std::string(); }

 private:
  template <class E>
  friend class BasicTlsHandshake;
  template <class E>
  friend Result<std::uint32_t> peek_magic(BasicTlsTransport<E>& transport, std::chrono::milliseconds timeout,
                                          const Interrupt* interrupt) noexcept;

  explicit BasicTlsTransport(std::unique_ptr<detail::BasicTlsSession<Engine>> session) noexcept
      : session_(std::move(session)) {}

  /// Long enough to read all parts of a record that has arrived, without waiting for another.
  static constexpr std::chrono::milliseconds at_once{1};

  std::unique_ptr<detail::BasicTlsSession<Engine>> session_;
};

/// A handshake that never waits, for programs that poll several descriptors at once. Its result is a BasicTlsTransport.
/// Threads: one at a time.
template <class Engine>
class BasicTlsHandshake {
 public:
  using Credentials = typename Engine::Credentials;
  using Progress = detail::TlsProgress;

  /// Takes over a connected socket. The caller enforces the time limit and the Interrupt of the options.
  /// Errors (stage `setup`): bad_option for a client that lacks the hostname; the library's own.
  [[nodiscard]] static Result<BasicTlsHandshake> start(FdTransport link, const Credentials& credentials,
                                                       const TlsOptions& options) {
    auto session = detail::BasicTlsSession<Engine>::create(std::move(link), credentials, options);
    if (!session) return std::unexpected(session.error());
    return BasicTlsHandshake(std::move(*session));
  }

  /// Goes on as far as possible without waiting. After wants_read or wants_write call it again when native_handle() is
  /// ready for that.
  /// Errors (stage `handshake`): `tls_untrusted_certificate`, `tls_expired_certificate`, `tls_revoked_certificate`,
  ///   `tls_wrong_purpose`, `tls_wrong_hostname`, `tls_no_certificate`, `tls_wrong_key`: this side does not accept the
  ///   peer; `tls_refused`, `tls_wrong_key` (detail: the alert): the peer does not accept this side;
  ///   `tls_no_common_ground`; `tls_not_spoken`; `peer_closed`, errno.
  /// Threads: one at a time. Never blocks.
  /// Wire: format/tls.md section 14.
  [[nodiscard]] Result<Progress> step() noexcept { return session_->step(); }

  int native_handle() const noexcept { return session_->native_handle(); }

  /// The reason in an alert of the peer that has not been read yet, if there is one.
  std::optional<Error> unheard_reason() noexcept {
    const Result<void> looked = session_->probe();
    if (looked || looked.error().code != Condition::peer_protocol) return std::nullopt;
    return looked.error();
  }

  /// The transport, once step() has returned done. Call it once.
  BasicTlsTransport<Engine> take() noexcept { return BasicTlsTransport<Engine>(std::move(session_)); }

 private:
  explicit BasicTlsHandshake(std::unique_ptr<detail::BasicTlsSession<Engine>> session) noexcept
      : session_(std::move(session)) {}

  std::unique_ptr<detail::BasicTlsSession<Engine>> session_;
};

/// The transport that goes with some credentials, so with a library.
template <class Credentials>
using TlsTransportOf = BasicTlsTransport<typename Credentials::Engine>;

namespace detail {

/// tls_handshakes(), where memory may be missing.
template <class Credentials>
[[nodiscard]] Result<std::vector<TlsTransportOf<Credentials>>> make_handshakes(std::vector<FdTransport> links,
                                                                               const Credentials& credentials,
                                                                               const TlsOptions& options) {
  using Handshake = BasicTlsHandshake<typename Credentials::Engine>;
  const Clock::time_point deadline = deadline_after(as_timeout(options.handshake_timeout));
  std::vector<Handshake> running;
  running.reserve(links.size());
  for (FdTransport& link : links) {
    auto started = Handshake::start(std::move(link), credentials, options);
    if (!started) return std::unexpected(started.error());
    running.push_back(std::move(*started));
  }
  const auto blame = [&](Error error, std::size_t index) {
    // A peer that refuses one connection drops the others. Any of them may hold the reason.
    for (std::size_t i = 0; i < running.size() && error.code == Condition::peer_gone; ++i) {
      if (i == index) continue;
      if (const auto reason = running[i].unheard_reason()) error = *reason, index = i;
    }
    error.channel = static_cast<std::uint32_t>(index);
    return std::unexpected(error);
  };
  // One entry for each handshake, -1 once that is done; the last entry is the Interrupt.
  std::vector<pollfd> events(running.size() + 1, pollfd{.fd = -1, .events = POLLIN, .revents = POLLIN});
  events.back() = {.fd = options.interrupt ? options.interrupt->native_handle() : -1, .events = POLLIN, .revents = 0};
  for (std::size_t left = running.size(); left > 0;) {
    std::size_t waiting = 0;
    for (std::size_t i = 0; i < running.size(); ++i) {
      if (events[i].revents == 0) {
        if (events[i].fd >= 0) waiting = i;
        continue;
      }
      const auto progress = running[i].step();
      if (!progress) return blame(progress.error(), i);
      if (*progress == TlsProgress::done) {
        events[i] = {.fd = -1, .events = 0, .revents = 0};
        --left;
        continue;
      }
      const short wanted = *progress == TlsProgress::wants_write ? POLLOUT : POLLIN;
      events[i] = {.fd = running[i].native_handle(), .events = wanted, .revents = 0};
      waiting = i;
    }
    if (left == 0) break;
    const int ready = ::poll(events.data(), events.size(), poll_timeout(deadline));
    if (ready < 0 && errno != EINTR) return blame(fail_errno(Stage::handshake, "poll").error(), waiting);
    if (events.back().revents != 0) return fail(Errc::cancelled, Stage::handshake, "TLS handshake");
    if (ready == 0 && Clock::now() >= deadline)
      return blame(
          fail(Errc::timed_out, Stage::handshake, BasicTlsSession<typename Credentials::Engine>::silent_peer).error(),
          waiting);
  }
  std::vector<TlsTransportOf<Credentials>> secured;
  secured.reserve(running.size());
  for (Handshake& one : running) secured.push_back(one.take());
  return secured;
}

}  // namespace detail

/// Makes the handshakes of all `links` at once, in the calling thread.
/// Params `credentials`: TlsCredentials, or OpensslCredentials; they choose the library.
/// Returns the transports in the same order.
/// Errors: those of BasicTlsHandshake; `timed_out` when a peer is silent, `cancelled` (stage `handshake`); channel: the
///   index of the link; ENOMEM. One failure closes all links.
/// Threads: any. Cost: an allocation and a handshake's arithmetic for each link, about a millisecond; they wait together.
template <class Credentials>
[[nodiscard]] Result<std::vector<TlsTransportOf<Credentials>>> tls_handshakes(std::vector<FdTransport> links,
                                                                              const Credentials& credentials,
                                                                              const TlsOptions& options = {}) {
  return catch_bad_alloc(Stage::handshake, "TLS handshake",
                         [&] { return detail::make_handshakes(std::move(links), credentials, options); });
}

/// The same for one connection. Errors: as tls_handshakes(), without a channel.
template <class Credentials>
[[nodiscard]] Result<TlsTransportOf<Credentials>> tls_handshake(FdTransport link, const Credentials& credentials,
                                                                const TlsOptions& options = {}) {
  auto secured = catch_bad_alloc(Stage::handshake, "TLS handshake", [&] {
    std::vector<FdTransport> links;
    links.push_back(std::move(link));
    return tls_handshakes(std::move(links), credentials, options);
  });
  if (secured) return std::move(secured->front());
  secured.error().channel = no_channel;
  return std::unexpected(secured.error());
}

/// peek_magic() of listen.hpp for a transport under TLS: the first four decrypted bytes, which stay in the session to be
/// read. Params, Errors, Wire: as there. Threads: the reading thread.
template <class Engine>
[[nodiscard]] Result<std::uint32_t> peek_magic(BasicTlsTransport<Engine>& transport, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt = nullptr) noexcept {
  const detail::TlsWait wait{deadline_after(timeout), interrupt};
  const auto ahead = transport.session_->look(&wait);
  if (!ahead) {
    Error error = ahead.error();
    error.stage = Stage::accept;
    return std::unexpected(error);
  }
  if (ahead->count == ahead->bytes.size()) {
    std::uint32_t magic = 0;
    for (const std::byte byte : ahead->bytes) magic = magic << 8 | std::to_integer<std::uint32_t>(byte);
    return magic;
  }
  if (ahead->count == 0) return fail(Errc::peer_closed, Stage::accept, "peek");
  return fail(Errc::truncated_hello, Stage::accept, "peek", ahead->count);
}

}  // namespace multifd
