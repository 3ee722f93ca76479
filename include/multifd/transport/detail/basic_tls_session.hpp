// SPDX-License-Identifier: MIT
//
// One TLS session on top of a socket, whichever library makes it: the handshake in steps that never block, then records.
// What a library does is its engine's (tls_engine.hpp, openssl_engine.hpp); what is the same over all of them is here.
//
// Two threads: one sends while another receives, so an engine keeps the two directions' state apart. A lock guards
// receiving for the one case in which the sending thread reads, too: after a broken write it reads the peer's alert,
// which may have the reason.
#pragma once

#include <poll.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/tls_options.hpp"

namespace multifd::detail {

enum class TlsProgress { done, wants_read, wants_write };

/// A session over an Engine, which is what a library of TLS does for one connection:
///
///   `Engine(link, credentials, options)` keeps copies or takes over; `init()` comes next, once, with errors of stage
///     `setup`.
///   `step()` goes on with the handshake as far as possible without waiting. A failure is sent to the peer as an alert.
///   `write(buffers, wait)` sends records with what is in front of `buffers` and returns how much: at least one byte. All
///     that it counts is on its way. Not so much at once that whoever counts would not see a slow peer's bytes move.
///   `read(buffers, wait)` reads at least one byte, and what has come with it; 0 at the end. After an error that
///     ended_by_wait() it can be called again.
///   `close_notify()` sends it. `cipher()`: protocol and cipher, once step() has returned done.
/// Threads: step() by one; then write() and close_notify() by one, read() by one; link().shutdown() by any. An engine is
///   never moved.
///
/// Threads: step() by one; then write() and finish() by one, read() and look() by one; shutdown() by any.
template <class Engine>
class BasicTlsSession {
 public:
  using Credentials = typename Engine::Credentials;
  static constexpr const char* silent_peer =
      "TLS handshake: the peer is silent; is it alive, and is TLS on there, too?";

  [[nodiscard]] static Result<std::unique_ptr<BasicTlsSession>> create(FdTransport link, const Credentials& credentials,
                                                                       const TlsOptions& options) {
    if (auto checked = check_time_limit("TlsOptions::handshake_timeout", options.handshake_timeout, Stage::setup);
        !checked)
      return std::unexpected(checked.error());
    if (credentials.verifies_hostname() && options.hostname.empty())
      return fail(Errc::bad_option, Stage::setup, "TLS: the name to expect in the server's certificate is missing");
    return catch_bad_alloc(Stage::setup, "TLS session", [&]() -> Result<std::unique_ptr<BasicTlsSession>> {
      std::unique_ptr<BasicTlsSession> made(new BasicTlsSession(std::move(link), credentials, options));
      if (auto begun = made->engine_.init(); !begun) return std::unexpected(begun.error());
      return made;
    });
  }

  BasicTlsSession(const BasicTlsSession&) = delete;
  BasicTlsSession& operator=(const BasicTlsSession&) = delete;

  [[nodiscard]] Result<TlsProgress> step() noexcept {
    auto progress = engine_.step();
    if (progress && *progress == TlsProgress::done) established_ = true;
    return progress;
  }

  /// Makes the whole handshake, if step() has not: in the writing thread, before anything is read.
  [[nodiscard]] Result<void> handshake() noexcept {
    for (const Clock::time_point deadline = deadline_after(as_timeout(handshake_timeout_));;) {
      const auto progress = step();
      if (!progress) return std::unexpected(progress.error());
      if (*progress == TlsProgress::done) return {};
      const short wanted = *progress == TlsProgress::wants_write ? POLLOUT : POLLIN;
      if (auto ready = wait_for(native_handle(), wanted, deadline, interrupt_, Stage::handshake, silent_peer); !ready)
        return ready;
    }
  }

  /// Writes some of `buffers`, so that whoever counts sees bytes move, and a time limit is one for each call.
  [[nodiscard]] Result<std::size_t> write(ConstBuffers buffers, const TlsWait* wait) noexcept {
    if (finished_) return fail(Errc::already_closed, Stage::write, "write");
    if (write_failed_) return std::unexpected(*write_failed_);
    if (!established_) {
      if (auto done = handshake(); !done) {
        write_failed_ = done.error();
        return std::unexpected(done.error());
      }
    }
    const Result<std::size_t> written = engine_.write(buffers, wait);
    if (written) return written;
    write_failed_ = written.error();
    // Under TLS 1.3 a server checks the client's certificate while the client already writes. The server's alert says
    // more than the broken connection behind it. If this side has a reader at work, that one gets the alert.
    const std::unique_lock lock(reading_, std::try_to_lock);
    if (lock && write_failed_->code == Condition::peer_gone) {
      if (auto reason = look_under_lock(&no_wait); !reason && reason.error().code == Condition::peer_protocol) {
        write_failed_ = reason.error();
        write_failed_->stage = Stage::write;
      }
    }
    return std::unexpected(*write_failed_);
  }

  /// Reads what has come, at least one byte; 0 at the end.
  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    if (ahead_bytes_ == 0) return receive(buffers, wait);
    std::size_t taken = 0;
    iovec rest{};
    for (const iovec& buffer : buffers) {
      const std::size_t count = std::min(buffer.iov_len, ahead_bytes_ - taken);
      if (count > 0) std::memcpy(buffer.iov_base, ahead_.data() + taken, count);
      taken += count;
      if (count == buffer.iov_len) continue;
      rest = {.iov_base = static_cast<std::byte*>(buffer.iov_base) + count, .iov_len = buffer.iov_len - count};
      break;
    }
    ahead_bytes_ -= taken;
    std::memmove(ahead_.data(), ahead_.data() + taken, ahead_bytes_);
    // What came with the bytes that were looked at is read with them: a short message is whole in one call. What goes wrong
    // is the next call's error.
    if (taken > 0 && rest.iov_len > 0) taken += receive(std::span(&rest, 1), &no_wait).value_or(0);
    return taken;
  }

  /// The bytes that read() will return next, up to four. Fewer have arrived yet, or the stream has `ended`.
  struct Ahead {
    std::array<std::byte, 4> bytes{};
    std::size_t count = 0;
    bool ended = false;
  };
  [[nodiscard]] Result<Ahead> look(const TlsWait* wait) noexcept {
    const std::scoped_lock lock(reading_);
    return look_under_lock(wait);
  }

  /// Checks, without waiting, whether an alert of the peer has come. Errors: that alert, or another break of the
  /// stream.
  [[nodiscard]] Result<void> probe() noexcept {
    if (!established_) {
      auto progress = step();
      return progress ? Result<void>{} : std::unexpected(progress.error());
    }
    auto ahead = look(&no_wait);
    return ahead ? Result<void>{} : std::unexpected(ahead.error());
  }

  /// Sends close_notify, then FIN.
  [[nodiscard]] Result<void> finish() noexcept {
    if (finished_) return {};
    if (write_failed_) {
      Error error = *write_failed_;
      error.stage = Stage::close;
      return std::unexpected(error);
    }
    // Ahead of the handshake there are no records yet, and nothing to end but the connection.
    if (established_) {
      if (auto said = engine_.close_notify(); !said) {
        write_failed_ = said.error();  // half of it may have gone out
        return said;
      }
    }
    // A peer that needs nothing more may have closed already; then the close_notify itself breaks the connection.
    if (auto ended = engine_.link().finish(); !ended && ended.error().code != std::errc::not_connected) return ended;
    finished_ = true;
    return {};
  }

  /// Whether the handshake is done; nothing can be read before. Threads: the writing one.
  bool established() const noexcept { return established_; }

  void shutdown() noexcept { engine_.link().shutdown(); }
  int native_handle() noexcept { return engine_.link().native_handle(); }
  std::string cipher() const { return established_ ? engine_.cipher() : std::string(); }

 private:
  BasicTlsSession(FdTransport link, const Credentials& credentials, const TlsOptions& options)
      : engine_(std::move(link), credentials, options),
        handshake_timeout_(options.handshake_timeout),
        interrupt_(options.interrupt) {}

  [[nodiscard]] Result<Ahead> look_under_lock(const TlsWait* wait) noexcept {
    bool ended = false;
    while (ahead_bytes_ < ahead_.size() && !ended) {
      const iovec rest = mutable_buffer(std::span(ahead_).subspan(ahead_bytes_));
      const auto count = receive(std::span(&rest, 1), wait);
      if (!count) return std::unexpected(count.error());
      ended = *count == 0;
      ahead_bytes_ += *count;
    }
    return Ahead{ahead_, ahead_bytes_, ended};
  }

  [[nodiscard]] Result<std::size_t> receive(MutableBuffers buffers, const TlsWait* wait) noexcept {
    if (read_failed_) return std::unexpected(*read_failed_);
    const Result<std::size_t> count = engine_.read(buffers, wait);
    if (!count && !ended_by_wait(count.error())) read_failed_ = count.error();
    return count;
  }

  Engine engine_;
  const std::chrono::milliseconds handshake_timeout_;
  const Interrupt* const interrupt_;
  bool established_ = false;

  // Used by the sending thread.
  std::optional<Error> write_failed_;
  bool finished_ = false;

  // Used by the receiving thread, under the lock.
  alignas(cache_line) std::mutex reading_;
  std::optional<Error> read_failed_;
  std::size_t ahead_bytes_ = 0;
  std::array<std::byte, 4> ahead_{};
};

}  // namespace multifd::detail
