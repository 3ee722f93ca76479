// SPDX-License-Identifier: MIT
//
// The only loops over short reads and writes. They work on the caller's own scratch array of iovecs and change its
// entries, which mean nothing after a call. Errors of the transport are returned as they are.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// Removes `bytes` bytes from the front, and every empty buffer that then comes first.
/// Returns what is left, with its first entry shortened in place.
inline std::span<iovec> drop_front(std::span<iovec> buffers, std::size_t bytes) noexcept {
  std::size_t index = 0;
  while (index < buffers.size() && bytes >= buffers[index].iov_len) bytes -= buffers[index++].iov_len;
  if (bytes > 0) {
    MULTIFD_ASSERT(index < buffers.size());  // else the transport reported more bytes than it was given
    iovec& first = buffers[index];
    first.iov_base = static_cast<std::byte*>(first.iov_base) + bytes;
    first.iov_len -= bytes;
  }
  return buffers.subspan(index);
}

namespace detail {

/// As many buffers as one call of a transport may get.
inline std::span<const iovec> one_call(std::span<iovec> buffers) noexcept {
  return buffers.first(std::min(buffers.size(), max_iovecs));
}

/// The buffers at the front that `bytes` bytes fill to the last byte.
inline std::span<iovec> filled_by(std::span<iovec> buffers, std::size_t bytes) noexcept {
  std::size_t count = 0;
  while (count < buffers.size() && buffers[count].iov_len <= bytes) bytes -= buffers[count++].iov_len;
  return buffers.first(count);
}

/// Makes one call that reads at most what `buffers` hold; `wanted` bytes are still needed, or likely to come soon.
template <Transport T>
[[nodiscard]] Result<std::size_t> read_towards(T& transport, std::span<iovec> buffers, std::size_t wanted) noexcept {
  // Waits for these bytes only: nothing says that more bytes will come.
  if constexpr (HasReadFull<T>) {
    constexpr std::size_t worth_waiting = 16 * 1024;
    if (wanted >= worth_waiting) {
      if (const std::span<iovec> all = filled_by(buffers, wanted); !all.empty())
        return transport.read_full(one_call(all));
    }
  }
  return transport.read_some(one_call(buffers));
}

/// Stands for `moved` where nobody counts.
struct NotCounted {
  void operator()(std::size_t) const noexcept {}
};

/// Calls `write(buffers)` until all of them are written.
template <class Write, std::invocable<std::size_t> Moved>
[[nodiscard]] Result<void> write_all_by(Write write, std::span<iovec> buffers, Moved& moved) noexcept {
  buffers = drop_front(buffers, 0);
  while (!buffers.empty()) {
    const Result<std::size_t> written = write(one_call(buffers));
    if (!written) return std::unexpected(written.error());
    if (*written == 0) return fail_errno(Stage::write, "write_some wrote nothing", EIO);  // the loop would never end
    moved(*written);
    buffers = drop_front(buffers, *written);
  }
  return {};
}

}  // namespace detail

/// Writes every byte of every buffer, in order.
/// Params `buffers`: any number, none and empty ones included; their entries are changed. `moved(bytes)`: called after
///   each call of the transport, for whoever watches that bytes move.
/// Errors: the transport's. Some of the bytes may have been written by then.
/// Cost: one call of write_some() for each max_iovecs buffers, and one for each short write.
template <Transport T, std::invocable<std::size_t> Moved = detail::NotCounted>
[[nodiscard]] Result<void> write_all(T& transport, std::span<iovec> buffers, Moved&& moved = {}) noexcept {
  return detail::write_all_by([&](ConstBuffers some) noexcept { return transport.write_some(some); }, buffers, moved);
}

/// The same by write_pinned(): the bytes are read until the peer has read them. Errors: the transport's.
template <Transport T, std::invocable<std::size_t> Moved = detail::NotCounted>
  requires HasPinnedWrites<T>
[[nodiscard]] Result<void> write_all_pinned(T& transport, std::span<iovec> buffers, Moved&& moved = {}) noexcept {
  return detail::write_all_by([&](ConstBuffers some) noexcept { return transport.write_pinned(some); }, buffers, moved);
}

/// Reads until at least `min_bytes` have arrived. A call may return more, so that the next packet's header can come
/// with this packet's pages; no further call is made for it.
/// Params `buffers`: at least `min_bytes` in all; their entries are changed. `min_bytes` 0 reads nothing. `soon_bytes`: so
///   many behind them are nearly sure to follow at once. A transport with read_full() waits for them in the same call, and
///   for no longer than that call may take. `moved`: as write_all().
/// Returns how many bytes arrived, in order from the first buffer's first byte. Fewer than `min_bytes` means that the
///   stream ended in order: 0 is an end between two units, anything else a truncated one.
/// Errors: the transport's.
template <Transport T, std::invocable<std::size_t> Moved = detail::NotCounted>
[[nodiscard]] Result<std::size_t> read_at_least(T& transport, std::span<iovec> buffers, std::size_t min_bytes,
                                                Moved&& moved = {}, std::size_t soon_bytes = 0) noexcept {
  std::size_t arrived = 0;
  buffers = drop_front(buffers, 0);
  while (arrived < min_bytes) {
    MULTIFD_ASSERT(!buffers.empty());  // the caller promised room for min_bytes
    const Result<std::size_t> count = detail::read_towards(transport, buffers, min_bytes - arrived + soon_bytes);
    if (!count) return std::unexpected(count.error());
    if (*count == 0) break;
    moved(*count);
    arrived += *count;
    buffers = drop_front(buffers, *count);
  }
  return arrived;
}

/// Fills every buffer, or fails.
/// Params `truncated`: the code to report when the stream ends after some of the bytes.
/// Errors: `peer_closed` if the stream ended in order before the first byte; `truncated` (detail: bytes that did
///   arrive) if it ended later; otherwise the transport's.
template <Transport T>
[[nodiscard]] Result<void> read_exact(T& transport, std::span<iovec> buffers,
                                      Errc truncated = Errc::truncated_payload) noexcept {
  const std::size_t wanted = total_bytes(buffers);
  const Result<std::size_t> arrived = read_at_least(transport, buffers, wanted);
  if (!arrived) return std::unexpected(arrived.error());
  if (*arrived == wanted) return {};
  if (*arrived == 0) return fail(Errc::peer_closed, Stage::read, "read");
  return fail(truncated, Stage::read, "read", *arrived);
}

/// The same for contiguous bytes. Errors: the same.
template <Transport T, std::invocable<std::size_t> Moved = detail::NotCounted>
[[nodiscard]] Result<void> write_all(T& transport, std::span<const std::byte> bytes, Moved&& moved = {}) noexcept {
  iovec buffer = const_buffer(bytes);
  return write_all(transport, std::span(&buffer, 1), moved);
}

/// Writes contiguous bytes with limits. Params `timeout`: for each wait for room; `interrupt`: may be null; `moved`: as
///   above.
/// Errors: the transport's, timed_out and cancelled among them, after some of the bytes.
template <Transport T, std::invocable<std::size_t> Moved = detail::NotCounted>
  requires HasTimeLimits<T>
[[nodiscard]] Result<void> write_all(T& transport, std::span<const std::byte> bytes, std::chrono::milliseconds timeout,
                                     const Interrupt* interrupt, Moved&& moved = {}) noexcept {
  while (!bytes.empty()) {
    const iovec buffer = const_buffer(bytes);
    const Result<std::size_t> written = transport.write_some(std::span(&buffer, 1), timeout, interrupt);
    if (!written) return std::unexpected(written.error());
    if (*written == 0) return fail_errno(Stage::write, "write_some wrote nothing", EIO);
    moved(*written);
    bytes = bytes.subspan(*written);
  }
  return {};
}

/// The same for contiguous bytes. Errors: the same.
template <Transport T>
[[nodiscard]] Result<void> read_exact(T& transport, std::span<std::byte> bytes,
                                      Errc truncated = Errc::truncated_payload) noexcept {
  iovec buffer = mutable_buffer(bytes);
  return read_exact(transport, std::span(&buffer, 1), truncated);
}

}  // namespace multifd
