// SPDX-License-Identifier: MIT
//
// The connections of one try of a source to migrate, while they come in. Tries follow each other at one address: the
// connections of a try that has failed must neither delay the next try nor be joined to it.
#pragma once

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/format/constants.hpp"
#include "multifd/transport/acceptor.hpp"

namespace multifd {

/// A channel's hello up to its id, if it can be peeked: not under TLS, and not before it has come.
template <class Link>
std::optional<std::array<std::byte, wire::init_packet_id_offset + 1>> look_at_hello(const Link& link) noexcept {
  if constexpr (requires { link.secured(); })
    if (link.secured()) return std::nullopt;
  std::array<std::byte, wire::init_packet_id_offset + 1> hello;
  if (::recv(link.native_handle(), hello.data(), hello.size(), MSG_PEEK | MSG_DONTWAIT) != ssize_t{hello.size()})
    return std::nullopt;
  return hello;
}

/// The id in a channel's hello. None as look_at_hello().
template <class Link>
std::optional<std::byte> look_at_channel_id(const Link& link) noexcept {
  const auto hello = look_at_hello(link);
  if (!hello) return std::nullopt;
  return hello->back();
}

/// The uuid in a channel's hello. None as look_at_hello().
template <class Link>
std::optional<std::array<std::byte, 16>> look_at_channel_uuid(const Link& link) noexcept {
  const auto hello = look_at_hello(link);
  if (!hello) return std::nullopt;
  std::array<std::byte, 16> uuid;
  std::copy_n(hello->begin() + wire::init_packet_uuid_offset, uuid.size(), uuid.begin());
  return uuid;
}

/// Whether two channels belong, by their hellos, to different sources, or to different tries of one source: they have
/// the same id, or different uuids. False also where a hello cannot be peeked.
template <class Link>
bool are_of_two_sources(const Link& one, const Link& other) noexcept {
  const auto id = look_at_channel_id(one);
  const auto its_id = look_at_channel_id(other);
  return id && its_id && (*id == *its_id || look_at_channel_uuid(one) != look_at_channel_uuid(other));
}

/// What accept_source() collects by, for a program whose main connection has a format of its own: the program's Acceptor
/// brings the connections, the set says which of them belong together.
///
/// Threads: one.
template <class Link>
class SourceSet {
 public:
  enum class Added {
    as_first,    ///< the first connection of a try
    to_others,   ///< a further connection of a try that has begun
    not_at_all,  ///< another source's connection, or an older try's
    too_many,
  };

  /// Params `channels`: how many there will be at the most.
  explicit SourceSet(unsigned channels) : channels_(channels) { members_.reserve(channels + 1); }

  bool whole() const noexcept { return has_main() && channels() == channels_; }
  bool has_main() const noexcept {
    return std::ranges::any_of(members_, [](const Member& each) { return each.is_main; });
  }
  std::size_t channels() const noexcept { return members_.size() - (has_main() ? 1 : 0); }
  std::size_t size() const noexcept { return members_.size(); }

  /// Adds a main connection. A second one begins another try. A source connects it first (section 1.2), whichever of
  /// its connections sends first: connections that were accepted before it belong to the try before. So does a main
  /// connection that was accepted before the present one and sends only now, as under TLS; it is closed.
  Added add_main(Arrival<Link> arrival) {
    if (std::ranges::any_of(members_, [&](const Member& each) { return each.is_main && each.number > arrival.number; }))
      return Added::not_at_all;
    const Added added = has_main() || newer_ || members_.empty() ? Added::as_first : Added::to_others;
    if (has_main() || newer_) {
      const std::uint64_t first = has_main() ? arrival.number : std::min(arrival.number, *newer_);
      drop([&](const Member& each) { return each.number < first; });
      newer_.reset();
    }
    members_.push_back({std::move(arrival.link), arrival.number, true});
    return added;
  }

  /// Adds a channel. A repeated id begins another try: connections that were accepted up to the old owner of that id
  /// belong to the try before. Connections in between may belong to either, until the new main connection comes. A
  /// channel too many is not added, and is closed if it is another source's.
  [[nodiscard]] Added add_channel(Arrival<Link> arrival) {
    Added added = members_.empty() ? Added::as_first : Added::to_others;
    if (const auto id = look_at_channel_id(arrival.link)) {
      const auto same = std::ranges::find_if(
          members_, [&](const Member& each) { return !each.is_main && look_at_channel_id(each.link) == id; });
      if (same != members_.end()) {
        drop([last = same->number](const Member& each) { return each.number <= last; });
        newer_ = std::min(newer_.value_or(arrival.number), arrival.number);
        added = Added::as_first;
      }
    }
    if (channels() == channels_) {
      const bool of_another = std::ranges::any_of(
          members_, [&](const Member& each) { return !each.is_main && are_of_two_sources(each.link, arrival.link); });
      return of_another ? Added::not_at_all : Added::too_many;
    }
    members_.push_back({std::move(arrival.link), arrival.number, false});
    return added;
  }

  /// The main connection. Null: it has not come.
  Link* main() noexcept {
    const auto at = std::ranges::find_if(members_, [](const Member& each) { return each.is_main; });
    return at == members_.end() ? nullptr : &at->link;
  }
  /// Takes the main connection out of the set.
  std::optional<Link> take_main() {
    Link* const there = main();
    if (there == nullptr) return std::nullopt;
    std::optional<Link> taken(std::move(*there));
    drop([](const Member& each) { return each.is_main; });
    return taken;
  }
  /// Closes the channels that were accepted ahead of the main connection; returns how many.
  std::size_t drop_before_main() {
    const auto at = std::ranges::find_if(members_, [](const Member& each) { return each.is_main; });
    if (at == members_.end()) return 0;
    return drop([first = at->number](const Member& each) { return each.number < first; });
  }
  /// Closes the channels for which `which(link)` is true; returns how many.
  template <class Which>
  std::size_t drop_channels(Which&& which) {
    return drop([&](const Member& each) { return !each.is_main && which(each.link); });
  }

  struct Ended {
    std::size_t dropped = 0;              ///< how many were closed
    std::optional<std::uint64_t> last{};  ///< of those, the number of the last one that was accepted
    bool others = false;  ///< others have ended, but may be whole: a small guest is done before all are accepted
  };
  /// Drops the connections that have ended and sent nothing of use.
  Ended drop_ended() {
    Ended ended;
    ended.dropped = drop([&](const Member& each) {
      pollfd entry{.fd = each.link.native_handle(), .events = POLLRDHUP, .revents = 0};
      if (::poll(&entry, 1, 0) != 1) return false;
      int unread = 0;
      const bool readable = ::ioctl(entry.fd, FIONREAD, &unread) == 0 && unread > most_useless_bytes;
      const bool over = (entry.revents & POLLERR) != 0 || !readable;
      ended.others = ended.others || !over;
      if (over) ended.last = std::max(ended.last.value_or(0), each.number);
      return over;
    });
    return ended;
  }

  /// Takes the main connection and the channels out of the set. Contract: has_main().
  std::pair<Link, std::vector<Link>> take() {
    std::optional<Link> main;
    std::vector<Link> links;
    links.reserve(channels());
    for (Member& each : members_)
      if (each.is_main)
        main = std::move(each.link);
      else
        links.push_back(std::move(each.link));
    members_.clear();
    return {std::move(*main), std::move(links)};
  }

 private:
  struct Member {
    Link link;
    std::uint64_t number;
    bool is_main;
  };

  /// More than a hello, which has 64 bytes, and less than a packet's header (384 at least) and every main stream.
  static constexpr int most_useless_bytes = 128;

  template <class Which>
  std::size_t drop(Which&& which) {
    return std::erase_if(members_, which);
  }

  const std::size_t channels_;
  std::vector<Member> members_;         ///< in the order in which their first bytes came
  std::optional<std::uint64_t> newer_;  ///< the first connection of the new try, while some of the old one may remain
};

}  // namespace multifd
