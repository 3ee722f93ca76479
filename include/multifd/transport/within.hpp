// SPDX-License-Identifier: MIT
//
// One write or read whose wait has a time limit and ends by an Interrupt, over any transport that allows it: by calls
// of its own, as TlsTransport has them, or by poll() on its descriptor.
#pragma once

#include <poll.h>

#include <chrono>
#include <concepts>
#include <cstddef>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// Optional: a transport over one descriptor.
template <class T>
concept HasDescriptor = requires(const T& transport) {
  { transport.native_handle() } noexcept -> std::same_as<int>;
};

namespace detail {

template <class T>
concept HasOwnWriteWithin =
    requires(T& transport, ConstBuffers from, std::chrono::milliseconds timeout, const Interrupt* interrupt) {
      { transport.write_some(from, timeout, interrupt) } noexcept -> std::same_as<Result<std::size_t>>;
    };

template <class T>
concept HasOwnReadWithin =
    requires(T& transport, MutableBuffers to, std::chrono::milliseconds timeout, const Interrupt* interrupt) {
      { transport.read_some(to, timeout, interrupt) } noexcept -> std::same_as<Result<std::size_t>>;
    };

}  // namespace detail

/// A transport for write_within(): its own `write_some(buffers, timeout, interrupt)`, or a descriptor to poll and a
/// write that does not wait.
template <class T>
concept CanWriteWithin = detail::HasOwnWriteWithin<T> || (HasDescriptor<T> && HasAnswers<T>);

/// A transport for read_within(): its own `read_some(buffers, timeout, interrupt)`, or a descriptor to poll.
template <class T>
concept CanReadWithin = detail::HasOwnReadWithin<T> || HasDescriptor<T>;

/// write_some() that waits for room no longer than `timeout` (no_timeout: for ever) and until `interrupt` (may be null)
/// is triggered. A write over TLS that ended so cannot be tried again, because how much of it was sent is unknown.
///
/// Errors: timed_out, cancelled, beside those of write_some(). On a plain descriptor: sockets only.
/// Threads: the writing thread.
template <CanWriteWithin T>
[[nodiscard]] Result<std::size_t> write_within(T& transport, ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept {
  if constexpr (detail::HasOwnWriteWithin<T>) {
    return transport.write_some(buffers, timeout, interrupt);
  } else {
    // Room for one byte makes a socket writable: write_some() would wait until there is room for the rest.
    for (const auto deadline = detail::deadline_after(timeout);;) {
      auto room = detail::wait_for(transport.native_handle(), POLLOUT, deadline, interrupt, Stage::write, "write");
      if (!room) return std::unexpected(room.error());
      auto written = transport.write_now(buffers);
      if (!written || *written > 0) return written;
    }
  }
}

/// read_some() that waits for bytes no longer than `timeout` (no_timeout: for ever) and until `interrupt` (may be null)
/// is triggered. A read that ended so can be tried again.
///
/// Errors: timed_out, cancelled, beside those of read_some().
/// Threads: the reading thread.
template <CanReadWithin T>
[[nodiscard]] Result<std::size_t> read_within(T& transport, MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept {
  if constexpr (detail::HasOwnReadWithin<T>) {
    return transport.read_some(buffers, timeout, interrupt);
  } else {
    const auto deadline = detail::deadline_after(timeout);
    auto ready = detail::wait_for(transport.native_handle(), POLLIN, deadline, interrupt, Stage::read, "read");
    if (!ready) return std::unexpected(ready.error());
    return transport.read_some(buffers);
  }
}

}  // namespace multifd
