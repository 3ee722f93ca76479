// SPDX-License-Identifier: MIT
//
// A listening socket, and the connections that were taken from it to be looked at. Whoever accepts next gets these
// first, in the order in which they came.
#pragma once

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/unique_fd.hpp"
#include "multifd/transport/fd.hpp"

namespace multifd::detail {

/// Errors of accept() that concern one connection, which is gone already, and not the listener: accept(2).
inline bool only_that_connection(int error) noexcept {
  switch (error) {
    case EINTR:
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

/// Threads: any. Nothing here waits.
class AcceptQueue {
 public:
  /// Params `listening`: a listening socket, non-blocking.
  /// Errors (stage accept): errno, EMFILE or ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<AcceptQueue>> create(UniqueFd listening) noexcept {
    std::unique_ptr<AcceptQueue> made(new (std::nothrow) AcceptQueue(std::move(listening)));
    if (!made) return fail_errno(Stage::accept, "listen", ENOMEM);
    if (made->ready_.get() < 0 || made->poll_.get() < 0) return fail_errno(Stage::accept, "listen");
    for (const int fd : {made->listening_.get(), made->ready_.get()}) {
      epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
      if (::epoll_ctl(made->poll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return fail_errno(Stage::accept, "epoll");
    }
    return made;
  }

  int native_handle() const noexcept { return listening_.get(); }
  /// Readable when take() has a connection.
  int poll_handle() const noexcept { return poll_.get(); }

  /// The connection that came first. None: nobody waits. Errors (stage accept): errno, EMFILE for instance.
  [[nodiscard]] Result<std::optional<FdTransport>> take() noexcept {
    const std::scoped_lock lock(mutex_);
    if (links_.empty()) return accept();
    std::optional<FdTransport> link(std::move(links_.front().link));
    links_.erase(links_.begin());
    signal();
    return link;
  }

  /// Gives back, as the first one, a connection that take() has returned.
  void put_back(FdTransport link) noexcept {
    const std::scoped_lock lock(mutex_);
    const std::uint64_t number = links_.empty() ? next_++ : links_.front().number - 1;
    // Without memory the connection is closed.
    (void)catch_bad_alloc(Stage::accept, "accept", [&]() -> Result<void> {
      links_.insert(links_.begin(), Waiting{std::move(link), number});
      return {};
    });
    signal();
  }

  /// Takes what waits in the system's queue, max_waiting_connections in all; the others stay there.
  /// Errors (stage accept): errno; ENOMEM. What was taken by then stays here.
  [[nodiscard]] Result<void> fetch() {
    return catch_bad_alloc(Stage::accept, "look at connections", [&]() -> Result<void> {
      const std::scoped_lock lock(mutex_);
      while (links_.size() < max_waiting_connections) {
        // Before it is accepted: a connection for which there is no memory stays in the system's queue.
        if (links_.size() == links_.capacity()) links_.reserve(2 * links_.size() + 8);
        auto link = accept();
        if (!link) return std::unexpected(link.error());
        if (!*link) break;
        links_.push_back({std::move(**link), next_++});
        signal();
      }
      return {};
    });
  }

  /// What one of the fetched connections has sent so far; the bytes stay there.
  struct Look {
    std::uint64_t number;  ///< of the connection; later ones have higher numbers
    std::array<std::byte, 64> room;
    std::size_t count;
    bool ended;  ///< nothing is left to be read, and nothing more comes
    std::span<const std::byte> bytes() const noexcept { return std::span(room).first(count); }
  };
  /// The first fetched connection whose number is `from` or higher; none: there is no such one.
  std::optional<Look> look(std::uint64_t from) noexcept {
    const std::scoped_lock lock(mutex_);
    const auto at = std::ranges::find_if(links_, [&](const Waiting& each) { return each.number >= from; });
    if (at == links_.end()) return std::nullopt;
    Look seen{.number = at->number, .room = {}, .count = 0, .ended = false};
    const ssize_t got = ::recv(at->link.native_handle(), seen.room.data(), seen.room.size(), MSG_PEEK | MSG_DONTWAIT);
    if (got > 0) seen.count = static_cast<std::size_t>(got);
    seen.ended = got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
    return seen;
  }

  /// Closes a fetched connection, unless it was taken meanwhile.
  void close(std::uint64_t number) noexcept {
    const std::scoped_lock lock(mutex_);
    std::erase_if(links_, [&](const Waiting& each) { return each.number == number; });
    signal();
  }

 private:
  struct Waiting {
    FdTransport link;
    std::uint64_t number;
  };

  explicit AcceptQueue(UniqueFd listening) noexcept
      : listening_(std::move(listening)),
        ready_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        poll_(::epoll_create1(EPOLL_CLOEXEC)) {}

  /// The next connection of the system's queue. None: that is empty.
  [[nodiscard]] Result<std::optional<FdTransport>> accept() noexcept {
    for (;;) {
      const int fd = ::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC);
      if (fd >= 0) {
        auto link = FdTransport::adopt(fd);
        if (!link) return std::unexpected(link.error());
        return std::optional(std::move(*link));
      }
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        // A UNIX socket that was shut down says so, too, and is readable for good.
        pollfd entry{.fd = listening_.get(), .events = 0, .revents = 0};
        if (::poll(&entry, 1, 0) == 1) return fail_errno(Stage::accept, "accept: the listener is shut down", EINVAL);
        return std::nullopt;
      }
      if (!only_that_connection(errno)) return fail_errno(Stage::accept, "accept");
    }
  }

  /// Makes poll_handle() readable while there are fetched connections. Called behind every change of `links_`.
  void signal() noexcept {
    if (signalled_ == !links_.empty()) return;
    signalled_ = !links_.empty();
    std::uint64_t count = 1;
    // Neither can fail: the count is 0 before the one, and 1 before the other.
    [[maybe_unused]] const ssize_t done =
        signalled_ ? ::write(ready_.get(), &count, sizeof count) : ::read(ready_.get(), &count, sizeof count);
  }

  const UniqueFd listening_;
  const UniqueFd ready_;  ///< an eventfd: who polls is woken for fetched connections, too
  const UniqueFd poll_;   ///< an epoll of both
  std::mutex mutex_;
  std::vector<Waiting> links_;
  std::uint64_t next_ = std::uint64_t{1} << 32;  ///< of the next connection; below it is room for what is put back
  bool signalled_ = false;
};

}  // namespace multifd::detail
