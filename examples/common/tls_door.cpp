// SPDX-License-Identifier: MIT
#include "common/tls_door.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "common/limits.hpp"
#include "common/tell.hpp"

namespace program {

using namespace std::chrono_literals;
using multifd::Errc;
using multifd::Result;
using multifd::Stage;

namespace {

constexpr std::size_t most = 512;  // beyond 255 channels: nobody fills the process with silent connections

bool watch(int epoll, int fd, void* tag, std::uint32_t events = EPOLLIN) {
  epoll_event event{.events = events, .data = {.ptr = tag}};
  return ::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

void tell_closed(const multifd::Error& error) { tell("closed a connection: {}\n", describe(error)); }

}  // namespace

TlsDoor::TlsDoor(multifd::Listener& listener, const Tls& tls, const multifd::Interrupt& interrupt,
                 std::chrono::milliseconds each)
    : listener_(listener), tls_(tls), interrupt_(interrupt), each_(each), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (epoll_.get() < 0 || !watch(epoll_.get(), listener.native_handle(), nullptr))
    throw Failure(multifd::fail_errno(Stage::accept, "epoll").error());
}

Result<void> TlsDoor::accept() {
  auto link = listener_.accept(0ms, &interrupt_);
  if (!link && link.error().code == Errc::timed_out) return {};  // it has gone again
  if (!link) return std::unexpected(link.error());
#if defined(MULTIFD_HAS_TLS)
  auto started = tls_.start(std::move(*link));
  if (!started) return std::unexpected(started.error());
  if (newcomers_.size() == most) newcomers_.pop_front();  // the one that has been silent for longest
  newcomers_.push_back({.handshake = std::move(*started), .deadline = Clock::now() + each_, .number = ++accepted_});
  Newcomer& newcomer = newcomers_.back();
  if (!watch(epoll_.get(), newcomer.handshake.native_handle(), &newcomer))
    return multifd::fail_errno(Stage::accept, "epoll");
#endif
  return {};
}

Result<std::optional<std::uint32_t>> TlsDoor::go_on(Newcomer& newcomer) {
#if defined(MULTIFD_HAS_TLS)
  if (!newcomer.link) {
    const auto progress = newcomer.handshake.step();
    if (!progress) return std::unexpected(progress.error());
    // A flight that does not fit into an empty socket buffer does not exist: it always wants to read.
    if (*progress != multifd::TlsHandshake::Progress::done) return std::nullopt;
    newcomer.link.emplace(newcomer.handshake.take());
  }
#endif
  const auto first = peek_magic(*newcomer.link, 0ms);
  if (first) return *first;
  if (first.error().code == Errc::timed_out) return std::nullopt;
  return std::unexpected(first.error());
}

TlsDoor::Clock::time_point TlsDoor::close_late() {
  // They came in the order of their deadlines.
  while (!newcomers_.empty() && newcomers_.front().deadline <= Clock::now()) {
    tell_closed({.code = Errc::timed_out, .stage = Stage::handshake, .op = "TLS handshake and first bytes"});
    newcomers_.pop_front();
  }
  return newcomers_.empty() ? Clock::time_point::max() : newcomers_.front().deadline;
}

bool TlsDoor::pending() const noexcept {
  pollfd listener{.fd = listener_.native_handle(), .events = POLLIN, .revents = 0};
  return !newcomers_.empty() || ::poll(&listener, 1, 0) == 1;
}

Result<void> TlsDoor::watch_end(const Link& link, std::uint32_t also) {
  if (!watch(epoll_.get(), link.native_handle(), this, also | EPOLLRDHUP | EPOLLET))
    return multifd::fail_errno(Stage::accept, "epoll");
  return {};
}

Result<std::optional<multifd::detail::Arrival<Link>>> TlsDoor::next(Clock::time_point deadline,
                                                                    const multifd::Interrupt*) {
  for (;;) {
    const Clock::time_point until = std::min(deadline, close_late());
    std::array<pollfd, 2> fds{{{epoll_.get(), POLLIN, 0}, {interrupt_.native_handle(), POLLIN, 0}}};
    int wait_ms = -1;
    if (until != Clock::time_point::max())
      wait_ms = static_cast<int>(std::clamp<std::int64_t>(
          std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count(), 0, 1'000'000));
    const int ready = ::poll(fds.data(), fds.size(), wait_ms);
    if (ready < 0 && errno != EINTR) return multifd::fail_errno(Stage::accept, "poll");
    if (ready > 0 && fds[1].revents != 0) return multifd::fail(Errc::cancelled, Stage::accept, "accept");
    if (ready == 0 && Clock::now() >= deadline) return multifd::fail(Errc::timed_out, Stage::accept, "accept");
    epoll_event event{};
    if (ready <= 0 || ::epoll_wait(epoll_.get(), &event, 1, 0) != 1) continue;
    if (event.data.ptr == this) return std::nullopt;
    if (event.data.ptr == nullptr) {
      if (auto accepted = accept(); !accepted) return std::unexpected(accepted.error());
      continue;
    }
    void* const which = event.data.ptr;  // a copy: epoll_event is packed, and a reference would not be aligned
    const auto at = std::ranges::find(newcomers_, which, [](Newcomer& each) -> void* { return &each; });
    if (at == newcomers_.end()) continue;
    const auto first = go_on(*at);
    if (first && !*first) continue;
    if (!first && is_limit(first.error().code)) return std::unexpected(first.error());
    if (!first) {
      tell_closed(first.error());
      newcomers_.erase(at);
      continue;
    }
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->link->native_handle(), nullptr);
    multifd::detail::Arrival<Link> arrived{std::move(*at->link), at->number, **first};
    newcomers_.erase(at);
    return arrived;
  }
}

}  // namespace program
