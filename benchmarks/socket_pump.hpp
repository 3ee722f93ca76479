// SPDX-License-Identifier: MIT
//
// A raw socket pump: memory over connected sockets with multifd's write sizes and nothing else. No zero check, no
// offsets, no barriers, no queue, no checks of a peer: the limit of the sockets, to compare a whole migration with.
//
//   connection c:  { header, packet } { header, packet } ... end header       a header is a position and padding
//
// One thread per connection; the thread that is ready takes the next packet. One sendmsg() per packet, and one
// recvmsg(), which takes the next packet's header along with this one's bytes. The connections can be used again after
// a run.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

namespace pump {

/// multifd's sizes with pages of 4 KiB: wire::header_bytes(4096) and multifd::batch_bytes.
inline constexpr std::size_t default_header_bytes = 1344;
inline constexpr std::size_t default_packet_bytes = 512 * 1024;

namespace detail {

inline constexpr std::uint64_t end_mark = ~std::uint64_t{0};

/// Moves all of `parts`, which it uses up; `call` is sendmsg() or recvmsg().
template <class Call>
void move_all(std::span<iovec> parts, const char* what, Call call) {
  while (!parts.empty()) {
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    const ssize_t count = call(&message);
    if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;  // FdTransport's sockets have time limits
    if (count < 0) throw std::system_error(errno, std::generic_category(), what);
    if (count == 0) throw std::runtime_error("pump: the other side has closed");
    auto left = static_cast<std::size_t>(count);
    while (!parts.empty() && left >= parts.front().iov_len) {
      left -= parts.front().iov_len;
      parts = parts.subspan(1);
    }
    if (left > 0) {
      parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + left;
      parts.front().iov_len -= left;
    }
  }
}

inline void send_all(int fd, std::span<iovec> parts) {
  move_all(parts, "sendmsg", [fd](const msghdr* message) { return ::sendmsg(fd, message, MSG_NOSIGNAL); });
}
inline void receive_all(int fd, std::span<iovec> parts) {
  move_all(parts, "recvmsg", [fd](msghdr* message) { return ::recvmsg(fd, message, MSG_WAITALL); });
}

/// Runs `body(fd)` on a thread per connection. The first exception ends all of them and is thrown again.
template <class Body>
void for_each_connection(std::span<const int> fds, Body body) {
  std::exception_ptr first;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (const int fd : fds) {
    threads.emplace_back([&, fd] {
      try {
        body(fd);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (first) return;
        first = std::current_exception();
        for (const int each : fds) ::shutdown(each, SHUT_RDWR);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

inline void check(std::span<const int> fds, std::size_t memory_bytes, std::size_t header_bytes,
                  std::size_t packet_bytes) {
  if (fds.empty() || header_bytes < sizeof(std::uint64_t) || packet_bytes == 0 || memory_bytes % packet_bytes != 0)
    throw std::invalid_argument("pump: no connection, a header below 8 bytes, or memory that is no number of packets");
}

}  // namespace detail

/// Sends `memory` in packets over blocking stream sockets; returns when the kernel has taken everything.
/// Throws std::system_error, std::runtime_error; the connections are unusable then.
inline void pump_send(std::span<const int> fds, std::span<const std::byte> memory,
                      std::size_t header_bytes = default_header_bytes,
                      std::size_t packet_bytes = default_packet_bytes) {
  detail::check(fds, memory.size(), header_bytes, packet_bytes);
  std::atomic<std::uint64_t> next{0};
  detail::for_each_connection(fds, [&](int fd) {
    std::vector<std::byte> header(header_bytes);
    for (;;) {
      const std::uint64_t at = next.fetch_add(packet_bytes, std::memory_order_relaxed);  // shares out, orders nothing
      const bool end = at >= memory.size();
      std::memcpy(header.data(), end ? &detail::end_mark : &at, sizeof at);
      std::array<iovec, 2> parts{{{header.data(), header.size()}, {}}};
      if (!end) parts[1] = {const_cast<std::byte*>(memory.data() + at), packet_bytes};
      detail::send_all(fd, std::span(parts).first(end ? 1 : 2));
      if (end) return;
    }
  });
}

/// Receives what pump_send() sends, with as many connections and the same sizes; returns when all of it is in `memory`.
inline void pump_receive(std::span<const int> fds, std::span<std::byte> memory,
                         std::size_t header_bytes = default_header_bytes,
                         std::size_t packet_bytes = default_packet_bytes) {
  detail::check(fds, memory.size(), header_bytes, packet_bytes);
  std::atomic<std::uint64_t> received{0};
  detail::for_each_connection(fds, [&](int fd) {
    std::vector<std::byte> header(header_bytes);
    std::array<iovec, 2> parts{{{header.data(), header.size()}, {}}};
    detail::receive_all(fd, std::span(parts).first(1));
    for (;;) {
      std::uint64_t at = 0;
      std::memcpy(&at, header.data(), sizeof at);
      if (at == detail::end_mark) return;
      if (at % packet_bytes != 0 || at >= memory.size()) throw std::runtime_error("pump: a position outside memory");
      parts = {{{memory.data() + at, packet_bytes}, {header.data(), header.size()}}};
      detail::receive_all(fd, parts);
      received.fetch_add(packet_bytes, std::memory_order_relaxed);  // read after the threads were joined
    }
  });
  if (received.load(std::memory_order_relaxed) != memory.size())
    throw std::runtime_error("pump: the other side sent another size");
}

}  // namespace pump
