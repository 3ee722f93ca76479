// SPDX-License-Identifier: MIT
//
// Reads a main stream from a connection: elements as they come, with a time limit for each wait and an Interrupt.
// MainStreamParser (main_stream.hpp) cuts the bytes into elements, and needs no connection.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <system_error>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/qemu/main_stream.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu {

/// The elements of the main stream on one connection.
///
/// Params `T`: FdTransport, TlsTransport, AnyTransport, or another with time limits.
/// Threads: one, the transport's reading thread; bytes() from any.
/// Cost: one system call per read; nothing is allocated after the parser was made.
/// Example:
///
///     MainStreamReader reader(links.main, std::move(*parser));
///     for (;;) {
///       auto element = reader.next(std::chrono::seconds(30), &interrupt);
///       if (!element) return report(element.error(), reader.parser().subject());
///       if (!*element) break;  // the stream has ended where it may
///       handle(**element);
///     }
template <Transport T>
  requires HasTimeLimits<T>
class MainStreamReader {
 public:
  /// Params `link`: must outlive this object, and must not be read elsewhere meanwhile. `parser`: a fresh one.
  MainStreamReader(T& link, MainStreamParser parser) : link_(&link), parser_(std::move(parser)) {}

  /// The next element that has arrived; none when it is not whole yet. Never waits.
  ///
  /// Errors: those of MainStreamParser::next(), sticky.
  [[nodiscard]] Result<std::optional<Element>> arrived() noexcept { return parser_.next(); }

  /// Waits for bytes, and reads once. Called after arrived() has returned none.
  ///
  /// Params `timeout`: no_timeout: for ever. `interrupt`: may be null.
  /// Returns whether bytes have come; false: the connection has ended, where the stream may end (ended()).
  /// Errors: timed_out, cancelled: may be called again; the transport's when the connection broke, truncated_stream
  ///   when it ended in order, both inside the stream: arrived() is truncated_stream from then on, and its op names the
  ///   place.
  [[nodiscard]] Result<bool> read(std::chrono::milliseconds timeout, const Interrupt* interrupt = nullptr) noexcept {
    if (ended_) return false;
    const iovec room = mutable_buffer(parser_.room());
    const auto got = link_->read_some(std::span(&room, 1), timeout, interrupt);
    if (got && *got > 0) {
      parser_.commit(*got);
      bytes_.fetch_add(*got, std::memory_order_relaxed);
      return true;
    }
    // A source that closes with unread bytes makes its kernel reset the connection. Behind the stream a reset is an
    // end.
    if (!got && !is_loss(got.error())) return std::unexpected(got.error());
    if (const auto whole = parser_.finish(); !whole) return std::unexpected(got ? whole.error() : got.error());
    ended_ = true;
    return false;
  }

  /// Waits for the next element. None: the connection has ended where the stream may end.
  ///
  /// Params `timeout`: for each wait for bytes, not for the whole element; no_timeout: for ever.
  /// Errors: those of arrived() and read().
  [[nodiscard]] Result<std::optional<Element>> next(std::chrono::milliseconds timeout = no_timeout,
                                                    const Interrupt* interrupt = nullptr) noexcept {
    for (;;) {
      auto element = arrived();
      if (!element || *element) return element;
      const auto more = read(timeout, interrupt);
      if (!more) return std::unexpected(more.error());
      if (!*more) return std::nullopt;
    }
  }

  /// Whether the source has closed the connection, where the stream may end: MainStreamParser::tail() says how sure
  /// that is.
  bool ended() const noexcept { return ended_; }

  /// Bytes that have been read. Threads: any.
  std::uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

  const MainStreamParser& parser() const noexcept { return parser_; }

 private:
  static bool is_loss(const Error& error) noexcept {
    return error.code == Condition::peer_gone || error.code == std::error_code(ETIMEDOUT, std::system_category());
  }

  T* link_;
  MainStreamParser parser_;
  bool ended_ = false;
  std::atomic<std::uint64_t> bytes_ = 0;
};

}  // namespace multifd::qemu
