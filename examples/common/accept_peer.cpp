// SPDX-License-Identifier: MIT
#include "common/accept_peer.hpp"

#include <fmt/format.h>
#include <sys/socket.h>
#include <multifd/qemu/accept_source.hpp>
#include <multifd/qemu/source_set.hpp>
#include <multifd/transport/acceptor.hpp>

#include <array>
#include <atomic>
#include <optional>
#include <thread>

#include "common/limits.hpp"
#include "common/progress.hpp"
#include "common/tell.hpp"
#include "common/tls.hpp"
#include "common/uuid.hpp"

namespace program {
namespace {

using namespace std::chrono_literals;
using multifd::deadline_after;
using multifd::Errc;
using multifd::Result;
namespace wire = multifd::wire;

using Clock = std::chrono::steady_clock;
using Arrival = multifd::Arrival<Link>;

/// The beginning of a main connection, read as its bytes come, so that a slow one delays no other.
class HelloReader {
 public:
  /// Returns the hello when it is whole. Throws Failure when the bytes are no hello, or the connection has ended.
  std::optional<nlohmann::json> read(Link& link) {
    while (said_.size() < wanted_) {
      std::array<std::byte, 4096> room;
      // No read goes beyond a part: under TLS a read that waits for the rest of a part would lose the bytes it has.
      const std::size_t part = said_.size() < magic ? magic : wanted_;
      const iovec buffer = multifd::mutable_buffer(std::span(room).first(std::min(room.size(), part - said_.size())));
      const std::size_t got = need(link.read_now(std::span(&buffer, 1)), "main connection");
      if (got == 0) return std::nullopt;
      said_.insert(said_.end(), room.begin(), room.begin() + static_cast<std::ptrdiff_t>(got));
      if (said_.size() == header) {
        const auto type = static_cast<MessageType>(said_[magic]);
        const auto size = wire::load_be<std::uint32_t>(&said_[magic + 1]);
        if ((type != MessageType::hello && type != MessageType::failed) || size > small_message)
          throw Failure("main connection: begins with something else than a hello");
        wanted_ += size;
      }
    }
    Message message{.type = static_cast<MessageType>(said_[magic]), .payload = {said_.begin() + header, said_.end()}};
    if (message.type == MessageType::failed) throw message.failure();
    return message.json();
  }

 private:
  static constexpr std::size_t magic = 4;
  static constexpr std::size_t header = magic + message_header_bytes;
  std::vector<std::byte> said_;
  std::size_t wanted_ = header;
};

/// Whether the source's next message on its main connection is `failed`. Throws Failure when the source has gone.
bool says_failed(Link& link) {
  if (link.secured()) {
    const auto first = peek_magic(link, 0ms);
    if (!first && first.error().code != Errc::timed_out) throw Failure(first.error(), "main connection");
    return first && static_cast<MessageType>(*first >> 24) == MessageType::failed;
  }
  std::byte type{};
  const ssize_t got = ::recv(link.native_handle(), &type, 1, MSG_PEEK | MSG_DONTWAIT);
  if (got < 0 && errno != EAGAIN && errno != EINTR)
    throw Failure(multifd::fail_errno(multifd::Stage::read, "").error(), "main connection");
  if (got == 0) throw Failure(multifd::Error{.code = Errc::peer_closed}, "main connection");
  return got == 1 && static_cast<MessageType>(type) == MessageType::failed;
}

template <multifd::Acceptor Acceptor>
class Setup {
 public:
  Setup(Acceptor& acceptor, unsigned channels, const multifd::Interrupt& interrupt, const TimeLimits& limits)
      : acceptor_(acceptor), insisted_(channels), interrupt_(interrupt), limits_(limits) {}

  /// Announced and accepted channels. Threads: any.
  std::pair<std::size_t, std::size_t> counts() const noexcept { return {announced_, came_}; }

  Accepted run() {
    try {
      for (;;) {
        look_at_main();  // first, because a source that has ended may have sent its reason
        drop_ended();
        came_ = set_.channels();
        if (whole()) return take();
        const auto limit = std::min(deadline_, hello_ ? Clock::time_point::max() : hello_deadline_);
        // epoll does not report bytes that TLS has read from the socket already.
        const bool look_again = set_.has_main() && set_.main()->secured();
        auto next = acceptor_.next(look_again ? std::min(limit, Clock::now() + 50ms) : limit, &interrupt_);
        if (!next && next.error().code == Errc::timed_out && Clock::now() < limit) continue;
        if (!next && next.error().code == Errc::timed_out) {
          time_out(next.error());
        } else if (!next && multifd::is_limit(next.error().code) && !set_.has_main() &&
                   Clock::now() < limit_deadline()) {
          // The source's main connection may be among those that have sent nothing yet: tell it the reason.
          std::this_thread::sleep_for(10ms);
        } else if (!next) {
          throw Failure(next.error(), waiting());
        } else if (*next) {
          take_in({std::move((*next)->link), (*next)->number, (*next)->magic});
        }
      }
    } catch (const std::exception& error) {
      if (auto main = set_.take_main()) Control::adopt(std::move(*main), interrupt_, limits_).send_failed(error.what());
      throw;
    }
  }

 private:
  void take_in(Arrival arrival) {
    const bool is_main = arrival.magic == control_magic;
    // A channel of a source that has given up since: the main connection has the reason.
    if (!arrival.magic && (set_.has_main() || gave_up_)) return;
    if (!is_main && arrival.magic != wire::magic) {
      const bool is_tls = arrival.magic && *arrival.magic >> 16 == 0x1603 && !arrival.link.secured();
      tell("closed a connection that is neither a main connection nor a channel{}\n",
           is_tls ? ": it speaks TLS, which is off here (--tls-dir, --tls-psk)" : "");
      return;
    }
    need(acceptor_.watch_end(arrival.link, is_main ? std::uint32_t{EPOLLIN} : 0u), waiting());
    // Under TLS a connection of the try before can be through its handshake after those of the next one.
    if (set_.has_main() && arrival.number < main_number_ && (is_main || arrival.link.secured())) {
      tell_other_try();
      return;
    }
    if (is_main) {
      main_number_ = arrival.number;
      (void)set_.add_main(std::move(arrival));
      reader_ = {};
      hello_.reset();
      announced_ = 0;
      hello_deadline_ = deadline_after(multifd::as_timeout(limits_.hello));
    } else if (const auto added = set_.add_channel(std::move(arrival)); added == Set::Added::not_at_all) {
      tell_other_try();
    } else if (added == Set::Added::too_many) {
      throw Failure(multifd::fail(Errc::too_many_channels, multifd::Stage::accept, "accept").error(), waiting());
    }
    // A try begins. After a failed try a channel may be left from that one.
    if (gave_up_ ? is_main : is_main || set_.size() == 1) {
      gave_up_.reset();
      deadline_ = deadline_after(multifd::as_timeout(limits_.accept));
    }
  }

  void look_at_main() {
    if (!set_.has_main()) return;
    try {
      if (!hello_ && (hello_ = reader_.read(*set_.main()))) take_hello();
      if (hello_ && says_failed(*set_.main()))
        (void)Control::adopt(*set_.take_main(), interrupt_, limits_).receive(small_message, {.time = 1s});
    } catch (const Failure& failure) {
      // Settings that do not fit are reported at both ends, and end this side, too. A source that has gone may come
      // again.
      if (!failure.from_peer() && !failure.may_be_echo() && failure.code() != multifd::Condition::timed_out) throw;
      (void)set_.take_main();
      lost(failure);
    }
  }

  void take_hello() {
    const auto announced = field<unsigned>(*hello_, "channels");
    if (announced < 1 || announced > multifd::max_channels)
      throw Failure(fmt::format("the source announces {} channels; 1 to 255 are possible", announced));
    if (insisted_ != 0 && announced != insisted_)
      throw Failure(fmt::format("the source sends over {} channels, --channels here says {}", announced, insisted_));
    uuid_ = {};
    if (hello_->contains("uuid")) {
      const auto uuid = parse_uuid(field<std::string>(*hello_, "uuid"));
      if (!uuid) throw Failure("main connection: the source's \"uuid\" is not 32 hexadecimal digits");
      uuid_ = {.kind = multifd::UuidCheck::Kind::exact, .uuid = *uuid};
    }
    // Under TLS a channel's uuid cannot be peeked. But there a source's main connection has made its handshake, and so
    // was accepted, before its channels connect.
    if (set_.main()->secured() && set_.drop_before_main() > 0) tell_other_try();
    tell_of_smaller_backlog(announced + 1);
    need_descriptors(announced - std::min<std::size_t>(announced, set_.channels()));
    announced_ = announced;
  }

  void drop_ended() {
    const bool had_hello = set_.has_main() && hello_;
    const std::size_t dropped = set_.drop_ended().dropped;
    if (dropped == 0) return;
    if (had_hello && !set_.has_main()) {
      lost(Failure(multifd::Error{.code = Errc::peer_closed}, "main connection"));
    } else {
      tell_dropped();
    }
    if (set_.size() == 0 && !gave_up_) deadline_ = Clock::time_point::max();  // no source has come yet
  }

  void tell_dropped() { tell("closed a connection that ended before a source's connections were all there\n"); }

  void tell_other_try() { tell("closed a connection that is another try's, or another source's, channel\n"); }

  void lost(const Failure& failure) {
    tell_dropped();
    const bool said_hello = hello_.has_value();
    hello_.reset();
    announced_ = 0;
    if (said_hello || failure.from_peer()) {
      gave_up_ = failure;
      deadline_ = std::min(deadline_, deadline_after(multifd::AcceptSourceOptions{}.retry_timeout));
    } else if (set_.size() == 0) {
      deadline_ = Clock::time_point::max();
    }
  }

  bool whole() {
    if (!set_.has_main() || !hello_) return false;
    if (uuid_.kind == multifd::UuidCheck::Kind::exact) {
      const std::size_t others = set_.drop_channels([&](const Link& link) {
        const auto uuid = multifd::look_at_channel_uuid(link);
        return uuid && *uuid != uuid_.uuid;
      });
      if (others > 0) tell_other_try();
    }
    came_ = set_.channels();
    if (came_ > announced_)
      throw Failure(fmt::format("the source announces {} channels, {} came", announced_.load(), came_.load()));
    return came_ == announced_;
  }

  Accepted take() {
    auto [main, channels] = set_.take();
    return {Control::adopt(std::move(main), interrupt_, limits_), std::move(*hello_), std::move(channels), uuid_};
  }

  void time_out(const multifd::Error& error) {
    if (set_.has_main() && !hello_ && Clock::now() >= hello_deadline_) {
      (void)set_.take_main();
      tell("closed a connection: a main connection that has not said its hello in time (--hello-timeout)\n");
      if (set_.size() == 0 && !gave_up_) deadline_ = Clock::time_point::max();
      return;
    }
    if (gave_up_) throw Failure(*gave_up_);
    throw Failure(error, waiting());
  }

  /// A moment after the first call.
  Clock::time_point limit_deadline() {
    if (!limit_deadline_) limit_deadline_ = deadline_after(1s);
    return *limit_deadline_;
  }

  std::string waiting() const {
    if (hello_) return fmt::format("waiting for {} channels, {} came", announced_.load(), set_.channels());
    return set_.has_main()        ? "waiting for a source's hello"
           : set_.channels() == 0 ? "waiting for a source"
                                  : "waiting for a source's main connection";
  }

  Acceptor& acceptor_;
  const unsigned insisted_;
  const multifd::Interrupt& interrupt_;
  const TimeLimits& limits_;
  using Set = multifd::SourceSet<Link>;
  Set set_{multifd::max_channels};
  std::uint64_t main_number_ = 0;  ///< the set's main connection, in the order in which connections were accepted
  HelloReader reader_;
  std::optional<nlohmann::json> hello_;  ///< of the set's main connection
  multifd::UuidCheck uuid_;
  std::optional<Failure> gave_up_;                         ///< the failure of a source that had sent its hello
  Clock::time_point deadline_ = Clock::time_point::max();  ///< none before the first connection
  Clock::time_point hello_deadline_ = Clock::time_point::max();
  std::optional<Clock::time_point> limit_deadline_;
  std::atomic<std::size_t> announced_ = 0;
  std::atomic<std::size_t> came_ = 0;
};

template <multifd::Acceptor Acceptor>
Accepted accept_at(Acceptor& acceptor, const std::string& address, unsigned channels,
                   const multifd::Interrupt& interrupt, const TimeLimits& limits) {
  Setup<Acceptor> setup(acceptor, channels, interrupt, limits);
  const Progress progress(
      [&]() -> Snapshot {
        const auto [announced, came] = setup.counts();
        if (announced == 0 && came == 0)
          return {.line = "waiting for a source on " + address,
                  .stalled =
                      "Nobody has connected: has the source been started, with an address that leads here, and "
                      "does no firewall stand between?"};
        return {.line = fmt::format("waiting for the source's connections: {} of {} channels", came,
                                    announced == 0 ? "some" : std::to_string(announced)),
                .moved = announced + came,
                .stalled =
                    "Is the source stopped, or does something between (a proxy, a firewall, a full queue) hold its "
                    "connections back? --accept-timeout ends the wait"};
      },
      limits.hint);
  return setup.run();
}

}  // namespace

Accepted accept_peer(multifd::Listener& listener, unsigned channels, const multifd::Interrupt& interrupt,
                     const TimeLimits& limits, const Tls& tls) {
  const std::string address = to_string(listener.local_address());
  if (tls.on()) {
    TlsAcceptor acceptor = tls.acceptor(listener, limits.hello);
    return accept_at(acceptor, address, channels, interrupt, limits);
  }
  auto acceptor = need(multifd::PlainAcceptor::open(listener));
  return accept_at(acceptor, address, channels, interrupt, limits);
}

}  // namespace program
