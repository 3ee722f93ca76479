// SPDX-License-Identifier: MIT
//
// The connections of one migration source at one address: a main connection and its channels, in any order, told apart
// by their first four bytes, which stay there to be read (PROTOCOL.md section 1.2). Nobody has to speak in turn: a
// connection that says nothing, or something else, keeps no other waiting.
#pragma once

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/transport/listen.hpp"

namespace multifd {

/// What a source's connections begin with, big-endian.
struct SourceMagic {
  std::uint32_t main;
  std::uint32_t channel;
};

struct SourceLinks {
  FdTransport main;
  std::vector<FdTransport> channels;  ///< in the order in which they came: which one is which, its hello says
};

/// Time limits: 0 is none (time_limit.hpp).
struct AcceptSourceOptions {
  std::chrono::milliseconds first_timeout{0};  ///< until the first connection of a source is there
  std::chrono::milliseconds timeout{10'000};   ///< from then until all are
  const Interrupt* interrupt = nullptr;        ///< null: that of the listener
  /// Told of each connection that is neither, with its first bytes (0: it said too little); it is closed then.
  std::function<void(std::uint32_t first_bytes)> on_stranger{};
};

namespace detail {

/// Connections that have not said yet what they are.
class Newcomers {
 public:
  explicit Newcomers(Listener& listener) : listener_(listener), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {}

  /// Before the first next(). Errors: errno.
  Result<void> start() noexcept {
    if (epoll_.get() < 0) return fail_errno(Stage::accept, "accept");
    return watch(listener_.native_handle(), EPOLLIN, nullptr);
  }

  /// Waits for the next connection that says four bytes, or ends before: then its magic is empty.
  /// Errors: timed_out, cancelled, errno.
  Result<std::pair<FdTransport, std::optional<std::uint32_t>>> next(Clock::time_point deadline,
                                                                    const Interrupt* interrupt) {
    for (;;) {
      if (auto waited = wait_for(epoll_.get(), POLLIN, deadline, interrupt, Stage::accept, "accept"); !waited)
        return std::unexpected(waited.error());
      epoll_event event{};
      if (::epoll_wait(epoll_.get(), &event, 1, 0) != 1) continue;
      if (event.data.ptr == nullptr) {
        auto link = listener_.accept(std::chrono::milliseconds(0), interrupt);
        if (!link && link.error().code == Errc::timed_out) continue;  // it has gone again
        if (!link) return std::unexpected(link.error());
        if (links_.size() == most) links_.pop_front();  // the one that has been silent for longest
        links_.push_back(std::move(*link));
        // Edge-triggered: bytes that are only looked at would keep the descriptor ready for good.
        const auto watched = watch(links_.back().native_handle(), EPOLLIN | EPOLLRDHUP | EPOLLET, &links_.back());
        if (!watched) return std::unexpected(watched.error());
        continue;
      }
      void* const which = event.data.ptr;  // a copy: epoll_event is packed, and a reference would not be aligned
      const auto at = std::ranges::find(links_, which, [](FdTransport& link) -> void* { return &link; });
      if (at == links_.end()) continue;
      const FirstBytes first = look_at_first_bytes(at->native_handle());
      const bool ended = first.count == 0 || (event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
      if (first.count < 4 && !ended) continue;  // more to come
      FdTransport link = std::move(*at);
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, link.native_handle(), nullptr);
      links_.erase(at);
      return std::pair(std::move(link), first.count == 4 ? std::optional(first.magic) : std::nullopt);
    }
  }

  /// Whether somebody has connected who has not said anything yet.
  bool pending() const noexcept { return !links_.empty(); }

 private:
  static constexpr std::size_t most = 512;  ///< beyond 255 channels: nobody fills the process with silent connections

  Result<void> watch(int fd, std::uint32_t events, void* tag) noexcept {
    epoll_event event{.events = events, .data = {.ptr = tag}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return fail_errno(Stage::accept, "accept");
    return {};
  }

  Listener& listener_;
  const UniqueFd epoll_;
  std::list<FdTransport> links_;  // a list: epoll holds their addresses
};

}  // namespace detail

/// Waits until a source's main connection and `channels` channels are there.
///
/// Params: `channels`: 1 to 255.
/// Errors (stage accept): timed_out, whose op says what is missing, and whose detail how many channels came;
///   bad_channel_count; too_many_channels when one comes meanwhile; cancelled; errno.
inline Result<SourceLinks> accept_source(Listener& listener, SourceMagic magic, unsigned channels,
                                         const AcceptSourceOptions& options = {}) {
  if (channels < 1 || channels > detail::max_channel_count)
    return fail(Errc::bad_channel_count, Stage::accept, "accept", channels);
  for (const auto& [name, limit] : {std::pair("AcceptSourceOptions::first_timeout", options.first_timeout),
                                    std::pair("AcceptSourceOptions::timeout", options.timeout)})
    if (auto checked = check_time_limit(name, limit, Stage::accept); !checked) return std::unexpected(checked.error());
  const Interrupt* const interrupt = options.interrupt ? options.interrupt : listener.interrupt();
  detail::Newcomers newcomers(listener);
  if (auto started = newcomers.start(); !started) return std::unexpected(started.error());
  std::optional<FdTransport> main;
  std::vector<FdTransport> links;
  links.reserve(channels);
  detail::Clock::time_point deadline = detail::deadline_after(as_timeout(options.first_timeout));
  while (!main || links.size() < channels) {
    auto next = newcomers.next(deadline, interrupt);
    if (!next) {
      Error error = next.error();
      if (error.code == Errc::timed_out) {
        error.detail = links.size();
        error.op = !main && links.empty() ? "no source came"
                   : !main                ? "channels came, the main connection did not"
                   : links.empty() ? "the main connection came, but no channel: is multifd switched on at the source?"
                                   : "fewer channels came than expected: do both sides use the same number?";
      }
      return std::unexpected(error);
    }
    auto& [link, first] = *next;
    const bool is_first = !main && links.empty();
    if (first == magic.main && !main) {
      main = std::move(link);
    } else if (first == magic.channel && links.size() < channels) {
      links.push_back(std::move(link));
    } else if (first == magic.channel) {
      return fail(Errc::too_many_channels, Stage::accept, "accept", links.size() + 1);
    } else {
      // A source's connection that breaks before its first bytes looks like a stranger's. The others are there at once,
      // so nobody is kept waiting for one that will not come.
      const bool broken = !first && (main || !links.empty());
      if (broken) deadline = std::min(deadline, detail::deadline_after(std::chrono::seconds(2)));
      if (options.on_stranger) options.on_stranger(first.value_or(0));
      continue;
    }
    if (is_first) deadline = detail::deadline_after(as_timeout(options.timeout));
  }
  // Who has connected by now and not spoken yet may be a channel too many, whose pages would be missed.
  for (const auto soon = detail::deadline_after(std::chrono::milliseconds(200)); newcomers.pending();) {
    auto next = newcomers.next(soon, interrupt);
    if (!next && next.error().code == Errc::timed_out) break;
    if (!next) return std::unexpected(next.error());
    if (next->second == magic.channel) return fail(Errc::too_many_channels, Stage::accept, "accept", links.size() + 1);
    if (options.on_stranger) options.on_stranger(next->second.value_or(0));
  }
  return SourceLinks{std::move(*main), std::move(links)};
}

/// Looks, for at most 200 ms, whether a source has opened more channels than were expected: pages would be missing that
/// travel on them. A source has connected all of them before its first epoch ends. Closes strangers.
///
/// Errors: too_many_channels; errno.
inline Result<void> refuse_more_channels(Listener& listener, SourceMagic magic,
                                         const AcceptSourceOptions& options = {}) {
  const Interrupt* const interrupt = options.interrupt ? options.interrupt : listener.interrupt();
  // Strangers share the time and have a number, so that they cannot hold up a migration.
  const detail::Clock::time_point deadline = detail::deadline_after(std::chrono::milliseconds(200));
  for (unsigned looked_at = 0; looked_at < 512; ++looked_at) {
    auto link = listener.accept(std::chrono::milliseconds(0), interrupt);
    if (!link && link.error().code == Errc::timed_out) return {};
    if (!link) return std::unexpected(link.error());
    // A channel says hello as soon as it is connected; closing one that is late fails its source, too.
    const auto first = peek_magic(*link, std::chrono::milliseconds(detail::poll_timeout(deadline)), interrupt);
    if (first && *first == magic.channel) return fail(Errc::too_many_channels, Stage::accept, "accept");
    if (options.on_stranger) options.on_stranger(first ? *first : 0);
  }
  return {};
}

}  // namespace multifd
