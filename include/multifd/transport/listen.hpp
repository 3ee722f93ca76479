// SPDX-License-Identifier: MIT
//
// The listening side: Listener, and peek_magic(), which tells a channel from a main connection without taking a byte
// from the connection. Every wait ends by a time limit or an Interrupt.
#pragma once

#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/address.hpp"
#include "multifd/transport/connect.hpp"
#include "multifd/transport/detail/accept_queue.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket_options.hpp"

namespace multifd {

namespace detail {

/// The path of a UNIX socket that this process bound. The destructor removes the file, unless another file has taken
/// that path meanwhile: that one may be another program's.
class BoundPath {
 public:
  BoundPath() = default;
  explicit BoundPath(std::string path) : path_(std::move(path)) {
    struct stat status{};
    if (::lstat(path_.c_str(), &status) != 0) path_.clear();
    device_ = status.st_dev;
    inode_ = status.st_ino;
  }
  BoundPath(BoundPath&& other) noexcept
      : path_(std::exchange(other.path_, {})), device_(other.device_), inode_(other.inode_) {}
  BoundPath& operator=(BoundPath&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(device_, other.device_);
    std::swap(inode_, other.inode_);
    return *this;
  }
  ~BoundPath() {
    struct stat status{};
    if (path_.empty() || ::lstat(path_.c_str(), &status) != 0) return;
    if (status.st_dev == device_ && status.st_ino == inode_) ::unlink(path_.c_str());
  }

 private:
  std::string path_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

/// Whether a path is a socket on which no process listens any more, as a killed program leaves it.
inline bool is_stale_socket(const sockaddr_un& address) noexcept {
  struct stat status{};
  if (::lstat(address.sun_path, &status) != 0 || !S_ISSOCK(status.st_mode)) return false;
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  return ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 &&
         errno == ECONNREFUSED;
}

/// The first bytes of a connection, which stay in the socket to be read.
struct FirstBytes {
  ssize_t count;            ///< 0 to 4; 0: the stream has ended; negative: errno has the reason
  std::uint32_t magic = 0;  ///< big-endian; valid when count is 4
};

inline FirstBytes look_at_first_bytes(int fd) noexcept {
  unsigned char bytes[4];
  const ssize_t count = ::recv(fd, bytes, sizeof bytes, MSG_PEEK | MSG_DONTWAIT);
  if (count < 4) return {.count = count};
  return {count,
          std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3]};
}

}  // namespace detail

/// Accepts connections at one address. Threads: any, unless a method says otherwise.
class Listener {
 public:
  /// Binds and listens. An empty host listens on IPv6 and IPv4 both, where the machine has IPv6.
  /// Params `backlog`: connections that may wait to be accepted: at least the channels and the main connection; the default is enough for
  ///   any source. The kernel silently lowers it to net.core.somaxconn; a connection that finds no room then comes later.
  ///   `options`: for the accepted connections; `interrupt` is the default of accept().
  /// Errors (stage `accept`): errno, for instance EADDRINUSE, also for a UNIX path that is in use or is no socket;
  ///   `bad_address`, `bad_option`, op "resolve" as connect_to(). A socket file on which no process listens is
  ///   replaced.
  /// Threads: any thread. Cost: resolves the host, if it is a name.
  [[nodiscard]] static Result<Listener> listen(const Address& address, unsigned backlog = max_channels + 1,
                                               const SocketOptions& options = {}) {
    auto listener = catch_bad_alloc(Stage::accept, "listen", [&] { return listen_unnamed(address, backlog, options); });
    if (!listener) listener.error().subject = subject_of(address);
    return listener;
  }

  /// Where this object listens, with the port that the system chose if the port was 0.
  const Address& local_address() const noexcept { return address_; }

  /// Waits for one connection. Params: `timeout`: 0 does not wait, no_timeout waits for ever.
  /// Errors (stage `accept`): `timed_out`; `cancelled` once `interrupt` is triggered (null: that of the options);
  ///   errno, for instance EMFILE.
  /// Threads: any thread.
  [[nodiscard]] Result<FdTransport> accept(std::chrono::milliseconds timeout,
                                           const Interrupt* interrupt = nullptr) noexcept {
    return accept_until(deadline_after(timeout), interrupt);
  }

  /// Waits for `channels` connections, in the order in which they come. Which channel a connection is, its hello says.
  /// Params `channels`: 1 to max_channels. `timeout`: for all of them together; 0: no limit.
  /// Errors: `bad_channel_count`; `bad_option` for a negative timeout; ENOMEM; those of accept(), detail: how many had
  ///   come, expected: `channels`. Those that had come are closed.
  [[nodiscard]] Result<std::vector<FdTransport>> accept_channels(unsigned channels, std::chrono::milliseconds timeout,
                                                                 const Interrupt* interrupt = nullptr) {
    if (channels < 1 || channels > max_channels) {
      return fail(Errc::bad_channel_count, Stage::accept, "accept", channels);
    }
    if (auto checked = check_time_limit("accept_channels: timeout", timeout, Stage::accept); !checked) {
      return std::unexpected(checked.error());
    }
    const detail::Clock::time_point deadline = deadline_after(as_timeout(timeout));
    auto links = detail::room_for_links(channels, Stage::accept, "accept");
    if (!links) return links;
    while (links->size() < channels) {
      Result<FdTransport> link = accept_until(deadline, interrupt);
      if (!link) {
        link.error().detail = links->size();
        link.error().expected = channels;
        if (link.error().code == Errc::timed_out)
          link.error().op = "fewer channels came than expected: do both sides use the same number?";
        return std::unexpected(link.error());
      }
      links->push_back(std::move(*link));
    }
    return links;
  }

  /// Reads ahead, without waiting, in the first bytes of all connections that have not been accepted yet. Returns
  /// whether `is_it(bytes)` holds for one of them. All stay, in their order, for whoever accepts next: accept(),
  /// accept_channels(), an acceptor; except strangers, and those that have ended without a byte.
  /// Params `is_it`, `is_stranger`: get up to 64 bytes, as many as have come; a stranger's connection is closed. They may
  ///   call this object.
  /// Errors: those of accept(), without `timed_out`; ENOMEM. Threads: any thread.
  template <class IsIt, class IsStranger>
  [[nodiscard]] Result<bool> any_waiting(IsIt&& is_it, IsStranger&& is_stranger) {
    if (!queue_) return fail(Errc::already_closed, Stage::accept, "a Listener that was moved from");
    if (interrupt_ != nullptr && interrupt_->triggered()) return fail(Errc::cancelled, Stage::accept, "accept");
    if (auto fetched = queue_->fetch(); !fetched) return std::unexpected(fetched.error());
    for (std::uint64_t next = 0;;) {
      const auto seen = queue_->look(next);
      if (!seen) return false;
      next = seen->number + 1;
      if (seen->count > 0 && is_it(seen->bytes())) return true;
      if (seen->ended || (seen->count > 0 && is_stranger(seen->bytes()))) queue_->close(seen->number);
    }
  }
  template <class IsIt>
  [[nodiscard]] Result<bool> any_waiting(IsIt&& is_it) {
    return any_waiting(is_it, [](std::span<const std::byte>) { return false; });
  }

  /// The listening descriptor, still owned by this object; non-blocking. To wait for connections poll poll_handle().
  int native_handle() const noexcept { return queue_ ? queue_->native_handle() : -1; }

  /// A descriptor, owned by this object, that is readable when accept() would not wait. native_handle() is not readable
  /// for connections that any_waiting() has looked at.
  int poll_handle() const noexcept { return queue_ ? queue_->poll_handle() : -1; }

  /// Gives back a connection that accept() has returned: the next to accept gets it again. A Listener that was moved from
  /// closes it. Threads: any thread.
  void put_back(FdTransport link) noexcept {
    if (queue_) queue_->put_back(std::move(link));
  }

  /// SocketOptions::interrupt of this listener; may be null.
  const Interrupt* interrupt() const noexcept { return interrupt_; }

 private:
  Listener(std::unique_ptr<detail::AcceptQueue> queue, Address address, detail::BoundPath path,
           const Interrupt* interrupt)
      : queue_(std::move(queue)), address_(std::move(address)), path_(std::move(path)), interrupt_(interrupt) {}

  [[nodiscard]] static Result<Listener> made_of(detail::UniqueFd fd, Address address, detail::BoundPath path,
                                                const SocketOptions& options) {
    auto queue = detail::AcceptQueue::create(std::move(fd));
    if (!queue) return std::unexpected(queue.error());
    return Listener(std::move(*queue), std::move(address), std::move(path), options.interrupt);
  }

  [[nodiscard]] Result<FdTransport> accept_until(detail::Clock::time_point deadline,
                                                 const Interrupt* interrupt) noexcept {
    if (!queue_) return fail(Errc::already_closed, Stage::accept, "a Listener that was moved from");
    if (!interrupt) interrupt = interrupt_;
    for (;;) {
      const auto waited = detail::wait_for(poll_handle(), POLLIN, deadline, interrupt, Stage::accept, "accept");
      if (!waited) return std::unexpected(waited.error());
      auto link = queue_->take();
      if (!link) return std::unexpected(link.error());
      if (*link) return std::move(**link);  // none: another thread was quicker, or the connection has gone again
    }
  }

  [[nodiscard]] static Result<Listener> listen_unnamed(const Address& address, unsigned backlog,
                                                       const SocketOptions& options) {
    const int queue = static_cast<int>(std::clamp(backlog, 1U, 65535U));
    if (address.kind == AddressKind::unix_socket) return listen_unix(address, queue, options);
    if (address.host.empty()) {
      Address any = address;
      any.host = "::";
      Result<Listener> both = listen_tcp(any, queue, options);
      // Without IPv6 try IPv4. Any other error (a port in use) would be the same with IPv4.
      if (both || (both.error().code != std::errc::address_family_not_supported &&
                   both.error().code != std::errc::address_not_available)) {
        return both;
      }
      any.host = "0.0.0.0";
      return listen_tcp(any, queue, options);
    }
    return listen_tcp(address, queue, options);
  }

  [[nodiscard]] static Result<Listener> listen_tcp(const Address& address, int backlog, const SocketOptions& options) {
    Result<detail::AddrinfoList> targets = detail::resolve(address, AI_PASSIVE, Stage::accept);
    if (!targets) return std::unexpected(targets.error());
    const addrinfo& target = **targets;
    Result<detail::UniqueFd> fd =
        detail::open_socket(target.ai_family, detail::protocol_of(target, options), Stage::accept);
    if (!fd) return std::unexpected(fd.error());
    // Reuse: old connections of this port that still linger must not prevent the next migration.
    detail::set_option(fd->get(), SOL_SOCKET, SO_REUSEADDR, 1);
    if (target.ai_family == AF_INET6) detail::set_option(fd->get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
    if (Result<void> set = detail::apply_options(fd->get(), *target.ai_addr, options, Stage::accept); !set) {
      return std::unexpected(set.error());
    }
    if (::bind(fd->get(), target.ai_addr, target.ai_addrlen) != 0) return fail_errno(Stage::accept, "bind");
    if (::listen(fd->get(), backlog) != 0) return fail_errno(Stage::accept, "listen");

    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    char host[NI_MAXHOST];
    if (::getsockname(fd->get(), reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
      return fail_errno(Stage::accept, "getsockname");
    }
    // Port and host are read from the socket, because the host may have been a name.
    if (::getnameinfo(reinterpret_cast<const sockaddr*>(&bound), size, host, sizeof host, nullptr, 0, NI_NUMERICHOST) !=
        0) {
      return fail(Errc::bad_address, Stage::accept, "getnameinfo");
    }
    const in_port_t port = bound.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(bound).sin6_port
                                                       : reinterpret_cast<const sockaddr_in&>(bound).sin_port;
    return made_of(std::move(*fd), {.kind = AddressKind::tcp, .host = host, .port = ntohs(port)}, {}, options);
  }

  [[nodiscard]] static Result<Listener> listen_unix(const Address& address, int backlog, const SocketOptions& options) {
    if (!options.device.empty() || options.mptcp)
      return fail(Errc::bad_option, Stage::accept, "device and MPTCP are of TCP, not of a UNIX socket");
    const Result<sockaddr_un> target = detail::unix_sockaddr(address, Stage::accept);
    if (!target) return std::unexpected(target.error());
    Result<detail::UniqueFd> fd = detail::open_socket(AF_UNIX, 0, Stage::accept);
    if (!fd) return std::unexpected(fd.error());
    if (Result<void> set =
            detail::apply_options(fd->get(), reinterpret_cast<const sockaddr&>(*target), options, Stage::accept);
        !set) {
      return std::unexpected(set.error());
    }
    std::string name = address.path;  // no memory may be missing once the file is there
    const auto bind = [&] {
      return ::bind(fd->get(), reinterpret_cast<const sockaddr*>(&*target), sizeof *target) == 0;
    };
    if (!bind()) {
      if (errno != EADDRINUSE) return fail_errno(Stage::accept, "bind");
      if (!detail::is_stale_socket(*target)) return fail_errno(Stage::accept, "bind", EADDRINUSE);
      ::unlink(target->sun_path);
      if (!bind()) return fail_errno(Stage::accept, "bind");
    }
    detail::BoundPath path(std::move(name));
    if (::listen(fd->get(), backlog) != 0) return fail_errno(Stage::accept, "listen");
    return made_of(std::move(*fd), address, std::move(path), options);
  }

  std::unique_ptr<detail::AcceptQueue> queue_;  // on the heap, so that a Listener can move
  Address address_;
  detail::BoundPath path_;
  const Interrupt* interrupt_ = nullptr;
};

/// Returns the first four bytes of a connection, big-endian, which stay in the socket to be read. A program that
/// takes its main connection and its channels at one address tells them apart by these bytes.
/// Errors (stage `accept`): `timed_out`, `cancelled`; `peer_closed` if the stream ends before the first byte,
///   `truncated_hello` (detail: bytes) before the fourth; errno, ENOTSOCK for what is not a socket.
[[nodiscard]] inline Result<std::uint32_t> peek_magic(FdTransport& transport, std::chrono::milliseconds timeout,
                                                      const Interrupt* interrupt = nullptr) noexcept {
  const detail::Clock::time_point deadline = deadline_after(timeout);
  // Bytes that were only peeked keep a descriptor readable, so poll() would spin while the rest is missing.
  // Edge-triggered epoll reports each arrival once.
  const detail::UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  epoll_event arrival{.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data = {.u64 = 0}};
  if (epoll.get() < 0 || ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, transport.native_handle(), &arrival) != 0) {
    return fail_errno(Stage::accept, "peek");
  }
  for (bool ended = false;;) {
    const auto [count, magic] = detail::look_at_first_bytes(transport.native_handle());
    if (count == 4) return magic;
    if (count < 0 && errno != EAGAIN && errno != EINTR) return fail_errno(Stage::accept, "peek");
    if (count == 0) return fail(Errc::peer_closed, Stage::accept, "peek");
    if (ended && count > 0) {
      return fail(Errc::truncated_hello, Stage::accept, "peek", static_cast<std::uint64_t>(count));
    }
    // The epoll descriptor is itself readable while it has an event to report.
    const Result<void> waited = detail::wait_for(epoll.get(), POLLIN, deadline, interrupt, Stage::accept, "peek");
    if (!waited) return std::unexpected(waited.error());
    epoll_event event{};
    if (::epoll_wait(epoll.get(), &event, 1, 0) == 1) ended = (event.events & (EPOLLRDHUP | EPOLLHUP)) != 0;
  }
}

}  // namespace multifd
