// SPDX-License-Identifier: MIT
//
// What connect_to() and Listener set on a socket, and the one place where it is set.
#pragma once

#include <arpa/inet.h>
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

/// Settings of new sockets. Time limits: see time_limit.hpp.
struct SocketOptions {
  /// How long connecting may take in all; 0: no limit. Looking up a name is not part of it, because it cannot be ended.
  std::chrono::milliseconds connect_timeout = std::chrono::seconds(10);

  /// SO_SNDBUF and SO_RCVBUF; 0 leaves the kernel's choice, whose auto-tuning is right between machines. For the
  /// sender's buffer of a UNIX end, or a TCP end whose address is loopback, 0 means local_send_buffer_bytes.
  int send_buffer_bytes = 0;
  int receive_buffer_bytes = 0;

  /// TCP_CONGESTION, as "bbr" or "cubic" (net.ipv4.tcp_allowed_congestion_control has the names). Empty leaves the
  /// system's choice, but for TCP ends whose address is loopback: see loopback_congestion_control.
  std::string congestion_control = {};

  /// Ends connecting and accepting from outside; not owned, may be null.
  const Interrupt* interrupt = nullptr;

  /// TCP_NODELAY: a SYNC packet must not wait for company.
  bool no_delay = true;

  /// SO_KEEPALIVE notices a dead peer of an idle connection: the first question after `keepalive_idle`
  /// without data, then one each `keepalive_interval`, `keepalive_probes` of them. On Linux `user_timeout`, unless 0,
  /// takes the place of the number of probes: it is then that long until the peer counts as gone.
  bool keepalive = true;
  std::chrono::seconds keepalive_idle = std::chrono::seconds(15);
  std::chrono::seconds keepalive_interval = std::chrono::seconds(5);
  int keepalive_probes = 3;

  /// TCP_USER_TIMEOUT: how long sent data may stay unacknowledged before the peer counts as dead (Linux: a
  /// quarter of an hour). Linux counts a full receiver too: a peer that is alive but does not read for that
  /// long is cut off all the same, so it must be longer than the receiver ever stands still, at a barrier for
  /// instance.
  std::chrono::milliseconds user_timeout = std::chrono::minutes(2);
};

/// Room for a packet, and small enough that what was sent is still in cache when it is received: less CPU time at
/// both ends than with TCP's buffers, which grow by themselves to megabytes. With less, as UNIX sockets have by
/// themselves, each packet takes more turns of both ends. A small receive buffer gains nothing more, and alone it loses.
/// A host may have a lower limit (net.core.wmem_max).
inline constexpr int local_send_buffer_bytes = 512 * 1024;

/// Where nothing can be congested, an algorithm that paces (bbr, the default of many hosts) costs a tenth of the speed
/// with few connections and a third with many: its timers hold back what could be copied at once. Every kernel has this
/// one.
inline constexpr const char* loopback_congestion_control = "reno";

namespace detail {

/// Errors of getaddrinfo(), which are no errno.
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

/// Resolves a TCP address. No AI_ADDRCONFIG: it hides loopback on a machine that has no other network; what
/// cannot be reached fails at once anyway, and the next address is tried.
inline Result<AddrinfoList> resolve(const Address& address, int flags, Stage stage) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
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
inline Result<sockaddr_un> unix_sockaddr(const Address& address, Stage stage) noexcept {
  const std::string& path = address.path;
  if (path.empty() || path.size() > max_unix_path || path.find('\0') != path.npos) {
    return fail(Errc::bad_address, stage, "path", path.size());
  }
  sockaddr_un result{};
  result.sun_family = AF_UNIX;
  std::memcpy(result.sun_path, path.data(), path.size());
  return result;
}

inline Result<UniqueFd> open_socket(int family, int protocol, Stage stage) noexcept {
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol));
  if (fd.get() < 0) return fail_errno(stage, "socket");
  return fd;
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

/// Sets TCP_CONGESTION. On loopback it is a wish: a host may have forbidden it.
inline Result<void> choose_congestion_control(int fd, const sockaddr& address, const std::string& name,
                                              Stage stage) noexcept {
  if (name.empty() && !is_loopback(address)) return {};
  const std::string_view chosen = name.empty() ? std::string_view(loopback_congestion_control) : name;
  const bool ok =
      ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, chosen.data(), static_cast<socklen_t>(chosen.size())) == 0;
  if (!ok && !name.empty()) return fail_errno(stage, "TCP_CONGESTION");
  return {};
}

/// Errors: bad_option (op: the first option that is out of its range).
inline Result<void> check_socket_options(const SocketOptions& options, Stage stage) noexcept {
  if (options.send_buffer_bytes < 0) return fail(Errc::bad_option, stage, "SocketOptions::send_buffer_bytes");
  if (options.receive_buffer_bytes < 0) return fail(Errc::bad_option, stage, "SocketOptions::receive_buffer_bytes");
  if (options.keepalive_probes < 0) return fail(Errc::bad_option, stage, "SocketOptions::keepalive_probes");
  if (auto checked = check_time_limit("SocketOptions::connect_timeout", options.connect_timeout, stage); !checked)
    return checked;
  if (auto checked = check_time_limit("SocketOptions::keepalive_idle", options.keepalive_idle, stage); !checked)
    return checked;
  if (auto checked = check_time_limit("SocketOptions::keepalive_interval", options.keepalive_interval, stage); !checked)
    return checked;
  return check_time_limit("SocketOptions::user_timeout", options.user_timeout, stage);
}

/// Sets what an unconnected or listening socket can take; `address` is what it will connect or be bound to. Buffer
/// sizes must come before the connection, because the window scale is agreed on then; a listening socket hands all of
/// it down to those it accepts.
inline Result<void> apply_options(int fd, const sockaddr& address, const SocketOptions& options, Stage stage) noexcept {
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
  bool ok = set_unless_zero(SOL_SOCKET, SO_SNDBUF, send_buffer) &&
            set_unless_zero(SOL_SOCKET, SO_RCVBUF, options.receive_buffer_bytes);
  if (address.sa_family != AF_UNIX) {
    ok = ok && set_option(fd, IPPROTO_TCP, TCP_NODELAY, options.no_delay ? 1 : 0) &&
         set_option(fd, SOL_SOCKET, SO_KEEPALIVE, options.keepalive ? 1 : 0) &&
         set_unless_zero(IPPROTO_TCP, TCP_KEEPIDLE, as_int(options.keepalive_idle.count())) &&
         set_unless_zero(IPPROTO_TCP, TCP_KEEPINTVL, as_int(options.keepalive_interval.count())) &&
         set_unless_zero(IPPROTO_TCP, TCP_KEEPCNT, options.keepalive_probes) &&
         set_unless_zero(IPPROTO_TCP, TCP_USER_TIMEOUT, as_int(options.user_timeout.count()));
  }
  if (!ok) return fail_errno(stage, "setsockopt");
  return address.sa_family == AF_UNIX ? Result<void>{}
                                      : choose_congestion_control(fd, address, options.congestion_control, stage);
}

}  // namespace detail
}  // namespace multifd
