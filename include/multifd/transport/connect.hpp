// SPDX-License-Identifier: MIT
//
// The connecting side: one connection, or one for each channel. Every wait ends by a time limit or an Interrupt, except
// the resolution of a name, which cannot be interrupted; numeric addresses need none.
#pragma once

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/address.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket_options.hpp"

namespace multifd {

namespace detail {

[[nodiscard]] inline Result<FdTransport> adopt_blocking(UniqueFd fd, Stage stage) noexcept {
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) < 0) return fail_errno(stage, "fcntl");
  return FdTransport::adopt(fd.release());
}

/// Gives a socket its source address, and leaves the port to connect(), which can use one for several destinations.
[[nodiscard]] inline Result<void> bind_locally(int fd, const addrinfo& local) noexcept {
  set_option(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);  // saves ports; without it bind() takes one
  if (::bind(fd, local.ai_addr, local.ai_addrlen) != 0) return fail_errno(Stage::connect, "bind to the local address");
  return {};
}

/// Params `local`: null: the system chooses.
[[nodiscard]] inline Result<FdTransport> connect_tcp(const addrinfo& target, const addrinfo* local,
                                                     Clock::time_point deadline,
                                                     const SocketOptions& options) noexcept {
  Result<UniqueFd> fd = open_socket(target.ai_family, protocol_of(target, options), Stage::connect);
  if (!fd) return std::unexpected(fd.error());
  if (Result<void> set = apply_options(fd->get(), *target.ai_addr, options, Stage::connect); !set) {
    return std::unexpected(set.error());
  }
  if (local != nullptr) {
    if (auto bound = bind_locally(fd->get(), *local); !bound) return std::unexpected(bound.error());
  }
  if (::connect(fd->get(), target.ai_addr, target.ai_addrlen) != 0) {
    // After EINTR, too, the kernel goes on connecting.
    if (errno != EINPROGRESS && errno != EINTR) return fail_errno(Stage::connect, "connect");
    Result<void> waited = wait_for(fd->get(), POLLOUT, deadline, options.interrupt, Stage::connect, "connect");
    if (!waited) return std::unexpected(waited.error());
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(fd->get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return fail_errno(Stage::connect, "connect", error);
  }
  return adopt_blocking(std::move(*fd), Stage::connect);
}

[[nodiscard]] inline Result<FdTransport> connect_unix(const Address& address, Clock::time_point deadline,
                                                      const SocketOptions& options) noexcept {
  const Result<sockaddr_un> target = unix_sockaddr(address, Stage::connect);
  if (!target) return std::unexpected(target.error());
  Result<UniqueFd> fd = open_socket(AF_UNIX, 0, Stage::connect);
  if (!fd) return std::unexpected(fd.error());
  if (Result<void> set = apply_options(fd->get(), reinterpret_cast<const sockaddr&>(*target), options, Stage::connect);
      !set) {
    return std::unexpected(set.error());
  }
  for (std::chrono::milliseconds pause(1);; pause = std::min(pause * 2, std::chrono::milliseconds(20))) {
    if (::connect(fd->get(), reinterpret_cast<const sockaddr*>(&*target), sizeof *target) == 0) break;
    if (errno == EINTR) continue;
    // EAGAIN: the listener's queue is full. No event tells a non-blocking caller that there is room again, and a
    // blocking connect() cannot be interrupted. So try again, less and less often.
    if (errno != EAGAIN) return fail_errno(Stage::connect, "connect");
    const Clock::time_point again = std::min(deadline, deadline_after(pause));
    Result<void> waited = wait_for(-1, 0, again, options.interrupt, Stage::connect, "connect");
    if (!waited && (again == deadline || waited.error().code != Errc::timed_out)) {
      return std::unexpected(waited.error());
    }
  }
  return adopt_blocking(std::move(*fd), Stage::connect);
}

[[nodiscard]] inline Result<FdTransport> connect_unnamed(const Address& address, Clock::time_point deadline,
                                                         const SocketOptions& options) {
  if (auto checked = check_socket_options(options, Stage::connect); !checked) return std::unexpected(checked.error());
  if (options.interrupt && options.interrupt->triggered()) return fail(Errc::cancelled, Stage::connect, "connect");
  if (address.kind == AddressKind::unix_socket) {
    if (!options.local_address.empty() || !options.device.empty() || options.mptcp)
      return fail(Errc::bad_option, Stage::connect, "local address, device and MPTCP are of TCP, not of a UNIX socket");
    return connect_unix(address, deadline, options);
  }
  if (address.port == 0) return fail(Errc::bad_address, Stage::connect, "port 0");
  AddrinfoList local;
  if (!options.local_address.empty()) {
    MULTIFD_TRY_ASSIGN(local, local_sockaddr(options, Stage::connect));
  }
  Result<AddrinfoList> targets = resolve(address, 0, Stage::connect, local ? local->ai_family : AF_UNSPEC);
  if (!targets) return std::unexpected(targets.error());

  int left = 0;
  for (const addrinfo* target = targets->get(); target; target = target->ai_next) ++left;
  // Each address gets its share of the time, so that a silent address leaves time for the next one. The error of
  // the first address is reported, because the system puts the most likely address first.
  Error first_error;
  for (const addrinfo* target = targets->get(); target; target = target->ai_next, --left) {
    const Clock::time_point now = Clock::now();
    const Clock::time_point share =
        deadline == Clock::time_point::max() ? deadline : now + std::max(deadline - now, Clock::duration(0)) / left;
    Result<FdTransport> connection = connect_tcp(*target, local.get(), share, options);
    if (connection || connection.error().code == Errc::cancelled) return connection;
    if (target == targets->get()) first_error = connection.error();
  }
  return std::unexpected(first_error);
}

[[nodiscard]] inline Result<FdTransport> connect_until(const Address& address, Clock::time_point deadline,
                                                       const SocketOptions& options) {
  auto link = connect_unnamed(address, deadline, options);
  if (!link) link.error().subject = subject_of(address);
  return link;
}

/// An empty list with room for `channels` links. Errors: ENOMEM.
[[nodiscard]] inline Result<std::vector<FdTransport>> room_for_links(unsigned channels, Stage stage,
                                                                     const char* op) noexcept {
  return catch_bad_alloc(stage, op, [&]() -> Result<std::vector<FdTransport>> {
    std::vector<FdTransport> links;
    links.reserve(channels);
    return links;
  });
}

}  // namespace detail

/// Connects to an address; of a name's addresses, to the first that answers.
/// Errors (stage `connect`): `timed_out` after `options.connect_timeout`; `cancelled` by `options.interrupt`; errno,
///   for instance ECONNREFUSED, ENOENT; op "resolve" with a code of its own category for a name that does not resolve;
///   `bad_address` for port 0 or a path that is empty, too long or has a NUL; `bad_option`. EADDRNOTAVAIL, op "bind to
///   the local address", for a local address that this machine does not have; ENODEV, op "bind to the device".
/// Threads: any thread.
/// Example: `auto link = multifd::connect_to({.host = "192.0.2.7", .port = 4444});`
[[nodiscard]] inline Result<FdTransport> connect_to(const Address& address, const SocketOptions& options = {}) {
  return detail::connect_until(address, deadline_after(as_timeout(options.connect_timeout)), options);
}

/// Connects once for each channel, one after the other; a channel's id is its index.
/// Params `channels`: 1 to max_channels.
/// Errors: `bad_channel_count`; ENOMEM; those of connect_to(), with the channel that failed. `options.connect_timeout` holds
///   for all of them together. One failure closes all.
/// Threads: any thread. Cost: resolves a name once for each channel.
[[nodiscard]] inline Result<std::vector<FdTransport>> connect_channels(const Address& address, unsigned channels,
                                                                       const SocketOptions& options = {}) {
  if (channels < 1 || channels > max_channels) {
    return fail(Errc::bad_channel_count, Stage::connect, "connect", channels);
  }
  const detail::Clock::time_point deadline = deadline_after(as_timeout(options.connect_timeout));
  auto links = detail::room_for_links(channels, Stage::connect, "connect");
  if (!links) return links;
  for (unsigned id = 0; id < channels; ++id) {
    Result<FdTransport> link = detail::connect_until(address, deadline, options);
    if (!link) {
      link.error().channel = id;
      return std::unexpected(link.error());
    }
    links->push_back(std::move(*link));
  }
  return links;
}

/// connect_channels() for TCP. Params, Errors: as there.
[[nodiscard]] inline Result<std::vector<FdTransport>> tcp_connect(std::string host, std::uint16_t port,
                                                                  unsigned channels,
                                                                  const SocketOptions& options = {}) {
  return connect_channels({.kind = AddressKind::tcp, .host = std::move(host), .port = port}, channels, options);
}

}  // namespace multifd
