// SPDX-License-Identifier: MIT
//
// The receiver's barrier (format/packets.md section 6.5): a channel that read a SYNC stops here until all channels have
// read theirs and, in manual mode, the caller says that its main stream reached the end of the epoch too.
//
//   channel 0  ... pages, SYNC -> arrive() |
//   channel 1  ... pages, pages, SYNC -> arrive() | all there -> released into the next epoch together
//   caller     ... closing record -> release_when_all() |
//
// A channel that has lost its connection is away, and nobody waits for it (format/extension.md section 19.10). From the
// moment its new connection is admitted until it is known which epoch that begins with, no epoch ends; one that begins with
// a later epoch waits here until that has begun. An epoch ends when one channel at least has read its SYNC, or has said a
// later epoch: as long as there is none, the sender may have pages of it that no channel has carried.
//
// A monitor: the barrier is passed once an epoch, and its waits need time limits.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <new>

#include "multifd/engine/monitor.hpp"
#include "multifd/limits.hpp"
#include "multifd/options.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/result.hpp"

namespace multifd::packets {

/// Threads: arrive(), leave(), admit(), join() and channel_ended() by the channels' workers; release_when_all() by the caller; stop() by any.
///
/// Time limits: a wait for a *missing* channel fails with Errc::timed_out when `limit` passes in which `progress()`
/// did not change; a wait for the *caller* has no limit.
class EpochBarrier {
 public:
  /// Does nothing while the channels are held.
  struct Nothing {
    [[nodiscard]] Result<void> operator()() const noexcept { return {}; }
  };

  [[nodiscard]] static Result<std::unique_ptr<EpochBarrier>> create(unsigned channels, Barrier mode,
                                                                    std::chrono::milliseconds limit) {
    std::unique_ptr<EpochBarrier> point(new (std::nothrow) EpochBarrier(channels, mode, limit));
    if (!point || !point->present_) return fail_errno(Stage::setup, "allocate barrier", ENOMEM);
    return point;
  }

  /// Reports that `channel` has read its SYNC and waits for the release.
  ///
  /// Errors: Errc::unsynced_end or sync_mismatch when a channel that has ended, or the caller's end, can never meet
  ///   this SYNC; timed_out; cancelled after stop(). Error::channel names the channel to blame.
  template <class Progress>
  [[nodiscard]] Result<void> arrive(std::uint32_t channel, Progress&& progress) noexcept {
    Monitor::Lock held = monitor_.lock();
    if (monitor_.stopped(held)) return stopped();
    if (ended_channels_ > 0) return blame(Errc::unsynced_end, first_with(State::ended));
    if (epochs_ended_) return blame(Errc::sync_mismatch, channel);
    set(channel, State::waiting);
    const std::uint64_t mine = epochs_;
    if (all_arrived()) {
      if (mode_ == Barrier::automatic) {
        release();
        return {};
      }
      monitor_.notify();  // the caller may be waiting for the last one
    }
    const auto released = [&] { return epochs_ != mine; };
    if (mode_ == Barrier::manual) {
      monitor_.wait(held, released);
    } else if (!wait(held, limit_, released, progress)) {
      return blame(Errc::timed_out, first_with(State::reading));
    }
    // A channel that was released before stop() goes on; its next wait fails.
    return epochs_ != mine ? Result<void>{} : stopped();
  }

  // ---- Connections that return, in manual mode

  /// The connection of `channel` is lost, and its worker has read its last byte from it.
  void leave(std::uint32_t channel) noexcept {
    const Monitor::Lock held = monitor_.lock();
    set(channel, State::away);
    monitor_.notify();
  }
  /// A new connection of a channel that is away is let in: no epoch ends before join().
  void admit(std::uint32_t channel) noexcept {
    const Monitor::Lock held = monitor_.lock();
    set(channel, State::reading);
  }
  /// It begins with that epoch, counted from 0. Waits until it has begun.
  /// Errors: Errc::sync_mismatch: it has ended, or there cannot be such a one yet; cancelled after stop().
  [[nodiscard]] Result<void> join(std::uint32_t channel, std::uint64_t epoch) noexcept {
    Monitor::Lock held = monitor_.lock();
    if (epoch < epochs_ || epoch - epochs_ > furthest_ahead)
      return fail(Errc::sync_mismatch, Stage::sync, "first epoch of a new connection", epoch, epochs_);
    if (epoch == epochs_) return {};
    set(channel, State::later);
    first_[channel] = epoch;
    monitor_.notify();
    monitor_.wait(held, [&] { return epochs_ == epoch; });
    return epochs_ == epoch ? Result<void>{} : stopped();
  }

  /// Reports the orderly end of `channel`.
  ///
  /// Errors: Errc::unsynced_end if other channels wait for its SYNC.
  [[nodiscard]] Result<void> channel_ended(std::uint32_t channel) noexcept {
    const Monitor::Lock held = monitor_.lock();
    if (monitor_.stopped(held)) return stopped();
    set(channel, State::ended);
    monitor_.notify();
    if (waiting_ > 0) return blame(Errc::unsynced_end, channel);
    return {};
  }

  /// Waits until every channel has arrived, calls `while_held()`, then releases them all. Returns the number of the
  /// epoch that ended.
  ///
  /// Errors: Errc::unsynced_end when a channel has ended; timed_out; cancelled after stop(); what while_held() returns,
  ///   and then nobody is released.
  template <class Progress, class WhileHeld = Nothing>
  [[nodiscard]] Result<std::uint64_t> release_when_all(Progress&& progress, WhileHeld&& while_held = {}) {
    Monitor::Lock held = monitor_.lock();
    const auto ready = [&] { return ended_channels_ > 0 || all_arrived(); };
    if (!wait(held, limit_, ready, progress))
      return std::unexpected(blame(Errc::timed_out, first_with(State::reading)).error());
    if (monitor_.stopped(held)) return std::unexpected(stopped().error());
    if (!all_arrived()) return std::unexpected(blame(Errc::unsynced_end, first_with(State::ended)).error());
    held.unlock();  // nobody arrives or leaves while all wait; only stop() may come, and admit(), which then begins later
    if (Result<void> done = while_held(); !done) return std::unexpected(done.error());
    held.lock();
    if (monitor_.stopped(held)) return std::unexpected(stopped().error());
    release();
    return epochs_ - 1;
  }

  /// Says that the caller closes no more epochs (manual mode): a channel that waits, or comes to wait, has sent a
  /// SYNC too many.
  /// Errors: Errc::sync_mismatch for a channel that waits already.
  [[nodiscard]] Result<void> end_epochs() noexcept {
    const Monitor::Lock held = monitor_.lock();
    epochs_ended_ = mode_ == Barrier::manual;
    if (epochs_ended_ && waiting_ > 0) return blame(Errc::sync_mismatch, first_with(State::waiting));
    return {};
  }

  /// Whether end_epochs() has been called in manual mode.
  bool epochs_ended() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return epochs_ended_;
  }

  /// Waits until every channel has ended, or stop(). `limit`: of this call; 0 checks once and does not wait.
  /// Errors: Errc::timed_out (`op`) when `limit` passes in which `progress()` did not change; Error::channel is the
  ///   first that has not ended.
  template <class Progress>
  [[nodiscard]] Result<void> wait_for_channels(std::chrono::milliseconds limit, Progress&& progress,
                                               const char* op) noexcept {
    Monitor::Lock held = monitor_.lock();
    const auto ended = [&] { return monitor_.stopped(held) || ended_channels_ == channels_; };
    if (limit.count() == 0 ? ended() : wait(held, limit, ended, progress)) return {};
    Error error{.code = Errc::timed_out, .stage = Stage::read, .op = op};
    error.channel = first_with(State::reading);
    return std::unexpected(error);
  }

  /// Ends every wait, now and later.
  void stop() noexcept { monitor_.stop(); }

  /// How many channels are away. Threads: any.
  unsigned away() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return away_;
  }
  /// Whose SYNC has ended the last epoch: bit i % 8 of byte i / 8 for channel i.
  std::array<std::uint8_t, 32> last_arrived() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return last_arrived_;
  }

  /// How many channels have ended.
  unsigned ended_channels() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return ended_channels_;
  }

  std::uint64_t epochs() const noexcept {
    const Monitor::Lock held = monitor_.lock();
    return epochs_;
  }

 private:
  using Monitor = engine::Monitor;
  enum class State : std::uint8_t {
    reading,
    waiting,
    ended,
    away,   ///< its connection is lost
    later,  ///< its connection begins with a later epoch
  };
  /// A sender closes an epoch only when the one before it is over here.
  static constexpr std::uint64_t furthest_ahead = 1;

  EpochBarrier(unsigned channels, Barrier mode, std::chrono::milliseconds limit) noexcept
      : channels_(channels), mode_(mode), limit_(limit), present_(new(std::nothrow) State[channels]{}) {}

  void set(std::uint32_t channel, State state) noexcept {
    const auto add = [this](State which, unsigned by) {
      if (which == State::waiting) waiting_ += by;
      if (which == State::ended) ended_channels_ += by;
      if (which == State::away) away_ += by;
      if (which == State::later) later_ += by;
    };
    add(present_[channel], 0u - 1u);
    add(state, 1);
    present_[channel] = state;
  }
  /// Whether every channel that is there has come to the epoch's end, and there is one.
  bool all_arrived() const noexcept { return waiting_ + later_ > 0 && waiting_ + later_ + away_ == channels_; }

  void release() noexcept {
    ++epochs_;
    last_arrived_.fill(0);
    for (unsigned i = 0; i < channels_; ++i) {
      if (present_[i] == State::waiting)
        last_arrived_[i / 8] = static_cast<std::uint8_t>(last_arrived_[i / 8] | 1u << i % 8);
      if (present_[i] == State::waiting || (present_[i] == State::later && first_[i] == epochs_))
        set(i, State::reading);
    }
    monitor_.notify();
  }

  /// False: nothing moved for `limit`.
  template <class Ready, class Progress>
  bool wait(Monitor::Lock& held, std::chrono::milliseconds limit, Ready&& ready, Progress&& progress) noexcept {
    ProgressWatch watch(limit, 0);  // progress() may stop everything: never called while this is held
    return monitor_.wait(held, watch.slice(), ready, [&] { return !watch.stalled(progress()); });
  }

  std::uint32_t first_with(State state) const noexcept {
    for (unsigned i = 0; i < channels_; ++i)
      if (present_[i] == state) return i;
    return no_channel;
  }

  [[nodiscard]] static Result<void> blame(Errc code, std::uint32_t channel) noexcept {
    const char* op = code == Errc::timed_out ? "no SYNC of the channel, no byte of any, for barrier_timeout"
                                             : "wait for SYNC of all channels";
    return std::unexpected(Error{.code = code, .stage = Stage::sync, .op = op, .channel = channel});
  }
  [[nodiscard]] static Result<void> stopped() noexcept { return fail(Errc::cancelled, Stage::sync, "barrier"); }

  const unsigned channels_;
  const Barrier mode_;
  const std::chrono::milliseconds limit_;
  Monitor monitor_;
  std::unique_ptr<State[]> present_;
  std::array<std::uint64_t, max_channels + 1> first_{};  ///< of channels that begin later: with which epoch
  std::array<std::uint8_t, 32> last_arrived_{};
  unsigned waiting_ = 0;
  unsigned ended_channels_ = 0;
  unsigned away_ = 0;
  unsigned later_ = 0;
  std::uint64_t epochs_ = 0;
  bool epochs_ended_ = false;
};

}  // namespace multifd::packets
