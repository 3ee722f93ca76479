// SPDX-License-Identifier: MIT
//
// The Transport policy: one connected byte stream for one channel. A transport offers primitives only; every loop
// over short reads and writes stands once, in algorithms.hpp.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"

namespace multifd {

class Interrupt;

template <class T>
concept HasWriteSome = requires(T& transport, ConstBuffers buffers) {
  { transport.write_some(buffers) } noexcept -> std::same_as<Result<std::size_t>>;
};

template <class T>
concept HasReadSome = requires(T& transport, MutableBuffers buffers) {
  { transport.read_some(buffers) } noexcept -> std::same_as<Result<std::size_t>>;
};

template <class T>
concept HasFinish = requires(T& transport) {
  { transport.finish() } noexcept -> std::same_as<Result<void>>;
};

template <class T>
concept HasShutdown = requires(T& transport) {
  { transport.shutdown() } noexcept -> std::same_as<void>;
};

/// Optional: a transport that can wait for many bytes in one call, so that the reader is not woken for each part of
/// them. `read_full(buffers)` is read_some() that returns fewer bytes than `buffers` hold only at an end, an error,
/// a signal, or after a while, so that the bytes of a slow peer are seen to move.
template <class T>
concept HasReadFull = requires(T& transport, MutableBuffers buffers) {
  { transport.read_full(buffers) } noexcept -> std::same_as<Result<std::size_t>>;
};

/// Optional: a transport whose other end can answer, for Sender::finish() and for the receiver's reason when it gives
/// up.
///   `is_two_way()` says whether this connection can (a pipe cannot).
///   `write_now(buffers)`, `read_now(buffers)` are write_some() and read_some() that never wait: 0 also means
///     that there is no room, or that nothing has arrived. Threads: as write_some() and read_some().
template <class T>
concept HasAnswers = requires(const T& link, T& transport, ConstBuffers from, MutableBuffers to) {
  { link.is_two_way() } noexcept -> std::same_as<bool>;
  { transport.write_now(from) } noexcept -> std::same_as<Result<std::size_t>>;
  { transport.read_now(to) } noexcept -> std::same_as<Result<std::size_t>>;
};

/// Optional: a transport whose waits can have a time limit, and end by an Interrupt (may be null):
/// `write_some(buffers, timeout, interrupt)` and `read_some(buffers, timeout, interrupt)`, which fail with timed_out or
/// cancelled then. A timeout of 0 does not wait, no_timeout (time_limit.hpp) waits for ever. A read that was ended can be
/// tried again.
template <class T>
concept HasTimeLimits = requires(T& transport, ConstBuffers from, MutableBuffers to, std::chrono::milliseconds timeout,
                                 const Interrupt* interrupt) {
  { transport.write_some(from, timeout, interrupt) } noexcept -> std::same_as<Result<std::size_t>>;
  { transport.read_some(to, timeout, interrupt) } noexcept -> std::same_as<Result<std::size_t>>;
};

/// Optional: a transport that can send bytes without copying them. `write_pinned(buffers)` is write_some() of bytes that
/// are read until the peer has read them: if they change meanwhile, it may get either, or a mixture. Who calls it sends
/// them again then. Without this, bytes are the caller's again when a call returns. `pins()`: whether it does so now; if
/// not, write_some() is as good, and takes more in a call.
template <class T>
concept HasPinnedWrites = requires(T& transport, ConstBuffers buffers) {
  { transport.write_pinned(buffers) } noexcept -> std::same_as<Result<std::size_t>>;
  { transport.pins() } noexcept -> std::same_as<bool>;
};
template <class T>
bool pins(const T& transport) noexcept {
  if constexpr (HasPinnedWrites<T>)
    return transport.pins();
  else
    return false;
}

/// One connected, reliable, ordered byte stream.
///
/// Semantics:
///   `write_some(buffers)` writes at least one byte of at least one non-empty buffer and returns how many; blocks.
///   `read_some(buffers)` reads at least one byte and returns how many; 0 means orderly end of stream; blocks.
///     Neither is called with more than `max_iovecs` entries.
///   `finish()` ends the writing direction in order (TCP: FIN, TLS: close_notify): the peer reads all, then 0.
///   `shutdown()` ends both directions at once. Calls that block in the stream return, now and from now on, with an
///     error or, for reads, 0. Where the transport can, the peer sees a broken stream (TCP: RST), never an orderly
///     end: format/hardening.md section 16, row 26.
/// Errors: an errno, or an Errc; stage `read`, `write` or `close`. A transport does not fill in
///   channel and packet.
/// Threads: one thread writes, one reads; `shutdown()` comes from any thread while they do, any number of times.
/// Lifetime: the destructor closes; without finish() before, that counts as shutdown().
/// Cost: called once or twice for each packet. What a call allocates is allocated for each packet.
/// Models: FdTransport, SpliceTransport, TlsTransport, AnyTransport, Capped, testing::MemoryTransport. Exemplar:
///   examples/custom_policy.cpp (Counting). Contract: multifd/testing/transport_contract.hpp.
template <class T>
concept Transport = std::movable<T> && HasWriteSome<T> && HasReadSome<T> && HasFinish<T> && HasShutdown<T>;

/// Fails to compile with a message that says which member to write. Use it as
/// `static_assert(multifd::check_transport<MyTransport>());`.
template <class T>
consteval bool check_transport() {
  static_assert(std::movable<T>, "Transport: needs a move constructor and move assignment");
  static_assert(HasWriteSome<T>, "Transport: needs  Result<std::size_t> write_some(ConstBuffers) noexcept");
  static_assert(HasReadSome<T>, "Transport: needs  Result<std::size_t> read_some(MutableBuffers) noexcept");
  static_assert(HasFinish<T>, "Transport: needs  Result<void> finish() noexcept");
  static_assert(HasShutdown<T>, "Transport: needs  void shutdown() noexcept");
  return Transport<T>;
}

}  // namespace multifd
