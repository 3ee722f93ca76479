// SPDX-License-Identifier: MIT
//
// The seam between the engine and a format. The engine takes batches, finds zero pages, gathers runs, keeps to the cap,
// counts, and gives batches back. An Outlet writes a channel's pages in its format: as packets on a stream, or at
// offsets of a file.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/engine/counters.hpp"
#include "multifd/engine/rate_limiter.hpp"
#include "multifd/memory/page_batch.hpp"
#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"

namespace multifd::engine {

/// Pages of one block and one epoch, no more than a batch holds. Valid until send() returns, but for `in_guest` bytes.
struct PageList {
  BlockId id{};
  const RamBlock& block;
  std::span<const std::uint64_t> offsets;  ///< normal pages first, zero pages behind them
  std::size_t normal_pages = 0;            ///< how many are not zero pages
  ConstBuffers runs;                       ///< their bytes, pages adjacent in memory merged; may change
  bool in_guest = false;                   ///< they lie in the guest's memory, and may be read until the peer has them
};

/// What one call of an outlet wrote: payload_bytes count page data, as it travels; wire_bytes count everything.
struct Sent {
  std::uint64_t payload_bytes = 0;
  std::uint64_t wire_bytes = 0;
};

/// A worker's counters, clock and bandwidth cap, for its outlet. Threads: the worker's.
class Meter {
 public:
  Meter(ChannelCounters& counters, RateLimiter& limiter) noexcept : counters_(counters), limiter_(limiter) {}

  /// Waits until the cap lets `bytes` more leave. Called by an outlet before it writes, for what it is about to write.
  /// Errors: Errc::cancelled when everything stops meanwhile; the outlet returns it.
  [[nodiscard]] Result<void> acquire(std::uint64_t bytes) noexcept {
    if (limiter_.rate() == 0) return {};
    const bool granted = limiter_.acquire(bytes);
    clock_.lap(counters_.capped_ns);
    return granted ? Result<void>{} : fail(Errc::cancelled, Stage::write);
  }

  /// How much of `bytes` to ask for at once: RateLimiter::piece().
  std::size_t piece(std::size_t bytes) const noexcept { return limiter_.piece(bytes); }

  /// Called by an outlet as often as bytes leave, also for a part of what it writes. Without such calls a write that takes
  /// longer than SenderOptions::progress_timeout counts as standing still.
  void moved(std::size_t bytes) noexcept { counters_.moved_bytes.add(bytes); }

  // Each adds the time since the call before to the stage that it names; wrote() returns it, too. A worker calls the first
  // two, its outlet the others.
  void idled() noexcept { clock_.lap(counters_.idle_ns); }
  void checked() noexcept { clock_.lap(counters_.check_ns); }
  void encoded() noexcept { clock_.lap(counters_.codec_ns); }
  std::chrono::nanoseconds wrote() noexcept { return clock_.lap(counters_.io_ns); }

  /// Starts the clock.
  void begin() noexcept { clock_ = {}; }
  ChannelCounters& counters() noexcept { return counters_; }

 private:
  ChannelCounters& counters_;
  RateLimiter& limiter_;
  StageClock clock_;
};

template <class O>
concept HasBeginOutlet = requires(O& outlet) {
  { outlet.begin() } noexcept -> std::same_as<Result<Sent>>;
};

template <class O>
concept HasSend = requires(O& outlet, const PageList& pages, Meter& meter) {
  { outlet.send(pages, meter) } noexcept -> std::same_as<Result<Sent>>;
};

template <class O>
concept HasPushOut = requires(O& outlet, Meter& meter) {
  { outlet.push_out(meter) } noexcept -> std::same_as<Result<void>>;
};

template <class O>
concept HasCloseEpoch = requires(O& outlet, std::uint64_t epoch, Meter& meter) {
  { outlet.close_epoch(epoch, meter) } noexcept -> std::same_as<Result<Sent>>;
};

template <class O>
concept HasEnd = requires(O& outlet) {
  { outlet.end() } noexcept -> std::same_as<Result<void>>;
};

template <class O>
concept HasOutletShutdown = requires(O& outlet) {
  { outlet.shutdown() } noexcept;
};

/// Writes one channel's pages in some format.
///
/// Semantics:
///   `begin()` comes once, before everything; then send(), push_out() and close_epoch() in any number; `end()` comes last,
///     and only if no call failed.
///   `send(pages, meter)`: all pages of a list belong to one epoch. Before it writes, it asks `meter.acquire()` for what it
///     is about to write: that is the bandwidth cap. List and bytes are the engine's again when it returns.
///   `push_out(meter)`: the outlet may hold bytes back until its next call; push_out() is called before the worker waits
///     for more work, and writes them.
///   `close_epoch(n, meter)`: pages sent before belong to epoch n or an earlier one, pages sent after it to a later one.
///     Other channels may still write pages of epoch n then. A format whose reader does not order epochs, as the reader of
///     packets does, has to wait in close_epoch() until every channel has come to it.
///   `shutdown()` ends a call that blocks, now and from now on, bounded; any number of times.
///   Sent::wire_bytes counts all that a call has written or holds back, payload_bytes the page data among them.
/// Errors: whatever any of them returns ends the transfer, on all channels. Errc::cancelled, or what the stream says, from
///   a call that shutdown() ends.
/// Threads: one, the channel's worker; but shutdown() from any.
/// Cost: nothing may be allocated after it was made.
/// Models: packets::Outlet. Exemplar: tests/exemplar/file_outlet.hpp, which writes no packets.
///   Contract: multifd/testing/outlet_contract.hpp.
template <class O>
concept Outlet = std::move_constructible<O> && HasBeginOutlet<O> && HasSend<O> && HasPushOut<O> && HasCloseEpoch<O> &&
                 HasEnd<O> && HasOutletShutdown<O>;

/// Fails to compile with a message that says which member to write.
template <class O>
consteval bool check_outlet() {
  static_assert(std::move_constructible<O>, "Outlet: needs a move constructor");
  static_assert(HasBeginOutlet<O>, "Outlet: needs  Result<Sent> begin() noexcept");
  static_assert(HasSend<O>, "Outlet: needs  Result<Sent> send(const PageList&, Meter&) noexcept");
  static_assert(HasPushOut<O>, "Outlet: needs  Result<void> push_out(Meter&) noexcept");
  static_assert(HasCloseEpoch<O>, "Outlet: needs  Result<Sent> close_epoch(std::uint64_t epoch, Meter&) noexcept");
  static_assert(HasEnd<O>, "Outlet: needs  Result<void> end() noexcept");
  static_assert(HasOutletShutdown<O>, "Outlet: needs  void shutdown() noexcept");
  return Outlet<O>;
}

/// Optional: an outlet for messages, bytes that travel among the pages in no order with them.
template <class O>
concept HasMessages = requires(O& outlet, const Message& message, Meter& meter) {
  { outlet.send_message(message, meter) } noexcept -> std::same_as<Result<Sent>>;
};

/// Optional: an outlet whose other end answers. confirmation() comes after end(), and waits until the other end says
/// that everything has arrived. reason() returns the error that the other end may have sent before it broke the channel
/// off.
template <class O>
concept HasAnswer = requires(O& outlet) {
  { outlet.confirmation() } noexcept -> std::same_as<Result<void>>;
  { outlet.reason() } noexcept -> std::same_as<std::optional<Error>>;
};

/// Optional: an outlet whose connection may be lost and made again. `comes_back(error)`: whether what a call has failed with
/// is such a loss. `drop_link()` makes one, from any thread. `check_link()` fails where the connection has ended, while nothing is written. `reconnect(error)` blocks until there is a new connection; Errc::cancelled behind shutdown(), and when none
/// is needed any more. `begin_at(epoch)` takes begin()'s place on it: all pages that come are of that epoch or later.
template <class O>
concept HasReconnect = requires(O& outlet, const Error& error, std::uint64_t epoch) {
  { outlet.comes_back(error) } noexcept -> std::same_as<bool>;
  { outlet.drop_link() } noexcept -> std::same_as<void>;
  { outlet.check_link() } noexcept -> std::same_as<Result<void>>;
  { outlet.reconnect(error) } noexcept -> std::same_as<Result<void>>;
  { outlet.begin_at(epoch) } noexcept -> std::same_as<Result<Sent>>;
};

}  // namespace multifd::engine
