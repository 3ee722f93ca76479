// SPDX-License-Identifier: MIT
//
// The connections of one migration source at one address: a main connection and its channels, in any order, told apart
// by their first four bytes, which stay there to be read (format/README.md section 1.2). Nobody has to speak in turn: a
// connection that says nothing, or something else, keeps no other waiting. A source that gives up and comes again is
// taken with the connections of its last try, and no others.
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

#include "multifd/format/constants.hpp"
#include "multifd/limits.hpp"
#include "multifd/qemu/detail/source_set.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd {

struct SourceLinks {
  FdTransport main;
  std::vector<FdTransport> channels;  ///< in the order in which they came: which one is which, its hello says
};

/// Time limits: 0 is none (time_limit.hpp).
struct AcceptSourceOptions {
  std::chrono::milliseconds first_timeout{0};  ///< until the first connection of a source is there
  std::chrono::milliseconds timeout{10'000};   ///< from then until all are
  /// After connections of a source have ended ahead of time, until its next try has begun: who has started it knows that
  /// it failed, so that nobody is served by a longer wait. 0: for who restarts sources by hand.
  std::chrono::milliseconds retry_timeout{3'000};
  const Interrupt* interrupt = nullptr;  ///< null: that of the listener
  /// Told of each connection that is neither, or another source's, with its first bytes (0: it said too little); it is
  /// closed then.
  std::function<void(std::uint32_t first_bytes)> on_stranger{};
  /// Told when connections of a source have ended ahead of time and are dropped.
  std::function<void(std::size_t connections)> on_dropped{};
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

  /// Waits for the next connection that says four bytes, or ends before; none: one that is watched has ended.
  /// Errors: timed_out, cancelled, errno.
  Result<std::optional<Arrival<FdTransport>>> next(Clock::time_point deadline, const Interrupt* interrupt) {
    for (;;) {
      if (auto waited = wait_for(epoll_.get(), POLLIN, deadline, interrupt, Stage::accept, "accept"); !waited)
        return std::unexpected(waited.error());
      epoll_event event{};
      if (::epoll_wait(epoll_.get(), &event, 1, 0) != 1) continue;
      if (event.data.ptr == this) return std::nullopt;
      if (event.data.ptr == nullptr) {
        auto link = listener_.accept(std::chrono::milliseconds(0), interrupt);
        if (!link && link.error().code == Errc::timed_out) continue;  // it has gone again
        if (!link) return std::unexpected(link.error());
        if (links_.size() == most) links_.pop_front();  // the one that has been silent for longest
        links_.push_back({std::move(*link), ++accepted_});
        // Edge-triggered: bytes that are only looked at would keep the descriptor ready for good.
        const auto watched = watch(links_.back().link.native_handle(), EPOLLIN | EPOLLRDHUP | EPOLLET, &links_.back());
        if (!watched) return std::unexpected(watched.error());
        continue;
      }
      void* const which = event.data.ptr;  // a copy: epoll_event is packed, and a reference would not be aligned
      const auto at = std::ranges::find(links_, which, [](Arrival<FdTransport>& each) -> void* { return &each; });
      if (at == links_.end()) continue;
      const FirstBytes first = look_at_first_bytes(at->link.native_handle());
      const bool ended = first.count == 0 || (event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
      if (first.count < 4 && !ended) continue;  // more to come
      Arrival<FdTransport> arrival = std::move(*at);
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, arrival.link.native_handle(), nullptr);
      links_.erase(at);
      if (first.count == 4) arrival.magic = first.magic;
      return arrival;
    }
  }

  /// Lets next() return when a connection that it has returned ends, once, as long as that is open.
  ///
  /// Params: `also`: more events of epoll that next() returns for: EPOLLIN, when more bytes have come.
  template <class Link>
  Result<void> watch_end(const Link& link, std::uint32_t also = 0) noexcept {
    return watch(link.native_handle(), also | EPOLLRDHUP | EPOLLET, this);
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
  std::list<Arrival<FdTransport>> links_;  // a list: epoll holds their addresses
  std::uint64_t accepted_ = 0;
};

/// accept_source() over a `door` that lets connections in: Newcomers, or another with the same next() and watch_end().
template <class Link, class Door>
Result<std::pair<Link, std::vector<Link>>> collect_source(Door& door, unsigned channels,
                                                          const AcceptSourceOptions& options,
                                                          const Interrupt* interrupt) {
  SourceSet<Link> set(channels);
  Clock::time_point deadline = deadline_after(as_timeout(options.first_timeout));
  bool gave_up = false;  // connections of a source have ended; the deadline is retry_timeout's then
  for (;;) {
    const auto ended = set.drop_ended();
    if (ended.dropped > 0 && options.on_dropped) options.on_dropped(ended.dropped);
    if ((ended.dropped > 0 || ended.others) && !gave_up) {
      // A source has connected everything before it ends anything, so that what is missing now is there at once.
      gave_up = true;
      deadline = deadline_after(as_timeout(options.retry_timeout));
    }
    if (set.whole()) return set.take();
    auto next = door.next(deadline, interrupt);
    if (!next) {
      Error error = next.error();
      if (error.code != Errc::timed_out) return std::unexpected(error);
      error.detail = set.channels();
      if (gave_up) error.code = Errc::peer_closed;
      error.op = gave_up            ? "a source came, and gave up before all its connections were there"
                 : set.size() == 0  ? "no source came"
                 : !set.has_main()  ? "channels came, the main connection did not"
                 : set.size() == 1u ? "the main connection came, but no channel: is multifd switched on at the source?"
                                    : "fewer channels came than expected: do both sides use the same number?";
      return std::unexpected(error);
    }
    if (!*next) continue;
    Arrival<Link>& arrival = **next;
    if (arrival.magic == wire::main_stream_magic || arrival.magic == wire::magic) {
      if (auto watched = door.watch_end(arrival.link); !watched) return std::unexpected(watched.error());
      using Added = SourceSet<Link>::Added;
      const bool is_main = arrival.magic == wire::main_stream_magic;
      const Added added = is_main ? set.add_main(std::move(arrival)) : set.add_channel(std::move(arrival));
      if (added == Added::too_many) return fail(Errc::too_many_channels, Stage::accept, "accept", set.channels() + 1);
      if (added == Added::not_at_all) {
        if (options.on_stranger) options.on_stranger(is_main ? wire::main_stream_magic : wire::magic);
      } else if (gave_up ? is_main : added == Added::as_first) {
        gave_up = false;  // a try begins
        deadline = deadline_after(as_timeout(options.timeout));
      } else if (gave_up) {
        // The next try's first, or the rest of the one before: its main connection tells, and has as long for it.
        deadline = deadline_after(as_timeout(options.retry_timeout));
      }
    } else {
      // Who says nothing, as a port scan, says nothing about the source either.
      if (options.on_stranger) options.on_stranger(arrival.magic.value_or(0));
    }
  }
}

}  // namespace detail

/// Waits until a source's main connection and `channels` channels are there.
///
/// Connections that have ended are dropped. A second main connection, or a channel id that is there already, is another
/// try of the source, which takes the place of the one before. Residual risk: of two tries that are both open (a host
/// that went without a word), a channel may be taken for the other's; the migration fails then.
///
/// Params: `channels`: 1 to 255.
/// Errors (stage accept): bad_option (a negative time limit); timed_out, whose op says what is missing, and whose detail how many channels came;
///   peer_closed when a source came and gave up, and no other in retry_timeout; bad_channel_count; too_many_channels when one more
///   comes meanwhile that is not, by the uuid or the id in its hello, another source's; cancelled; errno.
inline Result<SourceLinks> accept_source(Listener& listener, unsigned channels,
                                         const AcceptSourceOptions& options = {}) {
  if (channels < 1 || channels > max_channels) return fail(Errc::bad_channel_count, Stage::accept, "accept", channels);
  for (const auto& [name, limit] : {std::pair("AcceptSourceOptions::first_timeout", options.first_timeout),
                                    std::pair("AcceptSourceOptions::timeout", options.timeout),
                                    std::pair("AcceptSourceOptions::retry_timeout", options.retry_timeout)})
    if (auto checked = check_time_limit(name, limit, Stage::accept); !checked) return std::unexpected(checked.error());
  const Interrupt* const interrupt = options.interrupt ? options.interrupt : listener.interrupt();
  detail::Newcomers newcomers(listener);
  if (auto started = newcomers.start(); !started) return std::unexpected(started.error());
  auto source = detail::collect_source<FdTransport>(newcomers, channels, options, interrupt);
  if (!source) return std::unexpected(source.error());
  // Who has connected by now and not spoken yet may be a channel too many, whose pages would be missed.
  for (const auto soon = detail::deadline_after(std::chrono::milliseconds(200)); newcomers.pending();) {
    auto next = newcomers.next(soon, interrupt);
    if (!next && next.error().code == Errc::timed_out) break;
    if (!next) return std::unexpected(next.error());
    if (!*next) continue;  // what becomes of the source's own connections, their readers learn
    const bool of_another = std::ranges::any_of(
        source->second, [&](const FdTransport& channel) { return detail::are_of_two_sources(channel, (*next)->link); });
    if ((*next)->magic == wire::magic && !of_another)
      return fail(Errc::too_many_channels, Stage::accept, "accept", channels + 1);
    if (options.on_stranger) options.on_stranger((*next)->magic.value_or(0));
  }
  return SourceLinks{std::move(source->first), std::move(source->second)};
}

}  // namespace multifd
