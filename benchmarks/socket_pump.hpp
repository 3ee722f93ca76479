// SPDX-License-Identifier: MIT
//
// A raw socket pump: memory over connected sockets with multifd's write sizes and nothing else. No zero check, no
// offsets, no barriers, no queue, no checks of a peer: the limit of the sockets, to compare a whole migration with.
//
//   connection c:  { header, packet } { header, packet } ... end header       a header is a position and padding
//
// One thread per connection; the thread that is ready takes the next packet. One sendmsg() per packet, and one
// recvmsg(), which takes the next packet's header along with this one's bytes, or any other way through the kernel
// (kernel_ways.hpp has some). The connections can be used again after a run.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

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

/// What one end of a run has taken: CPU time of its threads, system calls that move bytes.
struct Cost {
  double cpu_s = 0;
  std::uint64_t calls = 0;
};

/// Takes `bytes` off the front of `parts`; returns what is left.
inline std::span<iovec> drop(std::span<iovec> parts, std::size_t bytes) {
  while (!parts.empty() && bytes >= parts.front().iov_len) {
    bytes -= parts.front().iov_len;
    parts = parts.subspan(1);
  }
  if (bytes > 0) {
    parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + bytes;
    parts.front().iov_len -= bytes;
  }
  return parts;
}

/// Moves all of `parts`, which it uses up; `call` is sendmsg() or recvmsg(). Counts calls in `calls`.
template <class Call>
void move_all(std::span<iovec> parts, const char* what, std::uint64_t& calls, Call call) {
  while (!parts.empty()) {
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = parts.size();
    const ssize_t count = call(&message);
    ++calls;
    if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;  // FdTransport's sockets have time limits
    if (count < 0) throw std::system_error(errno, std::generic_category(), what);
    if (count == 0) throw std::runtime_error("pump: the other side has closed");
    parts = drop(parts, static_cast<std::size_t>(count));
  }
}

namespace detail {

inline constexpr std::uint64_t end_mark = ~std::uint64_t{0};

/// Runs `body(fd)`, which returns its number of system calls, on a thread per connection. The first exception ends all of
/// them and is thrown again.
template <class Body>
Cost for_each_connection(std::span<const int> fds, Body body) {
  Cost cost;
  std::exception_ptr first;
  std::mutex mutex;
  std::vector<std::thread> threads;
  for (const int fd : fds) {
    threads.emplace_back([&, fd] {
      try {
        const std::uint64_t calls = body(fd);
        timespec cpu{};
        ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
        const std::lock_guard lock(mutex);
        cost.cpu_s += static_cast<double>(cpu.tv_sec) + 1e-9 * static_cast<double>(cpu.tv_nsec);
        cost.calls += calls;
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
  return cost;
}

inline void check(std::span<const int> fds, std::size_t memory_bytes, std::size_t header_bytes,
                  std::size_t packet_bytes) {
  if (fds.empty() || header_bytes < sizeof(std::uint64_t) || packet_bytes == 0 || memory_bytes % packet_bytes != 0)
    throw std::invalid_argument("pump: no connection, a header below 8 bytes, or memory that is no number of packets");
}

}  // namespace detail

/// How a connection's packets get into the kernel: the plain way. Others have the same members.
class Sendmsg {
 public:
  explicit Sendmsg(int fd) : fd_(fd) {}
  /// Sends `parts`, a header and pages, and uses the array up. The header's bytes are the caller's again when it returns;
  /// pages may be read until finish() has returned, or by the other end even after that.
  void send(std::span<iovec> parts) {
    move_all(parts, "sendmsg", calls_, [this](const msghdr* message) { return ::sendmsg(fd_, message, MSG_NOSIGNAL); });
  }
  /// Behind the last send(): waits for what the kernel still has to say.
  void finish() {}
  std::uint64_t calls() const { return calls_; }

 private:
  int fd_;
  std::uint64_t calls_ = 0;
};

/// How they come out of it.
class Recvmsg {
 public:
  explicit Recvmsg(int fd) : fd_(fd) {}
  /// Fills all of `parts`, and uses the array up.
  void receive(std::span<iovec> parts) {
    move_all(parts, "recvmsg", calls_, [this](msghdr* message) { return ::recvmsg(fd_, message, MSG_WAITALL); });
  }
  std::uint64_t calls() const { return calls_; }

 private:
  int fd_;
  std::uint64_t calls_ = 0;
};

/// Makes a way of a connection, in its thread.
template <class Way>
struct Make {
  Way operator()(int fd) const { return Way(fd); }
};

/// Sends `memory` in packets over blocking stream sockets; returns when the kernel has taken everything.
/// Throws std::system_error, std::runtime_error; the connections are unusable then.
template <class MakeWay = Make<Sendmsg>>
Cost pump_send(std::span<const int> fds, std::span<const std::byte> memory, const MakeWay& make_way = {},
               std::size_t header_bytes = default_header_bytes, std::size_t packet_bytes = default_packet_bytes) {
  detail::check(fds, memory.size(), header_bytes, packet_bytes);
  std::atomic<std::uint64_t> next{0};
  return detail::for_each_connection(fds, [&](int fd) {
    auto way = make_way(fd);
    std::vector<std::byte> header(header_bytes);
    for (;;) {
      const std::uint64_t at = next.fetch_add(packet_bytes, std::memory_order_relaxed);  // shares out, orders nothing
      const bool end = at >= memory.size();
      std::memcpy(header.data(), end ? &detail::end_mark : &at, sizeof at);
      std::array<iovec, 2> parts{{{header.data(), header.size()}, {}}};
      if (!end) parts[1] = {const_cast<std::byte*>(memory.data() + at), packet_bytes};
      way.send(std::span(parts).first(end ? 1 : 2));
      if (!end) continue;
      way.finish();
      return way.calls();
    }
  });
}

/// Receives what pump_send() sends, with as many connections and the same sizes; returns when all of it is in `memory`.
template <class MakeWay = Make<Recvmsg>>
Cost pump_receive(std::span<const int> fds, std::span<std::byte> memory, const MakeWay& make_way = {},
                  std::size_t header_bytes = default_header_bytes, std::size_t packet_bytes = default_packet_bytes) {
  detail::check(fds, memory.size(), header_bytes, packet_bytes);
  std::atomic<std::uint64_t> received{0};
  const Cost cost = detail::for_each_connection(fds, [&](int fd) {
    auto way = make_way(fd);
    std::vector<std::byte> header(header_bytes);
    std::array<iovec, 2> parts{{{header.data(), header.size()}, {}}};
    way.receive(std::span(parts).first(1));
    for (;;) {
      std::uint64_t at = 0;
      std::memcpy(&at, header.data(), sizeof at);
      if (at == detail::end_mark) return way.calls();
      if (at % packet_bytes != 0 || at >= memory.size()) throw std::runtime_error("pump: a position outside memory");
      parts = {{{memory.data() + at, packet_bytes}, {header.data(), header.size()}}};
      way.receive(parts);
      received.fetch_add(packet_bytes, std::memory_order_relaxed);  // read after the threads were joined
    }
  });
  if (received.load(std::memory_order_relaxed) != memory.size())
    throw std::runtime_error("pump: the other side sent another size");
  return cost;
}

}  // namespace pump
