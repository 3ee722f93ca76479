// SPDX-License-Identifier: MIT
//
// The receiver's barrier (format/packets.md section 6.5): a channel that read a SYNC stops here until all channels have
// read theirs and, in manual mode, the caller says that its main stream reached the end of the epoch too.
//
//   channel 0  ... pages, SYNC -> arrive() |
//   channel 1  ... pages, pages, SYNC -> arrive() | all there -> released into the next epoch together
//   caller     ... closing record -> release_when_all() |
//
// A monitor: the barrier is passed once an epoch, and its waits need time limits.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <new>

#include "multifd/engine/monitor.hpp"
#include "multifd/options.hpp"
#include "multifd/progress_watch.hpp"
#include "multifd/result.hpp"

namespace multifd::packets {

/// Threads: arrive() and channel_ended() by the channels' workers; release_when_all() by the caller; stop() by any.
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
    present_[channel] = State::waiting;
    ++waiting_;
    const std::uint64_t mine = epochs_;
    if (waiting_ == channels_) {
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

  /// Reports the orderly end of `channel`.
  ///
  /// Errors: Errc::unsynced_end if other channels wait for its SYNC.
  [[nodiscard]] Result<void> channel_ended(std::uint32_t channel) noexcept {
    const Monitor::Lock held = monitor_.lock();
    if (monitor_.stopped(held)) return stopped();
    present_[channel] = State::ended;
    ++ended_channels_;
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
    const auto ready = [&] { return ended_channels_ > 0 || waiting_ == channels_; };
    if (!wait(held, limit_, ready, progress))
      return std::unexpected(blame(Errc::timed_out, first_with(State::reading)).error());
    if (monitor_.stopped(held)) return std::unexpected(stopped().error());
    if (waiting_ != channels_) return std::unexpected(blame(Errc::unsynced_end, first_with(State::ended)).error());
    held.unlock();  // nobody arrives or leaves while all wait; only stop() may come
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
  enum class State : std::uint8_t { reading, waiting, ended };

  EpochBarrier(unsigned channels, Barrier mode, std::chrono::milliseconds limit) noexcept
      : channels_(channels), mode_(mode), limit_(limit), present_(new(std::nothrow) State[channels]{}) {}

  void release() noexcept {
    for (unsigned i = 0; i < channels_; ++i) present_[i] = State::reading;
    waiting_ = 0;
    ++epochs_;
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
  unsigned waiting_ = 0;
  unsigned ended_channels_ = 0;
  std::uint64_t epochs_ = 0;
  bool epochs_ended_ = false;
};

}  // namespace multifd::packets
