// SPDX-License-Identifier: MIT
//
// Capped: a cap on what leaves by one path, for all of its channels together, and the path's counters. It wraps any
// transport; the cap can change while the channels run. Where paths come from: connect_paths.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/engine/rate_limiter.hpp"
#include "multifd/result.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd {

/// What the channels of one path share: its cap, and how many bytes have passed. Threads: any, all methods.
class PathShared {
 public:
  /// Params `bytes_per_s`: the cap; 0: none.
  explicit PathShared(std::uint64_t bytes_per_s = 0) noexcept : limiter_(bytes_per_s) {}

  /// Sets the cap; 0 lifts it. Channels that wait go by the new cap at once. May block, for a moment.
  void set_rate(std::uint64_t bytes_per_s) noexcept { limiter_.set_rate(bytes_per_s); }
  /// In bytes/s; 0: none. Wait-free.
  std::uint64_t rate() const noexcept { return limiter_.rate(); }
  /// Whether a channel waits for the cap just now. Wait-free.
  bool holds_back() const noexcept { return limiter_.holds_back(); }

  /// Bytes that the path's connections have taken, and brought, so far. Relaxed: whoever asks looks again soon. Wait-free.
  std::uint64_t written_bytes() const noexcept { return written_.load(std::memory_order_relaxed); }
  std::uint64_t read_bytes() const noexcept { return read_.load(std::memory_order_relaxed); }

 private:
  template <Transport>
  friend class Capped;

  engine::RateLimiter limiter_;
  alignas(cache_line) std::atomic<std::uint64_t> written_{0};
  alignas(cache_line) std::atomic<std::uint64_t> read_{0};
};

/// A Transport whose writes keep to the cap of its path, and whose bytes are counted there.
///
/// The cap counts what is written into `Next`: above TLS that is the stream's bytes, without TLS' own; below it all of
/// them. Within any second it holds to about a hundredth. Reads are counted, not capped. write_now(), which never waits,
/// is not held back either: what it writes counts, and the next writes wait for it. finish() is not held back.
/// To a Sender a write that waits for the cap is one that waits for the link: SenderOptions::progress_timeout counts on, so a
/// cap has to let 512 bytes of a channel pass within it.
/// Optional parts: those that `Next` has; a wait with a time limit includes that for the cap.
/// Errors: those of `Next`; `cancelled` for a write that waits for the cap when shutdown() comes.
/// Threads: as Transport. shutdown() ends a wait for the cap at once, of this connection alone.
/// Lifetime: the connections of a path hold its PathShared together; it ends with the last of them, or of whoever else has
///   it.
/// Cost: without a cap one relaxed load and one relaxed addition a call. Under one a mutex a call as well, and a write is
///   cut into pieces of a hundredth of a second, 512 bytes to 64 KiB. Nothing is allocated.
/// Example:
///
///     auto path = std::make_shared<multifd::PathShared>(100'000'000);
///     using Link = multifd::Capped<multifd::FdTransport>;
///     Link link(std::move(*connected), path);
///     path->set_rate(0);  // later, from any thread
template <Transport Next>
class Capped {
 public:
  /// Params `path`: not null.
  Capped(Next next, std::shared_ptr<PathShared> path) noexcept(std::is_nothrow_move_constructible_v<Next>)
      : next_(std::move(next)), path_(std::move(path)) {
    MULTIFD_ASSERT(path_ != nullptr);
  }

  Capped(Capped&& other) noexcept(std::is_nothrow_move_constructible_v<Next>)
      : next_(std::move(other.next_)),
        path_(std::move(other.path_)),
        shut_down_(other.shut_down_.load(std::memory_order_relaxed)) {}
  Capped& operator=(Capped&& other) noexcept(std::is_nothrow_move_assignable_v<Next>) {
    next_ = std::move(other.next_);
    path_ = std::move(other.path_);
    shut_down_.store(other.shut_down_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    return *this;
  }
  ~Capped() = default;

  /// The transport inside. Threads: as its methods.
  Next& next() noexcept { return next_; }
  const Next& next() const noexcept { return next_; }
  /// Its path; null when moved from.
  const std::shared_ptr<PathShared>& path() const noexcept { return path_; }

  // The Transport policy, and its optional parts: policy.hpp.

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    if (path_->rate() == 0) return written(next_.write_some(buffers));
    return write_piece(buffers, Clock::time_point::max(), nullptr,
                       [this](ConstBuffers piece, Clock::time_point) { return next_.write_some(piece); });
  }
  /// Under a cap, which is what costs time then, the bytes are copied.
  [[nodiscard]] Result<std::size_t> write_pinned(ConstBuffers buffers) noexcept
    requires HasPinnedWrites<Next>
  {
    return pins() ? written(next_.write_pinned(buffers)) : write_some(buffers);
  }
  bool pins() const noexcept
    requires HasPinnedWrites<Next>
  {
    return path_->rate() == 0 && next_.pins();
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return read(next_.read_some(buffers));
  }
  [[nodiscard]] Result<std::size_t> read_full(MutableBuffers buffers) noexcept
    requires HasReadFull<Next>
  {
    return read(next_.read_full(buffers));
  }
  [[nodiscard]] Result<void> finish() noexcept { return next_.finish(); }
  void shutdown() noexcept {
    // Relaxed: the limiter's mutex, which wake() takes, makes it seen by who waits.
    shut_down_.store(true, std::memory_order_relaxed);
    next_.shutdown();
    if (path_) path_->limiter_.wake();
  }

  bool is_two_way() const noexcept
    requires HasAnswers<Next>
  {
    return next_.is_two_way();
  }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept
    requires HasAnswers<Next>
  {
    auto count = written(next_.write_now(buffers));
    if (count) path_->limiter_.charge(*count);
    return count;
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept
    requires HasAnswers<Next>
  {
    return read(next_.read_now(buffers));
  }

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers, std::chrono::milliseconds timeout,
                                               const Interrupt* interrupt) noexcept
    requires HasTimeLimits<Next>
  {
    if (path_->rate() == 0) return written(next_.write_some(buffers, timeout, interrupt));
    return write_piece(buffers, deadline_after(timeout), interrupt,
                       [this, interrupt](ConstBuffers piece, Clock::time_point deadline) {
                         return next_.write_some(piece, time_left(deadline), interrupt);
                       });
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers, std::chrono::milliseconds timeout,
                                              const Interrupt* interrupt) noexcept
    requires HasTimeLimits<Next>
  {
    return read(next_.read_some(buffers, timeout, interrupt));
  }

  /// The descriptor of the transport inside, still owned by that.
  int native_handle() const noexcept
    requires requires(const Next& next) { next.native_handle(); }
  {
    return next_.native_handle();
  }
  /// Whether the descriptor carries TLS records: AnyTransport::secured().
  bool secured() const noexcept
    requires requires(const Next& next) { next.secured(); }
  {
    return next_.secured();
  }
  /// Protocol and cipher of a connection under TLS: AnyTransport::cipher().
  std::string cipher() const
    requires requires(const Next& next) { next.cipher(); }
  {
    return next_.cipher();
  }

  /// peek_magic() of the transport inside: listen.hpp, tls.hpp.
  [[nodiscard]] friend auto peek_magic(Capped& transport, std::chrono::milliseconds timeout,
                                       const Interrupt* interrupt = nullptr) noexcept
    requires requires(Next& next) { peek_magic(next, timeout, interrupt); }
  {
    return peek_magic(transport.next_, timeout, interrupt);
  }

 private:
  using Clock = std::chrono::steady_clock;
  /// A piece of 64 KiB in pages of 4 KiB, with headers between them.
  static constexpr std::size_t most_buffers = 32;

  [[nodiscard]] Result<std::size_t> written(Result<std::size_t> count) noexcept {
    if (count) path_->written_.fetch_add(*count, std::memory_order_relaxed);
    return count;
  }
  [[nodiscard]] Result<std::size_t> read(Result<std::size_t> count) noexcept {
    if (count) path_->read_.fetch_add(*count, std::memory_order_relaxed);
    return count;
  }

  static std::chrono::milliseconds time_left(Clock::time_point deadline) noexcept {
    if (deadline == Clock::time_point::max()) return no_timeout;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    return std::max(left, std::chrono::milliseconds(0));
  }

  /// Writes as much as the cap grants at once. Params `write(piece, deadline)`: the call of the transport inside.
  template <class Write>
  [[nodiscard]] Result<std::size_t> write_piece(ConstBuffers buffers, Clock::time_point deadline,
                                                const Interrupt* interrupt, Write write) noexcept {
    std::array<iovec, most_buffers> room;
    const std::span<const iovec> piece = front_of(buffers, path_->limiter_.piece(total_bytes(buffers)), room);
    const std::size_t bytes = total_bytes(piece);
    const auto ended = [&] {
      return shut_down_.load(std::memory_order_relaxed) || (interrupt != nullptr && interrupt->triggered());
    };
    // Nothing wakes the limiter when an Interrupt triggers, so it is asked more often.
    constexpr std::chrono::milliseconds often{20};
    const engine::Grant grant =
        path_->limiter_.acquire(bytes, deadline, ended, interrupt != nullptr ? often : engine::Monitor::longest_wait);
    if (grant == engine::Grant::timed_out) return fail(Errc::timed_out, Stage::write, "write");
    if (grant == engine::Grant::ended) return fail(Errc::cancelled, Stage::write, "write");
    auto count = written(write(piece, deadline));
    if (const std::size_t gone = count.value_or(0); gone < bytes) path_->limiter_.give_back(bytes - gone);
    return count;
  }

  /// The first `bytes` bytes of `buffers`, or fewer when they are in many buffers; at least one byte, if there is one.
  static std::span<const iovec> front_of(ConstBuffers buffers, std::size_t bytes,
                                         std::array<iovec, most_buffers>& room) noexcept {
    std::size_t count = 0;
    for (const iovec& buffer : buffers) {
      if (count == room.size() || bytes == 0) break;
      if (buffer.iov_len == 0) continue;
      room[count] = {buffer.iov_base, std::min(buffer.iov_len, bytes)};
      bytes -= room[count++].iov_len;
    }
    return {room.data(), count};
  }

  Next next_;
  std::shared_ptr<PathShared> path_;
  std::atomic<bool> shut_down_ = false;
};

}  // namespace multifd
