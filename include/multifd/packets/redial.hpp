// SPDX-License-Identifier: MIT
//
// How channels of own peers come back when their connection is lost (format/extension.md section 19.10). Both ends ask an
// object of the caller's for another connection: the sender one that dials, the receiver one that accepts.
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <system_error>

#include "multifd/result.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::packets {

/// Whether an error says that a connection is lost, and no more: the same bytes may go another way.
inline bool is_lost_link(const Error& error) noexcept {
  if (error.code == Condition::peer_gone)
    return error.code != Errc::peer_gave_up && error.code != Errc::session_lost && error.code != Errc::memory_lost;
  if (error.code.category() == std::system_category() || error.code.category() == std::generic_category()) {
    switch (error.code.value()) {
      case ETIMEDOUT:  // TCP_USER_TIMEOUT, keepalive
      case ENETDOWN:
      case ENETRESET:
      case EHOSTDOWN:
      case EIO: return true;
      default: return false;
    }
  }
  return error.code == Errc::truncated_hello || error.code == Errc::truncated_header ||
         error.code == Errc::truncated_payload || error.code == Errc::unsynced_end;
}

/// Has a silent connection count as lost after `limit`, 1 s at least, whether this side writes or only reads. A descriptor that
/// is no TCP socket is left as it is.
inline void limit_silence(int fd, std::chrono::milliseconds limit) noexcept {
  const auto set = [fd](int level, int name, int value) {
    static_cast<void>(::setsockopt(fd, level, name, &value, sizeof value));
  };
  constexpr std::chrono::milliseconds least{1000}, most{86'400'000};
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 1);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 1);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(std::clamp(limit, least, most).count()));
}
/// The descriptor of a link; -1: it has none.
template <class T>
int descriptor_of(const T& link) noexcept {
  if constexpr (requires { link.native_handle(); }) return link.native_handle();
  return -1;
}

/// Fails where the other side has ended a connection, or the network has: for who neither reads nor writes it. A link without
/// a descriptor never does. Errors: Errc::peer_closed.
template <Transport T>
[[nodiscard]] Result<void> check_connected(T& link) noexcept {
  pollfd entry{.fd = descriptor_of(link), .events = POLLRDHUP, .revents = 0};  // poll() passes over -1
  if (::poll(&entry, 1, 0) == 1) return fail(Errc::peer_closed, Stage::write, "an idle connection");
  return {};
}

/// Makes new connections for a sender's channels.
///
/// Threads: any; reconnect() is called by several at once.
template <Transport T>
class Redial {
 public:
  virtual ~Redial() = default;
  /// Blocks until there is a new connection for a channel, which the receiver has admitted.
  ///
  /// Params `why`: what became of the one before.
  /// Errors: Errc::cancelled behind stop(); any other one is the migration's end.
  [[nodiscard]] Result<T> reconnect(unsigned channel, const Error& why) noexcept { return do_reconnect(channel, why); }
  /// The channel goes on with its new connection.
  virtual void joined(unsigned channel) noexcept = 0;
  /// Ends all calls, now and from now on, in bounded time.
  virtual void stop() noexcept = 0;

 private:
  [[nodiscard]] virtual Result<T> do_reconnect(unsigned channel, const Error& why) noexcept = 0;
};

/// Hands a receiver's channels the connections that come for them.
///
/// Threads: any; await() is called by several at once.
template <Transport T>
class Rejoins {
 public:
  virtual ~Rejoins() = default;
  /// A connection that says REJOIN; its answer is the receiver's.
  struct Arrival {
    T link;
    std::uint32_t generation = 0;
  };
  /// Blocks until there is a new connection for a channel. Errors: as Redial::reconnect().
  [[nodiscard]] Result<Arrival> await(unsigned channel, const Error& why) noexcept { return do_await(channel, why); }
  /// The channel goes on with its new connection.
  virtual void joined(unsigned channel) noexcept = 0;
  virtual void stop() noexcept = 0;

 private:
  [[nodiscard]] virtual Result<Arrival> do_await(unsigned channel, const Error& why) noexcept = 0;
};

}  // namespace multifd::packets
