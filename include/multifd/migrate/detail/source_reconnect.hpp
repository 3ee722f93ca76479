// SPDX-License-Identifier: MIT
//
// A source's lost connections (format/extension.md section 19.10): each is dialled again by who needs it, until it is back, the
// destination says that it does not know the migration any more, or all have been away for too long.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/migrate/detail/path_set.hpp"
#include "multifd/migrate/detail/resumable_link.hpp"
#include "multifd/migrate/resume_options.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::migrate::detail {

/// Threads: those of the channels, and the migration's.
template <Transport T>
class SourceReconnect final : public packets::Redial<T>, public MainRedial<T> {
 public:
  /// Params: all outlive this object. `on_path`: may be empty; called by any of the threads, one at a time.
  SourceReconnect(PathSet<T>& paths, const ResumeOptions& options, const Interrupt& cancel, Interrupt stop,
                  Interrupt never, const std::function<void(const PathEvent&)>& on_path)
      : paths_(paths),
        options_(options),
        cancel_(cancel),
        on_path_(on_path),
        stop_(std::move(stop)),
        never_(std::move(never)),
        refused_since_(paths.count()),
        main_timeout_(options.timeout),
        timeout_(options.timeout) {}

  /// From here on lost connections are made again. Params `session`: what they say. Ahead of the first page.
  void enable(const Uuid& session, unsigned main_path) {
    monitor_.update([&] {
      session_ = session;
      channels_.resize(paths_.channels());
      enabled_ = true;
    });
    main_path_ = main_path;
  }
  /// Somebody wants it to be tried now.
  void resume() noexcept {
    monitor_.update([this] { ++resumes_; });
  }
  LostConnections lost() const noexcept {
    const auto held = monitor_.lock();
    return {.away = away_, .paused = all_away_since_.has_value(), .times = lost_};
  }

  void joined(unsigned channel) noexcept override {
    monitor_.update([&] {
      --away_;
      channels_[channel].away = false;
      all_away_since_.reset();
    });
    paths_.joined(channel);
    tell({.path = paths_.path_of(channel), .main = false, .channel = channel});
  }
  /// No channel needs a connection any more.
  void stop() noexcept override {
    stop_.trigger();
    monitor_.update([this] { channels_over_ = true; });
  }
  /// How long there may be no channel from here on, and how long a main connection is tried for.
  void set_timeout(std::chrono::milliseconds timeout) noexcept {
    monitor_.update([&] { timeout_ = timeout; });
  }
  void set_main_timeout(std::chrono::milliseconds timeout) noexcept {
    monitor_.update([&] { main_timeout_ = timeout; });
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds first_pause{20};
  static constexpr std::chrono::milliseconds longest_pause{500};
  /// For the destination's answer: its worker may have to see first that the old connection has ended.
  static constexpr std::chrono::milliseconds answer_limit{10'000};
  /// So long a destination may refuse every connection: its process has ended, and nobody listens.
  static constexpr std::chrono::milliseconds longest_refusal{3'000};

  struct Channel {
    std::uint32_t generation = 0;
    bool away = false;
  };

  // ---- Channels

  [[nodiscard]] Result<T> do_reconnect(unsigned channel, const Error& why) noexcept override {
    return catch_bad_alloc(Stage::connect, "channel", [&]() -> Result<T> {
      if (!enabled()) return std::unexpected(why);
      note_lost(channel, why);
      for (Pause pause(*this);; pause.rest()) {
        MULTIFD_TRY(check(why));
        const std::size_t path = paths_.path_of(channel);
        auto link = dial(path, stop_);
        if (!link) continue;
        const wire::Rejoin rejoin{.role = wire::RejoinRole::channel,
                                  .channel = static_cast<std::uint8_t>(channel),
                                  .generation = next_generation(channels_[channel].generation),
                                  .session = session_};
        const auto answer = ask(*link, rejoin, &stop_);
        if (!answer) continue;
        MULTIFD_TRY_ASSIGN(const bool joined, judge(*answer));
        if (joined) return std::move(*link);
      }
    });
  }

  void note_lost(unsigned channel, const Error& why) noexcept {
    const bool first = monitor_.update([&] {
      ++lost_;
      if (std::exchange(channels_[channel].away, true)) return false;
      if (++away_ == channels_.size()) {
        all_away_since_ = Clock::now();
        resumes_seen_ = resumes_;
      }
      return true;
    });
    if (!first) return;  // its new connection was lost before it was used
    paths_.lost(channel);
    tell({.path = paths_.path_of(channel), .main = false, .channel = channel, .left_out = false, .lost = &why});
  }

  // ---- The main connection

  [[nodiscard]] Result<typename MainRedial<T>::Again> do_reconnect_main(std::uint64_t received, const Error& why,
                                                                        const Interrupt* interrupt) override {
    tell({.path = main_path_, .main = true, .channel = 0, .left_out = false, .lost = &why});
    const Clock::time_point lost_at = Clock::now();
    for (Pause pause(*this);; pause.rest()) {
      // Paths with channels first, and the one that has just failed last: a path that is down takes its time.
      std::vector<std::size_t> order = paths_.best_first();
      std::erase(order, main_path_);
      order.push_back(main_path_);
      for (const std::size_t path : order) {
        MULTIFD_TRY(check_main(lost_at, why, interrupt));
        auto link = dial(path, interrupt != nullptr ? *interrupt : never_);
        if (!link) continue;
        const wire::Rejoin rejoin{.role = wire::RejoinRole::main,
                                  .generation = next_generation(main_generation_),
                                  .session = session_,
                                  .received = received};
        const auto answer = ask(*link, rejoin, interrupt);
        if (!answer) continue;
        const auto joined = judge(*answer);
        if (!joined) return std::unexpected(interrupt == nullptr ? why : joined.error());
        if (!*joined) continue;
        main_path_ = path;
        tell({.path = path, .main = true});
        return typename MainRedial<T>::Again{std::move(*link), answer->received};
      }
    }
  }

  // ---- Both

  /// The time between two tries.
  class Pause {
   public:
    explicit Pause(SourceReconnect& of) : of_(of) {}
    void rest() noexcept {
      auto held = of_.monitor_.lock();
      const unsigned before = of_.resumes_;
      static_cast<void>(of_.monitor_.wait_until(held, Clock::now() + length_, [&] { return of_.resumes_ != before; }));
      length_ = std::min(2 * length_, longest_pause);
    }

   private:
    SourceReconnect& of_;
    std::chrono::milliseconds length_ = first_pause;
  };

  bool enabled() const noexcept {
    const auto held = monitor_.lock();
    return enabled_;
  }
  std::uint32_t next_generation(std::uint32_t& generation) noexcept {
    const auto held = monitor_.lock();
    return ++generation;
  }

  /// Whether to try at all, for a channel. Errors: Errc::cancelled: it is not needed any more; session_lost; `why` when nothing
  /// has come back for too long.
  [[nodiscard]] Result<void> check(const Error& why) noexcept {
    const auto ended = [this] { return cancel_.triggered(); };
    wait_for_resume(ended);
    const auto held = monitor_.lock();
    if (channels_over_ || ended()) return fail(Errc::cancelled, Stage::connect, "lost connection");
    if (!all_away_since_) return {};
    if (late(*all_away_since_, timeout_)) return std::unexpected(why);
    return check_refused(*all_away_since_);
  }
  /// The same for the main connection, which is needed longer than channels are: once the guest is handed over nobody cancels
  /// it, and `interrupt` is null.
  [[nodiscard]] Result<void> check_main(Clock::time_point since, const Error& why,
                                        const Interrupt* interrupt) noexcept {
    const auto ended = [&] { return interrupt != nullptr && interrupt->triggered(); };
    wait_for_resume(ended);
    const auto held = monitor_.lock();
    if (ended()) return fail(Errc::cancelled, Stage::connect, "main connection");
    if (late(since, main_timeout_)) return std::unexpected(why);
    // Once the guest is handed over, a destination that has ended may have run it.
    if (interrupt == nullptr && !check_refused(since)) return std::unexpected(why);
    return check_refused(since);
  }
  /// Where nothing is to be tried by itself, and no connection is left, waits for Migration::resume().
  template <class Ended>
  void wait_for_resume(const Ended& ended) noexcept {
    if (options_.automatic) return;
    auto held = monitor_.lock();
    const auto may_try = [this] { return !all_away_since_ || resumes_ != resumes_seen_ || channels_over_; };
    static_cast<void>(monitor_.wait(held, std::chrono::milliseconds(100), may_try, [&] {
      if (ended()) return false;
      const auto now_held = monitor_.lock();
      return !all_away_since_ || !late(*all_away_since_, timeout_);
    }));
  }
  static bool late(Clock::time_point since, std::chrono::milliseconds limit) noexcept {
    return limit.count() != 0 && Clock::now() - since > limit;
  }
  [[nodiscard]] Result<void> check_refused(Clock::time_point since) const noexcept {
    for (const auto& refused : refused_since_) {
      if (!refused) return {};
      since = std::max(since, *refused);
    }
    if (Clock::now() - since <= longest_refusal) return {};
    return fail(Errc::session_lost, Stage::connect, "nobody listens there any more");
  }

  [[nodiscard]] Result<T> dial(std::size_t path, const Interrupt& interrupt) {
    auto link = paths_.dial(path, interrupt);
    if (link) packets::limit_silence(packets::descriptor_of(*link), options_.path_timeout);
    const auto held = monitor_.lock();
    auto& refused = refused_since_[path];
    if (link || link.error().code != std::errc::connection_refused)
      refused.reset();
    else if (!refused)
      refused = Clock::now();
    return link;
  }

  /// Says REJOIN and reads the answer. Errors: those of the connection, timed_out; of parse_rejoin_answer().
  [[nodiscard]] static Result<wire::RejoinAnswer> ask(T& link, const wire::Rejoin& rejoin, const Interrupt* interrupt) {
    MULTIFD_TRY(write_all(link, wire::encode_rejoin(rejoin).view(), answer_limit, interrupt));
    std::array<std::byte, wire::rejoin_answer_bytes> said{};
    const auto deadline = deadline_after(answer_limit);
    for (std::span<std::byte> room(said); !room.empty();) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      const iovec buffer = mutable_buffer(room);
      MULTIFD_TRY_ASSIGN(
          const std::size_t got,
          link.read_some(std::span(&buffer, 1), std::max(left, std::chrono::milliseconds(0)), interrupt));
      if (got == 0) return fail(Errc::peer_closed, Stage::read, "answer to REJOIN");
      room = room.subspan(got);
    }
    MULTIFD_TRY_ASSIGN(const wire::RejoinAnswer answer, wire::parse_rejoin_answer(said));
    if (answer.generation != rejoin.generation)
      return fail(Errc::bad_extension_message, Stage::parse, "generation", answer.generation, rejoin.generation,
                  "answer to REJOIN");
    return answer;
  }

  /// Whether it has joined; false: another try. Errors: Errc::session_lost; cancelled: it is not needed any more.
  [[nodiscard]] static Result<bool> judge(const wire::RejoinAnswer& answer) noexcept {
    switch (answer.verdict) {
      case wire::RejoinVerdict::joined: return true;
      case wire::RejoinVerdict::stale_generation: return false;
      case wire::RejoinVerdict::over: return fail(Errc::cancelled, Stage::connect, "the destination needs it no more");
      case wire::RejoinVerdict::unknown_session:
      case wire::RejoinVerdict::unknown_channel: break;
    }
    return fail(Errc::session_lost, Stage::connect, "REJOIN", static_cast<std::uint64_t>(answer.verdict), 0,
                to_string(answer.verdict));
  }

  void tell(const PathEvent& event) noexcept {
    // Not the monitor: the hook may ask for the migration's progress.
    const std::lock_guard held(telling_);
    if (on_path_) ignore_bad_alloc([&] { on_path_(event); });
  }

  PathSet<T>& paths_;
  const ResumeOptions& options_;
  const Interrupt& cancel_;
  const std::function<void(const PathEvent&)>& on_path_;
  Interrupt stop_;                   ///< for channels
  Interrupt never_;                  ///< for connecting that nothing ends
  mutable engine::Monitor monitor_;  ///< of all below; the session never changes once enabled
  bool enabled_ = false;
  Uuid session_{};
  std::vector<Channel> channels_;
  unsigned away_ = 0;
  std::uint64_t lost_ = 0;
  std::uint32_t main_generation_ = 0;
  std::optional<Clock::time_point> all_away_since_;              ///< no channel has a connection
  std::vector<std::optional<Clock::time_point>> refused_since_;  ///< by path: every connection
  bool channels_over_ = false;
  std::chrono::milliseconds main_timeout_;
  std::chrono::milliseconds timeout_;
  unsigned resumes_ = 0;
  unsigned resumes_seen_ = 0;  ///< when the last channel was lost
  std::size_t main_path_ = 0;  ///< the migration's thread only
  std::mutex telling_;
};

}  // namespace multifd::migrate::detail
