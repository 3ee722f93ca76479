// SPDX-License-Identifier: MIT
//
// Reads a return path from a connection, for a source: messages as they come, with a time limit for each wait and an
// Interrupt. ReturnPathParser (return_path.hpp) needs no connection.
#pragma once

#include <chrono>
#include <optional>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/qemu/return_path.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::qemu {

/// The messages of the return path on one connection.
///
/// Params `T`: FdTransport, TlsTransport, AnyTransport, or another with time limits.
/// Threads: one, the transport's reading thread; another one may write to the same connection meanwhile.
/// Cost: one system call per read; nothing is allocated.
template <Transport T>
  requires HasTimeLimits<T>
class ReturnPathReader {
 public:
  /// Params `link`: the main connection; must outlive this object, and must not be read elsewhere meanwhile.
  explicit ReturnPathReader(T& link) : link_(&link) {}

  /// As ReturnPathParser::take_extension().
  void take_extension() noexcept { parser_.take_extension(); }

  /// Waits for the next message. None: the destination has ended the connection in order.
  ///
  /// Params `timeout`: for each wait for bytes; no_timeout: for ever. `interrupt`: may be null.
  /// Errors: those of ReturnPathParser::next(), sticky; timed_out, cancelled: may be called again; the transport's.
  ///   Errc::truncated_stream: an end inside a message.
  [[nodiscard]] Result<std::optional<ReturnMessage>> next(std::chrono::milliseconds timeout = no_timeout,
                                                          const Interrupt* interrupt = nullptr) noexcept {
    for (;;) {
      auto message = parser_.next();
      if (!message || *message) return message;
      const iovec room = mutable_buffer(parser_.room());
      const auto got = link_->read_some(std::span(&room, 1), timeout, interrupt);
      if (!got) return std::unexpected(got.error());
      if (*got == 0 && parser_.inside()) return fail(Errc::truncated_stream, Stage::read, "return path");
      if (*got == 0) return std::nullopt;
      parser_.commit(*got);
    }
  }

  /// As ReturnPathParser::bytes_behind().
  std::size_t bytes_behind() const noexcept { return parser_.bytes_behind(); }

  /// Whether SHUT was taken, after which nothing comes.
  bool shut() const noexcept { return parser_.shut(); }

 private:
  T* link_;
  ReturnPathParser parser_;
};

}  // namespace multifd::qemu
