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
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/address.hpp"
#include "multifd/transport/connect.hpp"
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

/// Errors of accept() that concern one connection, which is gone already, and not the listener: accept(2).
inline bool only_that_connection(int error) noexcept {
  switch (error) {
    case EINTR:
    case EAGAIN:
    case ECONNABORTED:
    case EPROTO:
    case ENOPROTOOPT:
    case EOPNOTSUPP:
    case ENETDOWN:
    case ENETUNREACH:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENONET: return true;
    default: return false;
  }
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

/// Accepts connections at one address.
class Listener {
 public:
  /// Binds and listens. An empty host listens on IPv6 and IPv4 both, where the machine has IPv6.
  /// Params `backlog`: connections that may wait to be accepted: at least the channels and the main connection. The
  ///   kernel silently lowers it to net.core.somaxconn; a connection that finds no room then comes later.
  ///   `options`: for the accepted connections; `interrupt` is the default of accept().
  /// Errors (stage `accept`): errno, for instance EADDRINUSE, also for a UNIX path that is in use or is no socket;
  ///   `bad_address`, `bad_option`, op "resolve" as connect_to(). A socket file on which no process listens is
  ///   replaced.
  /// Threads: any thread. Cost: resolves the host, if it is a name.
  [[nodiscard]] static Result<Listener> listen(const Address& address, unsigned backlog,
                                               const SocketOptions& options = {}) {
    auto listener = listen_unnamed(address, backlog, options);
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
  /// Errors: `bad_channel_count`; `bad_option` for a negative timeout; those of accept(), detail: how many had come,
  ///   expected: `channels`.
  [[nodiscard]] Result<std::vector<FdTransport>> accept_channels(unsigned channels, std::chrono::milliseconds timeout,
                                                                 const Interrupt* interrupt = nullptr) {
    if (channels < 1 || channels > max_channels) {
      return fail(Errc::bad_channel_count, Stage::accept, "accept", channels);
    }
    if (auto checked = check_time_limit("accept_channels: timeout", timeout, Stage::accept); !checked) {
      return std::unexpected(checked.error());
    }
    const detail::Clock::time_point deadline = deadline_after(as_timeout(timeout));
    std::vector<FdTransport> links;
    links.reserve(channels);
    while (links.size() < channels) {
      Result<FdTransport> link = accept_until(deadline, interrupt);
      if (!link) {
        link.error().detail = links.size();
        link.error().expected = channels;
        if (link.error().code == Errc::timed_out)
          link.error().op = "fewer channels came than expected: do both sides use the same number?";
        return std::unexpected(link.error());
      }
      links.push_back(std::move(*link));
    }
    return links;
  }

  /// Reads ahead, without waiting, in the first bytes of all connections that have not been accepted yet. Returns
  /// whether `is_it(bytes)` holds for one of them. All stay for accept(), except strangers; native_handle() may not be
  /// readable although some of them wait.
  /// Params `is_it`, `is_stranger`: get up to 64 bytes, as many as have come; a stranger's connection is closed.
  /// Errors: those of accept(), without `timed_out`. Threads: any thread.
  template <class IsIt, class IsStranger>
  [[nodiscard]] Result<bool> any_waiting(IsIt&& is_it, IsStranger&& is_stranger) {
    const std::scoped_lock lock(waiting_->mutex);
    auto& links = waiting_->links;
    while (links.size() < max_waiting_connections) {  // others stay in the kernel's queue
      Result<FdTransport> link = accept_from_system(detail::Clock::now(), nullptr);
      if (!link && link.error().code == Errc::timed_out) break;
      if (!link) return std::unexpected(link.error());
      links.push_back(std::move(*link));
    }
    for (auto link = links.begin(); link != links.end();) {
      std::byte first[64];
      const ssize_t count = ::recv(link->native_handle(), first, sizeof first, MSG_PEEK | MSG_DONTWAIT);
      const bool ended = count == 0 || (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
      const std::span<const std::byte> bytes(first, count > 0 ? static_cast<std::size_t>(count) : 0);
      if (!bytes.empty() && is_it(bytes)) return true;
      link = ended || (!bytes.empty() && is_stranger(bytes)) ? links.erase(link) : link + 1;
    }
    return false;
  }
  template <class IsIt>
  [[nodiscard]] Result<bool> any_waiting(IsIt&& is_it) {
    return any_waiting(is_it, [](std::span<const std::byte>) { return false; });
  }

  /// The listening descriptor, still owned by this object; non-blocking, readable when accept() would not
  /// wait.
  int native_handle() const noexcept { return fd_.get(); }

  /// SocketOptions::interrupt of this listener; may be null.
  const Interrupt* interrupt() const noexcept { return interrupt_; }

 private:
  Listener(detail::UniqueFd fd, Address address, detail::BoundPath path, const Interrupt* interrupt)
      : fd_(std::move(fd)), address_(std::move(address)), path_(std::move(path)), interrupt_(interrupt) {}

  [[nodiscard]] Result<FdTransport> accept_until(detail::Clock::time_point deadline,
                                                 const Interrupt* interrupt) noexcept {
    {
      const std::scoped_lock lock(waiting_->mutex);
      if (auto& links = waiting_->links; !links.empty()) {
        FdTransport link = std::move(links.front());
        links.erase(links.begin());
        return link;
      }
    }
    return accept_from_system(deadline, interrupt);
  }

  [[nodiscard]] Result<FdTransport> accept_from_system(detail::Clock::time_point deadline,
                                                       const Interrupt* interrupt) noexcept {
    if (!interrupt) interrupt = interrupt_;
    for (;;) {
      const Result<void> waited = detail::wait_for(fd_.get(), POLLIN, deadline, interrupt, Stage::accept, "accept");
      if (!waited) return std::unexpected(waited.error());
      const int fd = ::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC);
      if (fd >= 0) return FdTransport::adopt(fd);
      if (!detail::only_that_connection(errno)) return fail_errno(Stage::accept, "accept");
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
    Result<detail::UniqueFd> fd = detail::open_socket(target.ai_family, target.ai_protocol, Stage::accept);
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
    return Listener(std::move(*fd), {.kind = AddressKind::tcp, .host = host, .port = ntohs(port)}, {},
                    options.interrupt);
  }

  [[nodiscard]] static Result<Listener> listen_unix(const Address& address, int backlog, const SocketOptions& options) {
    const Result<sockaddr_un> target = detail::unix_sockaddr(address, Stage::accept);
    if (!target) return std::unexpected(target.error());
    Result<detail::UniqueFd> fd = detail::open_socket(AF_UNIX, 0, Stage::accept);
    if (!fd) return std::unexpected(fd.error());
    if (Result<void> set =
            detail::apply_options(fd->get(), reinterpret_cast<const sockaddr&>(*target), options, Stage::accept);
        !set) {
      return std::unexpected(set.error());
    }
    const auto bind = [&] {
      return ::bind(fd->get(), reinterpret_cast<const sockaddr*>(&*target), sizeof *target) == 0;
    };
    if (!bind()) {
      if (errno != EADDRINUSE) return fail_errno(Stage::accept, "bind");
      if (!detail::is_stale_socket(*target)) return fail_errno(Stage::accept, "bind", EADDRINUSE);
      ::unlink(target->sun_path);
      if (!bind()) return fail_errno(Stage::accept, "bind");
    }
    detail::BoundPath path(address.path);
    if (::listen(fd->get(), backlog) != 0) return fail_errno(Stage::accept, "listen");
    return Listener(std::move(*fd), address, std::move(path), options.interrupt);
  }

  /// Connections that any_waiting() has taken from the system, in the order in which they came.
  struct Waiting {
    std::mutex mutex;
    std::vector<FdTransport> links;
  };

  detail::UniqueFd fd_;
  Address address_;
  detail::BoundPath path_;
  const Interrupt* interrupt_ = nullptr;
  std::unique_ptr<Waiting> waiting_ = std::make_unique<Waiting>();  // on the heap, so that a Listener can move
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
