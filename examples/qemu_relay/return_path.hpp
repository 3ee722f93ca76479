// SPDX-License-Identifier: MIT
//
// The return path: what the destination answers, passed on to the source by a thread of its own.
#pragma once

#include <multifd/qemu/return_path.hpp>
#include <multifd/transport/interrupt.hpp>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "common/link.hpp"
#include "qemu_relay/first_failure.hpp"
#include "qemu_relay/outcome.hpp"

namespace relay {

/// How far the source's main stream has been sent on. Written by the main thread, read by any.
struct Forwarded {
  std::atomic<bool> return_path_open = false;  ///< the source has opened it, and the destination been told
  std::atomic<bool> all = false;               ///< the destination may close its connection now
  std::atomic<bool> source_ended = false;      ///< the source closed its main connection in order
};

/// The value of the relay's own PING: "MFDR", with which no source pings.
inline constexpr std::uint32_t own_ping = 0x4d46'4452;

/// Passes the destination's messages to the source, unchanged, except the answer to the relay's own PING. What goes
/// wrong is told to the FirstFailure.
///
/// Threads: its own takes the answers; all methods are for others, any but where they say the main one.
class ReturnPath {
 public:
  /// `source`: its main connection.
  ReturnPath(const program::Link& source, const Forwarded& forwarded, FirstFailure& failure);
  ~ReturnPath() { join(); }

  /// Starts the thread. Params `destination`: its main connection, must outlive this object. `on_silence`: called twice
  /// a second on that thread while nothing comes; may throw Failure. Threads: the main one.
  void start(program::Link& destination, std::function<void()> on_silence);
  /// Waits until the thread has ended, or `limit` has passed, or `interrupt` (may be null) triggers. Returns whether the
  /// thread has ended.
  bool ends(std::chrono::milliseconds limit, const multifd::Interrupt* interrupt) const;
  /// Threads: the main one.
  void join();

  bool confirmed() const noexcept { return confirmed_; }
  bool destination_ended() const noexcept { return destination_ended_; }
  /// How far the answer got. Behind join().
  Answer answer() const;

  /// Called before the relay closes its end of the destination's main connection.
  void expect_end() noexcept { expect_end_ = true; }

  /// Notes a PING of the source that was sent on. Returns whether it is the first one. Threads: the main one.
  bool note_ping(std::uint32_t value) noexcept;
  /// Waits until the destination has answered the first PING of the source, if there was one, or the thread has ended.
  void wait_for_first_pong(std::chrono::milliseconds limit) const;
  /// Between that PING and its answer, in whole milliseconds; 0: unknown.
  std::chrono::milliseconds round_trip() const noexcept {
    return std::chrono::duration_cast<std::chrono::milliseconds>(round_trip_.load());
  }
  /// Waits until the destination has answered the relay's own PING, or the thread has ended. Returns whether it has
  /// answered.
  bool wait_for_own_pong(std::chrono::milliseconds limit) const;
  /// Whether the destination has answered the source anything.
  bool heard() const noexcept { return heard_; }

 private:
  using Clock = std::chrono::steady_clock;

  void run(program::Link& destination, const std::function<void()>& on_silence);
  void take(const multifd::qemu::ReturnMessage& message);

  const program::Link& source_;
  const Forwarded& forwarded_;
  FirstFailure& failure_;

  std::atomic<bool> confirmed_ = false;          ///< the destination sent SHUT(0)
  std::atomic<bool> refused_ = false;            ///< the destination sent SHUT with another status
  std::atomic<bool> destination_ended_ = false;  ///< the destination closed its main connection in order
  std::atomic<bool> expect_end_ = false;
  std::atomic<bool> heard_ = false;
  std::atomic<std::uint32_t> ping_value_ = 0;  ///< of the source's first PING
  std::atomic<Clock::time_point> pinged_{};    ///< when that PING was sent on; {}: never
  std::atomic<Clock::duration> round_trip_{};  ///< between that PING and its answer; 0: unknown
  multifd::Interrupt first_ponged_;
  multifd::Interrupt own_ponged_;
  multifd::Interrupt ended_;
  std::thread thread_;
};

}  // namespace relay
