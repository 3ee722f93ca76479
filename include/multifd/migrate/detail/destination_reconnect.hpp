// SPDX-License-Identifier: MIT
//
// A destination's lost connections (format/extension.md section 19.10): the source makes them again, a thread accepts them
// (late_acceptor.hpp), and who has lost one takes it and answers. A newer connection ends the older one of the same channel
// first, so that it is read to its end by the same thread before the newer one is.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/migrate/detail/resumable_link.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Writes the answer to a REJOIN without waiting: it is the first on its connection.
template <Transport T>
void answer_rejoin(T& link, wire::RejoinVerdict verdict, std::uint32_t generation) noexcept {
  const auto bytes = wire::encode_rejoin_answer({.verdict = verdict, .generation = generation});
  const iovec buffer = const_buffer(bytes.view());
  if (link.write_now(std::span(&buffer, 1))) static_cast<void>(link.finish());
}

/// Threads: offer() of who accepts; await(), joined() of the channels; reconnect_main() of the migration; the others any.
template <Transport T>
class DestinationReconnect final : public packets::Rejoins<T>, public MainRedial<T> {
 public:
  using Arrival = typename packets::Rejoins<T>::Arrival;

  /// Params `timeout`: how long there may be no channel, or no main connection; 0: no limit. `silence`: how long one that comes
  /// may be silent. `cancel`: ends the waiting; it outlives this object. `fence_channel`, `fence_main`: end the connection that
  /// there is where it is older than that generation; until close().
  DestinationReconnect(unsigned channels, const Uuid& session, std::chrono::milliseconds timeout,
                       std::chrono::milliseconds silence, const Interrupt& cancel,
                       std::function<void(unsigned, std::uint32_t)> fence_channel,
                       std::function<void(std::uint32_t)> fence_main)
      : session_(session),
        timeout_(timeout),
        silence_(silence),
        cancel_(cancel),
        channels_(channels),
        fence_channel_(std::move(fence_channel)),
        fence_main_(std::move(fence_main)) {}

  /// A connection has said REJOIN. Returns why it is refused, static text; null: it is taken.
  [[nodiscard]] const char* offer(T link, const wire::Rejoin& rejoin) noexcept {
    using Verdict = wire::RejoinVerdict;
    const Verdict verdict = admit(rejoin);
    if (verdict != Verdict::joined) {
      answer_rejoin(link, verdict, rejoin.generation);
      return verdict == Verdict::unknown_session    ? "a connection of another migration that wants to return"
             : verdict == Verdict::stale_generation ? "a connection older than the one that is there"
             : verdict == Verdict::unknown_channel  ? "a connection of a channel that the migration does not have"
                                                    : nullptr;
    }
    const bool main = rejoin.role == wire::RejoinRole::main;
    packets::limit_silence(packets::descriptor_of(link), silence_);
    const bool taken = monitor_.update([&] {
      if (!main && channels_over_) return false;
      Slot& slot = main ? main_ : channels_[rejoin.channel];
      slot.waiting.emplace(std::move(link));
      slot.received = rejoin.received;
      slot.waiting_generation = rejoin.generation;
      return true;
    });
    if (!taken) {
      answer_rejoin(link, wire::RejoinVerdict::over, rejoin.generation);
      return nullptr;
    }
    // Who reads the older one finds its end, and then this one.
    const std::lock_guard held(fences_);
    if (main && fence_main_) fence_main_(rejoin.generation);
    if (!main && fence_channel_) fence_channel_(rejoin.channel, rejoin.generation);
    return nullptr;
  }

  void joined(unsigned channel) noexcept override {
    monitor_.update([&] {
      channels_[channel].away = false;
      --away_;
      all_away_since_.reset();
    });
  }
  /// No channel needs a connection any more. Those that nobody has taken yet are told so.
  void stop() noexcept override {
    monitor_.update([this] {
      channels_over_ = true;
      for (Slot& each : channels_) {
        if (each.waiting) answer_rejoin(*each.waiting, wire::RejoinVerdict::over, each.waiting_generation);
        each.waiting.reset();
      }
    });
  }
  /// Ends all: what the fences refer to goes away.
  void close() noexcept {
    {
      const std::lock_guard held(fences_);
      fence_channel_ = {};
      fence_main_ = {};
    }
    monitor_.stop();
  }
  /// How long a main connection is waited for from here on.
  void set_timeout(std::chrono::milliseconds timeout) noexcept {
    monitor_.update([&] { timeout_ = timeout; });
  }
  LostConnections lost() const noexcept {
    const auto held = monitor_.lock();
    return {.away = away_, .paused = all_away_since_.has_value(), .times = lost_, .resent_pages = 0};
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Slot {
    std::optional<T> waiting;
    std::uint64_t received = 0;
    std::uint32_t waiting_generation = 0;
    std::uint32_t generation = 0;  ///< the newest
    bool away = false;
  };

  [[nodiscard]] wire::RejoinVerdict admit(const wire::Rejoin& rejoin) noexcept {
    const auto held = monitor_.lock();
    if (rejoin.session != session_) return wire::RejoinVerdict::unknown_session;
    const bool main = rejoin.role == wire::RejoinRole::main;
    if (!main && rejoin.channel >= channels_.size()) return wire::RejoinVerdict::unknown_channel;
    if (monitor_.stopped(held) || (!main && channels_over_)) return wire::RejoinVerdict::over;
    Slot& slot = main ? main_ : channels_[rejoin.channel];
    if (rejoin.generation <= slot.generation) return wire::RejoinVerdict::stale_generation;
    slot.generation = rejoin.generation;
    return wire::RejoinVerdict::joined;
  }

  [[nodiscard]] Result<Arrival> do_await(unsigned channel, const Error& why) noexcept override {
    auto held = monitor_.lock();
    Slot& slot = channels_[channel];
    ++lost_;
    if (!std::exchange(slot.away, true) && ++away_ == channels_.size()) all_away_since_ = Clock::now();
    monitor_.wait(held, tick, [&] { return slot.waiting || channels_over_; }, [this] { return !too_late(); });
    if (monitor_.stopped(held) || channels_over_ || cancel_.triggered())
      return fail(Errc::cancelled, Stage::accept, "lost connection");
    if (!slot.waiting) return std::unexpected(why);
    Arrival arrival{std::move(*slot.waiting), slot.waiting_generation};
    slot.waiting.reset();
    return arrival;
  }

  [[nodiscard]] Result<typename MainRedial<T>::Again> do_reconnect_main(std::uint64_t received, const Error& why,
                                                                        const Interrupt* interrupt) override {
    auto held = monitor_.lock();
    const auto limit = timeout_;
    const auto deadline = deadline_after(as_timeout(limit));
    for (;;) {
      monitor_.wait(
          held, tick, [&] { return main_.waiting.has_value(); },
          [&] { return !ended(interrupt) && Clock::now() < deadline; });
      if (monitor_.stopped(held) || ended(interrupt)) return fail(Errc::cancelled, Stage::accept, "main connection");
      if (!main_.waiting) return std::unexpected(why);
      T link = std::move(*main_.waiting);
      main_.waiting.reset();
      const std::uint64_t theirs = main_.received;
      const std::uint32_t generation = main_.waiting_generation;
      const auto answer = wire::encode_rejoin_answer(
          {.verdict = wire::RejoinVerdict::joined, .generation = generation, .received = received});
      held.unlock();
      if (write_all(link, answer.view(), answer_limit, interrupt))
        return typename MainRedial<T>::Again{std::move(link), theirs, generation};
      held.lock();  // another one will come
    }
  }

  bool ended(const Interrupt* interrupt) const noexcept {
    return cancel_.triggered() || (interrupt != nullptr && interrupt->triggered());
  }
  bool too_late() const noexcept {
    if (cancel_.triggered()) return true;
    const auto held = monitor_.lock();
    return timeout_.count() != 0 && all_away_since_ && Clock::now() - *all_away_since_ > timeout_;
  }

  static constexpr std::chrono::milliseconds tick{100};
  static constexpr std::chrono::milliseconds answer_limit{5'000};

  const Uuid session_;
  std::chrono::milliseconds timeout_;
  const std::chrono::milliseconds silence_;
  const Interrupt& cancel_;
  mutable engine::Monitor monitor_;  ///< of all but the fences
  std::vector<Slot> channels_;
  Slot main_;
  unsigned away_ = 0;
  std::uint64_t lost_ = 0;
  std::optional<Clock::time_point> all_away_since_;  ///< no channel has a connection
  bool channels_over_ = false;
  std::mutex fences_;
  std::function<void(unsigned, std::uint32_t)> fence_channel_;
  std::function<void(std::uint32_t)> fence_main_;
};

}  // namespace multifd::migrate::detail
