// SPDX-License-Identifier: MIT
//
// PlainAcceptor: takes the connections of a Listener and returns each when its first four bytes have come, which tell a
// main connection from a channel (format/README.md section 1.2). It waits for all connections at once, so that a silent
// one delays no other. TlsAcceptor (tls_acceptor.hpp) is the same for connections that begin with a TLS handshake: both
// are BasicAcceptor, over what a connection does first.
#pragma once

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <system_error>
#include <utility>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/listen.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// A connection whose first bytes are known; the bytes stay there to be read.
template <class L>
struct Arrival {
  L link;
  std::uint64_t number = 0;              ///< in the order in which the connections were accepted
  std::optional<std::uint32_t> magic{};  ///< the first four bytes, big-endian; none: the stream ended before them
};

/// Leaf concepts of Acceptor.
template <class A>
concept HasLink = Transport<typename A::Link>;

template <class A>
concept HasNext =
    HasLink<A> && requires(A& acceptor, std::chrono::steady_clock::time_point deadline, const Interrupt* interrupt) {
      { acceptor.next(deadline, interrupt) } -> std::same_as<Result<std::optional<Arrival<typename A::Link>>>>;
    };

template <class A>
concept HasWatchEnd = HasLink<A> && requires(A& acceptor, const typename A::Link& link, std::uint32_t events) {
  { acceptor.watch_end(link, events) } -> std::same_as<Result<void>>;
};

template <class A>
concept HasPending = requires(const A& acceptor) {
  { acceptor.pending() } -> std::same_as<bool>;
};

/// Takes the connections of a Listener, and returns each when its first four bytes are known: what accept_source() and
/// programs are made of.
///
/// Requirements: `Link`, the Transport of its connections, and the calls below.
/// Semantics:
///   `next(deadline, interrupt)` waits for the next connection whose first four bytes have come, and returns it as an
///     Arrival; every byte is still there to be read. `Arrival::number` grows in the order in which the connections were
///     accepted; they are returned in the order in which their bytes come. No connection delays another. One that ends
///     before its fourth byte is returned without a magic, or closed; one that breaks off its handshake or takes too long
///     is closed; whoever asked for it is told of each that is closed (on_refused of the models). A connection that the
///     Listener has looked at (Listener::any_waiting()) is taken, too. A null `interrupt` is the listener's. With a
///     deadline that has passed next() does a bounded part of what can be done without waiting.
///   `watch_end(link, events)`: next() returns none, once, when `link` ends, which it has returned before and whose
///     descriptor is still open, and for further `events` of epoll (0: for none).
///   `pending()`: whether a connection is accepted that next() has not returned yet.
/// Errors (stage accept): next(): timed_out at the deadline, cancelled, errno. After any of them next() may be called
///   again, and no connection is lost by it but a TLS one for whose session there is no memory.
/// Threads: one. Other threads may use the Listener meanwhile.
/// Lifetime: the Listener must outlive the acceptor, whose destructor closes the connections that next() has not
///   returned. Connections that have been returned are the caller's.
/// Cost: called for each connection, not for its bytes.
/// Models: PlainAcceptor, TlsAcceptor. Exemplar: tests/exemplar/acceptor.hpp.
///   Contract: multifd/testing/acceptor_contract.hpp.
template <class A>
concept Acceptor = HasLink<A> && HasNext<A> && HasWatchEnd<A> && HasPending<A>;

/// Fails to compile with a message that says which member to write. Use it as
/// `static_assert(multifd::check_acceptor<MyAcceptor>());`.
template <class A>
consteval bool check_acceptor() {
  static_assert(HasLink<A>, "Acceptor: needs  using Link = ...;  a Transport");
  static_assert(
      HasNext<A>,
      "Acceptor: needs  Result<std::optional<Arrival<Link>>> next(std::chrono::steady_clock::time_point, const "
      "Interrupt*)");
  static_assert(HasWatchEnd<A>, "Acceptor: needs  Result<void> watch_end(const Link&, std::uint32_t events)");
  static_assert(HasPending<A>, "Acceptor: needs  bool pending() const");
  return Acceptor<A>;
}

/// Whether an error means that this process or its system has run out of something. It says nothing
/// about the peer: what waits goes on waiting, and next() may be called again.
inline bool is_limit(const std::error_code& error) noexcept {
  if (error.category() != std::system_category()) return false;
  const int value = error.value();
  return value == EMFILE || value == ENFILE || value == ENOMEM || value == ENOBUFS || value == ENOSPC;  // of epoll
}

namespace detail {

/// What a connection has sent so far.
struct FirstSaid {
  bool done = false;                     ///< there is nothing more to wait for
  std::optional<std::uint32_t> magic{};  ///< none when done: the stream has ended
};

}  // namespace detail

/// Accepts connections, and waits for the first four bytes of all of them at once.
///
/// At most max_waiting_connections connections wait for their first bytes: beyond them the oldest is closed for each
/// new one, and `on_refused` is told (ENOBUFS), so that silent connections do not fill the process.
/// Threads: one. Lifetime: the Listener must outlive the acceptor, whose destructor closes the connections that next()
///   has not returned.
/// Cost: one descriptor (epoll). A connection costs an allocation and one or two system calls per arrival of bytes.
template <class Pending>
class BasicAcceptor {
 public:
  using Link = typename Pending::Link;
  using Options = typename Pending::Options;

  /// Errors (stage accept): bad_option for a negative time limit or missing credentials; errno, EMFILE for instance.
  [[nodiscard]] static Result<BasicAcceptor> open(Listener& listener, Options options = {}) {
    if (auto checked = options.check(); !checked) return std::unexpected(checked.error());
    BasicAcceptor opened(listener, std::move(options));
    if (opened.epoll_.get() < 0) return fail_errno(Stage::accept, "epoll");
    if (auto watched = opened.watch(listener.poll_handle(), EPOLLIN, listener_tag); !watched)
      return std::unexpected(watched.error());
    return opened;
  }

  /// Waits for the next connection whose first four bytes are there. A connection that ends or fails before is closed:
  /// by a PlainAcceptor's caller, which gets it without a magic, by a TlsAcceptor after it has called `on_refused`.
  ///
  /// Params `interrupt`: null: the listener's. Returns none when a connection that watch_end() watches has ended.
  /// Errors (stage accept): timed_out at the deadline, however many strangers connect; cancelled; errno, EMFILE for
  ///   instance. After any of them next() may be called again: a connection that was not taken in for want of memory, of
  ///   descriptors or of a place in epoll waits at the listener.
  [[nodiscard]] Result<std::optional<Arrival<Link>>> next(std::chrono::steady_clock::time_point deadline,
                                                          const Interrupt* interrupt = nullptr) {
    if (!interrupt) interrupt = listener_->interrupt();
    for (bool looked = false;; looked = true) {
      if (looked && detail::Clock::now() >= deadline) return fail(Errc::timed_out, Stage::accept, "accept");
      const auto until = std::min(deadline, close_late());
      if (auto waited = detail::wait_for(epoll_.get(), POLLIN, until, interrupt, Stage::accept, "accept"); !waited) {
        if (waited.error().code == Errc::timed_out && until < deadline) continue;
        return std::unexpected(waited.error());
      }
      epoll_event event{};
      if (::epoll_wait(epoll_.get(), &event, 1, 0) != 1) continue;
      const std::uint64_t tag = event.data.u64;
      if (tag == end_tag) return std::nullopt;
      if (tag == listener_tag) {
        if (auto accepted = accept(interrupt); !accepted) return std::unexpected(accepted.error());
        continue;
      }
      const auto at = std::ranges::find(pending_, tag, [](const Waiting& each) { return each.number + first_tag; });
      if (at == pending_.end()) continue;
      const auto said = at->connection->step(event.events);
      if (!said && is_limit(said.error().code)) return std::unexpected(said.error());
      if (!said) {
        refuse(at, said.error());
      } else if (said->done) {
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->connection->native_handle(), nullptr);
        Arrival<Link> arrival{at->connection->take(), at->number, said->magic};
        pending_.erase(at);
        return arrival;
      }
    }
  }

  /// Makes next() return, once, when a connection ends that next() has returned, as long as its descriptor is open.
  ///
  /// Params `events`: further events of epoll for which next() returns: EPOLLIN, when more bytes have come.
  /// Errors (stage accept): the errno of epoll_ctl(), ENOMEM for instance.
  template <class L>
  [[nodiscard]] Result<void> watch_end(const L& link, std::uint32_t events = 0) noexcept {
    return watch(link.native_handle(), events | EPOLLRDHUP | EPOLLET, end_tag);
  }

  /// Whether a connection is accepted whose first bytes are missing.
  bool pending() const noexcept { return !pending_.empty(); }

 private:
  struct Waiting {
    std::optional<Pending> connection{};  ///< set in every element of pending_
    detail::Clock::time_point deadline{};
    std::uint64_t number = 0;
  };
  using Place = typename std::list<Waiting>::iterator;

  // Which descriptor epoll reports: the listener, a watched connection, or the pending connection of a number.
  static constexpr std::uint64_t listener_tag = 0;
  static constexpr std::uint64_t end_tag = 1;
  static constexpr std::uint64_t first_tag = 2;

  BasicAcceptor(Listener& listener, Options options)
      : listener_(&listener), options_(std::move(options)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {}

  [[nodiscard]] Result<void> watch(int fd, std::uint32_t events, std::uint64_t tag) noexcept {
    epoll_event event{.events = events, .data = {.u64 = tag}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return fail_errno(Stage::accept, "epoll");
    return {};
  }

  /// Takes in the connection that came first. A connection that cannot be watched goes back to the listener, and the
  /// next call of next() tries it again.
  [[nodiscard]] Result<void> accept(const Interrupt* interrupt) {
    std::list<Waiting> place;  // its memory comes first: without it the connection stays at the listener
    auto room = catch_bad_alloc(Stage::accept, "accept", [&]() -> Result<void> {
      place.emplace_back();
      return {};
    });
    if (!room) return room;
    auto link = listener_->accept(std::chrono::milliseconds(0), interrupt);
    if (!link && link.error().code == Errc::timed_out) return {};  // the connection has gone again
    if (!link) return std::unexpected(link.error());
    Waiting& waiting = place.front();
    waiting.number = accepted_;
    if (auto watched = watch(link->native_handle(), Pending::events, waiting.number + first_tag); !watched) {
      listener_->put_back(std::move(*link));
      return watched;
    }
    ++accepted_;
    auto connection = Pending::start(std::move(*link), options_);
    if (!connection) {
      if (options_.on_refused) options_.on_refused(connection.error());
      return std::unexpected(connection.error());
    }
    waiting.connection.emplace(std::move(*connection));
    waiting.deadline = deadline_after(as_timeout(options_.limit()));
    if (pending_.size() == max_waiting_connections) {
      constexpr const char* reason = "the oldest connection whose first bytes are missing is closed for a new one";
      Error error = fail_errno(Stage::accept, reason, ENOBUFS).error();
      error.detail = max_waiting_connections;
      refuse(pending_.begin(), error);
    }
    pending_.splice(pending_.end(), place);
    return {};
  }

  /// Closes pending connections whose time limit has passed. Returns when the next limit passes.
  detail::Clock::time_point close_late() {
    // Connections wait in the order of their deadlines: all have the same limit.
    while (!pending_.empty() && pending_.front().deadline <= detail::Clock::now())
      refuse(pending_.begin(), fail(Errc::timed_out, Pending::stage, Pending::what).error());
    return pending_.empty() ? detail::Clock::time_point::max() : pending_.front().deadline;
  }

  void refuse(Place at, const Error& error) {
    pending_.erase(at);
    if (options_.on_refused) options_.on_refused(error);
  }

  Listener* listener_;
  Options options_;
  detail::UniqueFd epoll_;
  std::list<Waiting> pending_;
  std::uint64_t accepted_ = 0;
};

struct PlainAcceptorOptions {
  /// How long a connection may take until its first four bytes are there; then it is closed. 0: no limit
  /// (time_limit.hpp), which is safe: a silent connection delays no other, and the oldest is closed for a
  /// new one.
  std::chrono::milliseconds first_bytes_timeout{0};
  /// Called when a connection was closed, with the reason; in the thread of next(). Default: none.
  std::function<void(const Error&)> on_refused{};

  std::chrono::milliseconds limit() const noexcept { return first_bytes_timeout; }
  /// Errors: Errc::bad_option for a negative time limit.
  [[nodiscard]] Result<void> check() const noexcept {
    return check_time_limit("PlainAcceptorOptions::first_bytes_timeout", first_bytes_timeout, Stage::accept);
  }
};

namespace detail {

/// A connection that sends its first bytes at once.
class PlainPending {
 public:
  using Link = FdTransport;
  using Options = PlainAcceptorOptions;
  /// Edge-triggered: bytes that are only peeked would keep the descriptor readable for good.
  static constexpr std::uint32_t events = EPOLLIN | EPOLLRDHUP | EPOLLET;
  static constexpr Stage stage = Stage::accept;
  static constexpr const char* what = "a connection's first bytes";

  [[nodiscard]] static Result<PlainPending> start(FdTransport link, const Options&) {
    return PlainPending(std::move(link));
  }

  int native_handle() const noexcept { return link_.native_handle(); }

  [[nodiscard]] Result<FirstSaid> step(std::uint32_t events_now) noexcept {
    const FirstBytes first = look_at_first_bytes(link_.native_handle());
    if (first.count == 4) return FirstSaid{.done = true, .magic = first.magic};
    const bool ended = first.count == 0 || (events_now & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    return FirstSaid{.done = ended};
  }

  FdTransport take() noexcept { return std::move(link_); }

 private:
  explicit PlainPending(FdTransport link) noexcept : link_(std::move(link)) {}

  FdTransport link_;
};

}  // namespace detail

/// The acceptor of connections without TLS.
using PlainAcceptor = BasicAcceptor<detail::PlainPending>;

static_assert(check_acceptor<PlainAcceptor>());

}  // namespace multifd
