// SPDX-License-Identifier: MIT
//
// The connections of one migration source at one address: a main connection and its channels, in any order, told apart
// by their first four bytes, which stay there to be read (format/README.md section 1.2). No order is needed: a
// connection that sends nothing, or something else, delays no other. When a source gives up and comes again, only the
// connections of its last try are taken.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/format/constants.hpp"
#include "multifd/limits.hpp"
#include "multifd/qemu/source_set.hpp"
#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd {

/// The connections of one source. `T`: their transport, the acceptor's `Link`.
template <class T = FdTransport>
struct SourceLinks {
  T main;
  std::vector<T> channels;  ///< in the order in which they came; the hello has a channel's id
};

/// Settings of accept_source(). Most callers set the hooks, for their log, and leave the rest alone. Time limits: 0 is
/// none (time_limit.hpp).
struct AcceptSourceOptions {
  // ---- Time limits

  /// How long to wait for a source's first connection. Default: no limit, because an operator starts the source.
  std::chrono::milliseconds first_timeout{0};
  /// From the first connection until all are there. Shorter reports a source with fewer channels sooner; a slow link
  /// with many channels needs longer.
  std::chrono::milliseconds timeout{10'000};
  /// After a source's connections have ended ahead of time, until its next try begins. Short, because whoever started
  /// the source has seen it fail. Set 0, or minutes, where sources are restarted by hand.
  std::chrono::milliseconds retry_timeout{3'000};

  // ---- Hooks

  /// Ends the wait from outside. Null: the listener's Interrupt does. Not owned.
  const Interrupt* interrupt = nullptr;
  /// Called for each connection that is no source's, or another source's, before it is closed. `first_bytes`: its first
  /// four bytes, big-endian; 0 if it sent fewer.
  std::function<void(std::uint32_t first_bytes)> on_stranger{};
  /// Called when connections of a source have ended ahead of time and are dropped; `connections`: how many.
  std::function<void(std::size_t connections)> on_dropped{};
};

namespace detail {

/// The first part of accept_source(): until all connections have come.
template <class A>
[[nodiscard]] Result<SourceLinks<typename A::Link>> collect_source(A& acceptor, unsigned channels,
                                                                   const AcceptSourceOptions& options) {
  using Link = typename A::Link;
  SourceSet<Link> set(channels);
  Clock::time_point deadline = deadline_after(as_timeout(options.first_timeout));
  bool gave_up = false;               // connections of a source have ended; the deadline is retry_timeout's then
  std::optional<std::uint64_t> last;  // the number of the last one that was closed for it
  for (;;) {
    const auto ended = set.drop_ended();
    last = std::max(last, ended.last);
    if (ended.dropped > 0 && options.on_dropped) options.on_dropped(ended.dropped);
    if ((ended.dropped > 0 || ended.others) && !gave_up) {
      // A source makes all its connections before it ends one. So the missing ones wait already, or never come.
      gave_up = true;
      deadline = deadline_after(as_timeout(options.retry_timeout));
    }
    if (set.whole()) {
      auto [main, links] = set.take();
      return SourceLinks<Link>{std::move(main), std::move(links)};
    }
    auto next = acceptor.next(deadline, options.interrupt);
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
      if (auto watched = acceptor.watch_end(arrival.link); !watched) return std::unexpected(watched.error());
      using Added = SourceSet<Link>::Added;
      const bool is_main = arrival.magic == wire::main_stream_magic;
      // A source connects its main connection first: one that was accepted ahead of a connection that has ended is of the
      // same try, though it speaks only now.
      const bool of_next_try = is_main && (!last || arrival.number > *last);
      const Added added = is_main ? set.add_main(std::move(arrival)) : set.add_channel(std::move(arrival));
      if (added == Added::too_many) return fail(Errc::too_many_channels, Stage::accept, "accept", set.channels() + 1);
      if (added == Added::not_at_all) {
        if (options.on_stranger) options.on_stranger(is_main ? wire::main_stream_magic : wire::magic);
      } else if (gave_up ? of_next_try : added == Added::as_first) {
        gave_up = false;  // a try begins
        deadline = deadline_after(as_timeout(options.timeout));
      } else if (gave_up) {
        // The first of the next try, or the rest of the one before. The next main connection decides, within this
        // limit.
        deadline = deadline_after(as_timeout(options.retry_timeout));
      }
    } else {
      // A connection that sends nothing, as a port scan's, says nothing about the source either.
      if (options.on_stranger) options.on_stranger(arrival.magic.value_or(0));
    }
  }
}

}  // namespace detail

/// Waits until a source's main connection and `channels` channels are there, at an acceptor of the caller's: with a
/// TlsAcceptor (transport/tls_acceptor.hpp) a connection that speaks no TLS, or is not trusted, is closed and does no
/// harm.
///
/// Connections that have ended are dropped. A second main connection, or a channel id that is there already, is another
/// try of the source, which takes the place of the one before. Residual risk: of two tries that are both open (a host
/// that went without a word), a channel may be taken for the other's; the migration fails then.
///
/// Params: `channels`: 0 to max_channels; 0: a source without multifd, of which a channel is one too many. `acceptor`: keeps the connections that have sent nothing; its destructor
///   closes them.
/// Errors (stage accept): bad_option (a negative time limit); timed_out, whose op says what is missing, and whose
///   detail how many channels came; peer_closed when a source came and gave up, and no other in retry_timeout;
///   bad_channel_count; ENOMEM; too_many_channels when one more comes meanwhile that is not, by the uuid or the id in its
///   hello, another source's; cancelled; errno. Under TLS no hello can be seen ahead of its reader: a channel more than
///   expected is found only if it comes before the main connection.
/// Threads: one for an acceptor.
/// Cost: the acceptor's, for each connection, and an allocation for each that may be the source's.
template <Acceptor A>
[[nodiscard]] Result<SourceLinks<typename A::Link>> accept_source(A& acceptor, unsigned channels,
                                                                  const AcceptSourceOptions& options = {}) {
  if (channels > max_channels) return fail(Errc::bad_channel_count, Stage::accept, "accept", channels);
  for (const auto& [name, limit] : {std::pair("AcceptSourceOptions::first_timeout", options.first_timeout),
                                    std::pair("AcceptSourceOptions::timeout", options.timeout),
                                    std::pair("AcceptSourceOptions::retry_timeout", options.retry_timeout)})
    if (auto checked = check_time_limit(name, limit, Stage::accept); !checked) return std::unexpected(checked.error());
  auto source =
      catch_bad_alloc(Stage::accept, "accept", [&] { return detail::collect_source(acceptor, channels, options); });
  if (!source) return source;
  const bool secured = [&] {
    if constexpr (requires { source->main.secured(); }) return source->main.secured();
    return false;
  }();
  if (!secured) {
    // Who has connected by now and not spoken yet may be a channel too many, whose pages would be missed.
    for (const auto soon = deadline_after(std::chrono::milliseconds(200)); acceptor.pending();) {
      auto next = acceptor.next(soon, options.interrupt);
      if (!next && next.error().code == Errc::timed_out) break;
      if (!next) return std::unexpected(next.error());
      if (!*next) continue;  // what becomes of the source's own connections, their readers learn
      const bool of_another = std::ranges::any_of(
          source->channels, [&](const auto& channel) { return are_of_two_sources(channel, (*next)->link); });
      if ((*next)->magic == wire::magic && !of_another)
        return fail(Errc::too_many_channels, Stage::accept, "accept", channels + 1);
      if (options.on_stranger) options.on_stranger((*next)->magic.value_or(0));
    }
  }
  return source;
}

/// The same for connections without TLS, with an acceptor of its own. Errors, Cost: the same, and those of
/// PlainAcceptor::open().
[[nodiscard]] inline Result<SourceLinks<>> accept_source(Listener& listener, unsigned channels,
                                                         const AcceptSourceOptions& options = {}) {
  auto acceptor = PlainAcceptor::open(listener);
  if (!acceptor) return std::unexpected(acceptor.error());
  return accept_source(*acceptor, channels, options);
}

}  // namespace multifd
