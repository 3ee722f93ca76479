// SPDX-License-Identifier: MIT
//
// The settings of sockets that connect_to() and Listener make, and the one place that applies them.
#pragma once

#include <arpa/inet.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>

#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/address.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd {

/// Settings of new sockets. Most callers set `interrupt` and leave the rest alone. Time limits: 0 is none
/// (time_limit.hpp); buffer sizes and probes: 0 leaves the system's value.
struct SocketOptions {
  // ---- Connecting

  /// How long connecting may take: for connect_channels() all channels and all addresses of a name together. Longer
  /// waits for a destination that is still starting. The resolution of a name does not count, because it cannot be
  /// interrupted.
  std::chrono::milliseconds connect_timeout = std::chrono::seconds(10);

  /// The address of this machine to connect from, as a number, IPv4 or IPv6 (with %ZONE where it needs one). Of a name's
  /// addresses only those of the same kind are tried. Empty: the system chooses. Only TCP; a Listener ignores it.
  std::string local_address = {};

  // ---- Speed

  /// SO_SNDBUF, in bytes. 0 leaves the kernel's auto-tuning, which is right between machines, except for UNIX sockets
  /// and TCP on loopback, which get local_send_buffer_bytes. Leave it alone unless a measurement of yours says
  /// otherwise.
  int send_buffer_bytes = 0;
  /// SO_RCVBUF, in bytes. 0 leaves the kernel's auto-tuning. Any other value switches that off, and a small one limits
  /// the speed of a long link to this many bytes per round trip.
  int receive_buffer_bytes = 0;
  /// TCP_CONGESTION: "bbr", "cubic" (net.ipv4.tcp_allowed_congestion_control has the names). Empty leaves the system's
  /// choice, except on loopback (loopback_congestion_control). A name that the system does not allow fails the
  /// connection.
  std::string congestion_control = {};

  // ---- Every connection

  /// Ends connecting and accepting from outside. Default: nothing does. Not owned, may be null.
  const Interrupt* interrupt = nullptr;
  /// SO_BINDTODEVICE: the network interface, by name, that all packets leave and reach this machine through. Empty: what
  /// the routes say. Only TCP. Kernels before 5.7 give it to privileged processes only.
  std::string device = {};
  /// Uses MPTCP, whose connections spread over what paths `ip mptcp endpoint` of both machines names. A listener takes
  /// plain TCP connections as well, and a connection to a peer without MPTCP becomes a plain one. Only TCP; fails where
  /// the kernel has none (net.mptcp.enabled).
  bool mptcp = false;
  /// TCP_NODELAY. Leave it on: without it a SYNC packet waits for more data before it leaves.
  bool no_delay = true;

  // ---- A peer that is gone

  /// SO_KEEPALIVE: asks an idle peer from time to time whether it is still there. Off, a peer that vanished is noticed
  /// only when this side sends.
  bool keepalive = true;
  /// TCP_KEEPIDLE: how long nothing arrives before the first question.
  std::chrono::seconds keepalive_idle = std::chrono::seconds(15);
  /// TCP_KEEPINTVL: the time between two questions.
  std::chrono::seconds keepalive_interval = std::chrono::seconds(5);
  /// TCP_KEEPCNT: how many questions stay unanswered until the peer counts as gone. On Linux this matters only when
  /// `user_timeout` is 0, which otherwise decides that.
  int keepalive_probes = 3;
  /// TCP_USER_TIMEOUT: how long sent data may stay unacknowledged, or keepalive questions unanswered, before the peer
  /// counts as gone. 0 leaves Linux' quarter of an hour. Linux counts a peer with a full window, too: a peer that lives
  /// but does not read for so long is cut off. So the limit must be longer than the receiver ever stands still, at a
  /// barrier for instance.
  std::chrono::milliseconds user_timeout = std::chrono::minutes(2);
};

/// SO_SNDBUF of UNIX sockets and of TCP on loopback. It holds one packet, and is small enough that sent bytes are still
/// in the CPU's cache when they are received: that costs less CPU time at both ends than TCP's own buffers, which grow
/// to megabytes. With a smaller buffer, as UNIX sockets have by default, sender and receiver wake each other more often
/// for each packet. A small SO_RCVBUF in addition gains nothing, and without this one it makes transfers slower. A host
/// may have a lower limit (net.core.wmem_max).
inline constexpr int local_send_buffer_bytes = 512 * 1024;

/// TCP_CONGESTION of TCP on loopback, where nothing can be congested. An algorithm that paces (bbr, the default of many
/// hosts) costs a tenth of the speed with few connections and a third with many, because its timers delay bytes that
/// could be copied at once. Every kernel has this one.
inline constexpr const char* loopback_congestion_control = "reno";

namespace detail {

/// Errors of getaddrinfo(), which are not errno values.
class ResolveCategory final : public std::error_category {
 public:
  const char* name() const noexcept override { return "resolve"; }
  std::string message(int value) const override { return ::gai_strerror(value); }
};

inline const std::error_category& resolve_category() noexcept {
  static const ResolveCategory instance;
  return instance;
}

struct FreeAddrinfo {
  void operator()(addrinfo* list) const noexcept { ::freeaddrinfo(list); }
};
using AddrinfoList = std::unique_ptr<addrinfo, FreeAddrinfo>;

/// Resolves a TCP address. Params `family`: AF_INET or AF_INET6 to get only these. Without AI_ADDRCONFIG, which hides loopback on a machine that has no other network. An
/// address that cannot be reached fails at once anyway, and the next one is tried.
[[nodiscard]] inline Result<AddrinfoList> resolve(const Address& address, int flags, Stage stage,
                                                  int family = AF_UNSPEC) {
  addrinfo hints{};
  hints.ai_family = family;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const std::string port = std::to_string(address.port);
  const int error = ::getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(), port.c_str(), &hints, &list);
  if (error == EAI_SYSTEM) return fail_errno(stage, "resolve");
  if (error != 0) {
    return std::unexpected(Error{.code = std::error_code(error, resolve_category()), .stage = stage, .op = "resolve"});
  }
  return AddrinfoList(list);
}

/// The system's form of a UNIX address. Errors: `bad_address` for a path that is empty, too long or has a
/// NUL.
[[nodiscard]] inline Result<sockaddr_un> unix_sockaddr(const Address& address, Stage stage) noexcept {
  const std::string& path = address.path;
  if (path.empty() || path.size() > max_unix_path || path.find('\0') != path.npos) {
    return fail(Errc::bad_address, stage, "path", path.size());
  }
  sockaddr_un result{};
  result.sun_family = AF_UNIX;
  std::memcpy(result.sun_path, path.data(), path.size());
  return result;
}

[[nodiscard]] inline Result<UniqueFd> open_socket(int family, int protocol, Stage stage) noexcept {
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol));
  if (fd.get() < 0) return fail_errno(stage, protocol == IPPROTO_MPTCP ? "socket (MPTCP)" : "socket");
  return fd;
}

/// What socket() gets for a TCP address.
inline int protocol_of(const addrinfo& target, const SocketOptions& options) noexcept {
  return options.mptcp ? IPPROTO_MPTCP : target.ai_protocol;
}

/// SocketOptions::local_address in the system's form. Errors: bad_option, or op "resolve", for what is no number.
[[nodiscard]] inline Result<AddrinfoList> local_sockaddr(const SocketOptions& options, Stage stage) {
  if (options.local_address.size() > 255) return fail(Errc::bad_option, stage, "SocketOptions::local_address");
  auto local = resolve({.host = options.local_address}, AI_NUMERICHOST, stage);
  if (!local) local.error().op = "SocketOptions::local_address";
  return local;
}

inline bool set_option(int fd, int level, int name, int value) noexcept {
  return ::setsockopt(fd, level, name, &value, sizeof value) == 0;
}

inline bool is_loopback(const sockaddr& address) noexcept {
  if (address.sa_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in&>(address).sin_addr.s_addr) >> 24) == IN_LOOPBACKNET;
  }
  return address.sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(address).sin6_addr);
}

/// Sets TCP_CONGESTION. On loopback a failure is ignored, because a host may forbid the algorithm.
[[nodiscard]] inline Result<void> choose_congestion_control(int fd, const sockaddr& address, const std::string& name,
                                                            Stage stage) noexcept {
  if (name.empty() && !is_loopback(address)) return {};
  const std::string_view chosen = name.empty() ? std::string_view(loopback_congestion_control) : name;
  const bool ok =
      ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, chosen.data(), static_cast<socklen_t>(chosen.size())) == 0;
  if (!ok && !name.empty()) return fail_errno(stage, "TCP_CONGESTION");
  return {};
}

/// Checks the ranges. Errors: bad_option (op: the first option that is out of its range).
[[nodiscard]] inline Result<void> check_socket_options(const SocketOptions& options, Stage stage) noexcept {
  if (options.send_buffer_bytes < 0) return fail(Errc::bad_option, stage, "SocketOptions::send_buffer_bytes");
  if (options.receive_buffer_bytes < 0) return fail(Errc::bad_option, stage, "SocketOptions::receive_buffer_bytes");
  if (options.device.size() >= IFNAMSIZ) return fail(Errc::bad_option, stage, "SocketOptions::device");
  if (options.keepalive_probes < 0) return fail(Errc::bad_option, stage, "SocketOptions::keepalive_probes");
  if (auto checked = check_time_limit("SocketOptions::connect_timeout", options.connect_timeout, stage); !checked)
    return checked;
  if (auto checked = check_time_limit("SocketOptions::keepalive_idle", options.keepalive_idle, stage); !checked)
    return checked;
  if (auto checked = check_time_limit("SocketOptions::keepalive_interval", options.keepalive_interval, stage); !checked)
    return checked;
  return check_time_limit("SocketOptions::user_timeout", options.user_timeout, stage);
}

/// Applies the options to an unconnected or listening socket; `address` is what it will connect or be bound to. Buffer
/// sizes must be set before the connection, which fixes the window scale. Accepted sockets inherit all of it from the
/// listening one.
[[nodiscard]] inline Result<void> apply_options(int fd, const sockaddr& address, const SocketOptions& options,
                                                Stage stage) noexcept {
  if (auto checked = check_socket_options(options, stage); !checked) return checked;
  const auto as_int = [](auto count) {
    return static_cast<int>(std::clamp<std::int64_t>(count, 0, std::numeric_limits<int>::max()));
  };
  const auto set_unless_zero = [fd](int level, int name, int value) {
    return value == 0 || set_option(fd, level, name, value);
  };
  const bool is_local = address.sa_family == AF_UNIX || is_loopback(address);
  const int send_buffer =
      options.send_buffer_bytes == 0 && is_local ? local_send_buffer_bytes : options.send_buffer_bytes;
  if (!set_unless_zero(SOL_SOCKET, SO_SNDBUF, send_buffer) ||
      !set_unless_zero(SOL_SOCKET, SO_RCVBUF, options.receive_buffer_bytes))
    return fail_errno(stage, "setsockopt");
  if (address.sa_family == AF_UNIX) return {};
  if (const std::string& device = options.device; !device.empty()) {
    const auto size = static_cast<socklen_t>(device.size() + 1);
    if (::setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device.c_str(), size) != 0)
      return fail_errno(stage, "bind to the device");
  }
  // MPTCP has learnt TCP's options one by one: what a kernel does not know there yet keeps its default.
  const auto set_of_tcp = [&](int name, int value) {
    if (set_option(fd, IPPROTO_TCP, name, value)) return true;
    return options.mptcp && (errno == EOPNOTSUPP || errno == ENOPROTOOPT);
  };
  const auto set_of_tcp_unless_zero = [&](int name, int value) { return value == 0 || set_of_tcp(name, value); };
  const bool ok = set_of_tcp(TCP_NODELAY, options.no_delay ? 1 : 0) &&
                  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, options.keepalive ? 1 : 0) &&
                  set_of_tcp_unless_zero(TCP_KEEPIDLE, as_int(options.keepalive_idle.count())) &&
                  set_of_tcp_unless_zero(TCP_KEEPINTVL, as_int(options.keepalive_interval.count())) &&
                  set_of_tcp_unless_zero(TCP_KEEPCNT, options.keepalive_probes) &&
                  set_of_tcp_unless_zero(TCP_USER_TIMEOUT, as_int(options.user_timeout.count()));
  if (!ok) return fail_errno(stage, "setsockopt");
  return choose_congestion_control(fd, address, options.congestion_control, stage);
}

}  // namespace detail
}  // namespace multifd
