// SPDX-License-Identifier: MIT
//
// Accepts one migration source of ours at one address: its main connection says how many channels there are, and of which
// guest; strangers, silent connections and tries that were given up do no harm.
#pragma once

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/format/constants.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/limits.hpp"
#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/detail/destination_reconnect.hpp"
#include "multifd/migrate/detail/last_words.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_prelude.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/qemu/return_path_writer.hpp"
#include "multifd/qemu/source_set.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/acceptor.hpp"

namespace multifd::migrate::detail {

/// A source whose connections are all there.
template <class Link>
struct ArrivedSource {
  SourceLinks<Link> links;
  SourcePrelude prelude;  ///< whose names `settings` refers to
  wire::PeerSettings settings{};
};

/// Threads: one. For one source.
template <Acceptor A>
class SourceSetup {
 public:
  using Link = typename A::Link;

  /// Params `own`: what this side insists on.
  SourceSetup(A& acceptor, const DestinationOptions& options, const wire::PeerSettings& own,
              const qemu::MainStreamLimits& limits, MigrationReporter& reporter)
      : acceptor_(acceptor), options_(options), own_(own), limits_(limits), reporter_(reporter) {}

  /// Errors (stage accept): timed_out, cancelled, errno; peer_gave_up, peer_closed: a source came, and gave up; what does not
  ///   fit of its settings, which it is told, too.
  [[nodiscard]] Result<ArrivedSource<Link>> run() {
    deadline_ = deadline_after(as_timeout(options_.first_timeout));
    auto arrived = accept();
    if (!arrived) refuse(arrived.error());
    return arrived;
  }

 private:
  using Clock = std::chrono::steady_clock;
  using Set = SourceSet<Link>;

  [[nodiscard]] Result<ArrivedSource<Link>> accept() {
    for (;;) {
      MULTIFD_TRY(look_at_main());  // first, because a source that has ended may have sent its reason
      drop_ended();
      reporter_.connections(settings_ ? *settings_->channels : 0, static_cast<unsigned>(set_.channels()));
      if (settings_) {
        MULTIFD_TRY_ASSIGN(const bool whole, whole_set());
        if (whole) return take();
      }
      // epoll does not report bytes that TLS has read from the socket already.
      const bool look_again = set_.has_main() && is_secured(*set_.main());
      auto next =
          acceptor_.next(look_again ? std::min(deadline_, Clock::now() + std::chrono::milliseconds(50)) : deadline_,
                         &reporter_.interrupt());
      if (!next && is_limit(next.error().code) && !(set_.has_main() && prelude_->own_source()) && wait_for_main())
        continue;
      if (!next && next.error().code == Errc::timed_out) {
        if (Clock::now() < deadline_) continue;
        if (gave_up_) return std::unexpected(*gave_up_);
        return fail(Errc::timed_out, Stage::accept, missing(), set_.channels(), settings_ ? *settings_->channels : 0);
      }
      if (!next) return std::unexpected(next.error());
      if (!*next) continue;
      MULTIFD_TRY(take_in(std::move(**next)));
    }
  }

  /// This process has run out of something. The source's main connection may be among those that have said nothing yet, and
  /// is to be told. Returns whether that is still worth waiting for.
  bool wait_for_main() {
    if (!limit_deadline_) limit_deadline_ = deadline_after(std::chrono::milliseconds(1000));
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return Clock::now() < *limit_deadline_;
  }

  const char* missing() const noexcept {
    if (settings_) return "not all channels of the source came";
    if (set_.has_main()) return "a source came, and did not say its settings";
    return set_.channels() > 0 ? "channels came, the main connection did not" : "no source came";
  }

  [[nodiscard]] Result<void> take_in(Arrival<Link> arrival) {
    const bool is_main = arrival.magic == wire::main_stream_magic;
    if (arrival.magic == wire::rejoin_magic) {
      refuse_rejoin(arrival.link);
      return {};
    }
    if (!is_main && arrival.magic != wire::magic) {
      // A channel that a source has closed without a byte: its main connection has the reason.
      const bool is_tls = arrival.magic && *arrival.magic >> 16 == 0x1603 && !is_secured(arrival.link);
      if (arrival.magic || !(set_.has_main() || gave_up_))
        stranger(is_tls ? "a connection that speaks TLS, which is off here" : "a connection that is no migration's");
      return {};
    }
    MULTIFD_TRY(acceptor_.watch_end(arrival.link, is_main ? std::uint32_t{EPOLLIN} : 0u));
    const bool of_next_try = is_main && (!last_ended_ || arrival.number > *last_ended_);
    // Under TLS a connection of the try before can be through its handshake after those of the next one.
    if (set_.has_main() && arrival.number < main_number_ && (is_main || is_secured(arrival.link))) {
      stranger("a connection of another try");
      return {};
    }
    if (is_main) {
      main_number_ = arrival.number;
      settings_.reset();
      MULTIFD_TRY_ASSIGN(prelude_, SourcePrelude::create(limits_, !options_.page_bytes));
      static_cast<void>(set_.add_main(std::move(arrival)));
    } else if (const auto added = set_.add_channel(std::move(arrival)); added == Set::Added::not_at_all) {
      stranger("a channel of another try, or of another source");
    } else if (added == Set::Added::too_many) {
      return fail(Errc::too_many_channels, Stage::accept, "accept", set_.channels() + 1);
    }
    // A try begins. After a failed one a channel may be left of that.
    if (gave_up_ ? of_next_try : is_main || set_.size() == 1) {
      gave_up_.reset();
      deadline_ = deadline_after(as_timeout(options_.accept_timeout));
    }
    return {};
  }

  /// A source whose migration was with another process, or with this one before it gave up, is told so.
  void refuse_rejoin(Link& link) const {
    std::array<std::byte, wire::rejoin_bytes> said;
    const iovec room = mutable_buffer(std::span<std::byte>(said));
    const auto got = link.read_now(std::span(&room, 1));  // it comes in one piece; else the source tries again
    if (!got || *got != said.size()) return;
    if (const auto rejoin = wire::parse_rejoin(said))
      answer_rejoin(link, wire::RejoinVerdict::unknown_session, rejoin->generation);
    stranger("a connection of another migration that wants to return");
  }

  /// Reads what the main connection has said.
  [[nodiscard]] Result<void> look_at_main() {
    if (!set_.has_main()) return {};
    const auto whole = prelude_->read(*set_.main());
    if (whole && !*whole) return {};
    if (whole && !settings_) {
      MULTIFD_TRY_ASSIGN(settings_, prelude_->check(own_));
      if (!settings_->channels) return fail(Errc::channel_count_mismatch, Stage::hello, "SETTINGS without channels");
      // Under TLS no uuid can be peeked; but a source's main connection is accepted there before its channels connect.
      if (is_secured(*set_.main()) && set_.drop_before_main() > 0) stranger("a channel of another try");
    }
    const Result<void> still = whole ? prelude_->read_on(*set_.main()) : std::unexpected(whole.error());
    if (still) return {};
    const Error& error = still.error();
    if (error.code == Condition::peer_gone) {
      lost(error);
    } else if (prelude_->own_source() || error.code == Condition::local_io) {
      return std::unexpected(error);  // ends both sides
    } else {
      // Who does not say that it is ours is no source; one that does will come.
      set_.take_main();
      stranger(error.code == Errc::not_supported ? "a source that is no migrate_to(): a QEMU, or a relay before one"
                                                 : "a connection that is no migration's");
      if (set_.size() == 0 && !gave_up_) deadline_ = deadline_after(as_timeout(options_.first_timeout));
    }
    return {};
  }

  /// A source has gone. It may come again.
  void lost(const Error& error) {
    if (error.code == Errc::peer_gave_up) reporter_.peer_gave_up(prelude_->reason());
    set_.take_main();
    settings_.reset();
    stranger("a source that gave up");
    gave_up_ = error;
    deadline_ = deadline_after(as_timeout(options_.retry_timeout));
  }

  void drop_ended() {
    const bool had_main = set_.has_main();
    const auto ended = set_.drop_ended();
    last_ended_ = std::max(last_ended_, ended.last);
    if (ended.dropped == 0) return;
    if (had_main && !set_.has_main())
      lost(
          {.code = Errc::peer_closed, .stage = Stage::accept, .op = "a source came, and gave up before all was there"});
    else
      stranger("a connection that ended ahead of the others");
    if (set_.size() == 0 && !gave_up_) deadline_ = deadline_after(as_timeout(options_.first_timeout));
  }

  /// Whether all channels of the source are there.
  [[nodiscard]] Result<bool> whole_set() {
    if (settings_->uuid) {
      const std::size_t others = set_.drop_channels([&](const Link& link) {
        const auto uuid = look_at_channel_uuid(link);
        return uuid && *uuid != *settings_->uuid;
      });
      if (others > 0) stranger("a channel of another try, or of another source");
    }
    if (set_.channels() > *settings_->channels)
      return fail(Errc::too_many_channels, Stage::accept, "accept", set_.channels(), *settings_->channels);
    return set_.channels() == *settings_->channels;
  }

  ArrivedSource<Link> take() {
    auto [main, channels] = set_.take();
    return {.links = {std::move(main), std::move(channels)}, .prelude = std::move(*prelude_), .settings = *settings_};
  }

  /// Tells the source why this side gives up.
  void refuse(const Error& error) {
    auto main = set_.take_main();
    if (main && prelude_->own_source()) say_failed(*main, error, options_.reason);
  }

  void stranger(const char* why) const {
    if (options_.on_stranger) options_.on_stranger(why);
  }

  A& acceptor_;
  const DestinationOptions& options_;
  const wire::PeerSettings& own_;
  const qemu::MainStreamLimits limits_;
  MigrationReporter& reporter_;
  Set set_{max_channels};
  std::optional<SourcePrelude> prelude_;        ///< of the set's main connection
  std::optional<wire::PeerSettings> settings_;  ///< of the set's main connection
  std::uint64_t main_number_ = 0;               ///< of the set's main connection, in the order of accepting
  std::optional<std::uint64_t> last_ended_;     ///< of the connections that have ended, the number of the last one
  std::optional<Error> gave_up_;                ///< why a source has gone whose next try is waited for
  Clock::time_point deadline_{};
  std::optional<Clock::time_point> limit_deadline_;
};

}  // namespace multifd::migrate::detail
