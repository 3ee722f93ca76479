// SPDX-License-Identifier: MIT
//
// FaultTransport: wraps any transport and injects a fault. Fail operation 0, 1, 2 ... until a run succeeds: then every
// error path has been taken once.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <thread>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::testing {

/// How an operation goes wrong.
enum class FaultKind : unsigned char {
  fail,  ///< it fails, and so does every later one. The stream below stays whole, so that the code under test decides
         ///< what the peer sees
  cut,   ///< the same, but the stream below is shut down
  end,   ///< the stream ends in order where it should not. A read, and every later one, returns the end. A write sends
         ///< half of its bytes and finishes the stream below; this write and every later one fail
  shorten,  ///< it transfers one byte
  delay,    ///< it waits for `fault_delay` first
};

/// Which fault is injected. Default: none.
struct FaultOptions {
  static constexpr std::uint64_t never = std::numeric_limits<std::uint64_t>::max();

  /// The number of the read, write or finish, counted from 0, that goes wrong. Default: none does.
  std::uint64_t fail_at = never;
  /// How it goes wrong. Default: it fails, and the stream below stays whole.
  FaultKind kind = FaultKind::fail;
  /// The error of a failure. Default: EIO. Without a stage it gets the operation's.
  Error error = {.code = std::error_code(EIO, std::system_category()), .stage = Stage::none, .op = "injected fault"};
  /// How long FaultKind::delay waits.
  std::chrono::microseconds fault_delay = std::chrono::milliseconds(2);

  /// Counts the operations of several transports together; not owned. Null: each counts its own.
  std::atomic<std::uint64_t>* operations = nullptr;

  /// The most bytes that one call transfers.
  std::size_t max_io_bytes = std::numeric_limits<std::size_t>::max();

  /// A wait before each operation; shutdown() does not shorten it.
  std::chrono::microseconds delay = std::chrono::microseconds(0);

  /// After so many bytes, read and written together, the stream below is shut down and every call fails with
  /// `peer_closed`.
  std::uint64_t cut_after_bytes = never;
};

/// A Transport that forwards every call to another one, with the faults of its options.
/// Errors: FaultOptions::error; those of the transport below. Threads: as the transport below.
template <Transport Next>
class FaultTransport {
 public:
  explicit FaultTransport(Next next, FaultOptions options = {})
      : next_(std::move(next)), options_(options), state_(std::make_unique<State>()) {}

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return transfer(Stage::write, buffers, [this](ConstBuffers some) noexcept { return next_.write_some(some); });
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return transfer(Stage::read, buffers, [this](MutableBuffers some) noexcept { return next_.read_some(some); });
  }
  [[nodiscard]] Result<void> finish() noexcept {
    if (is_hit()) break_off(Stage::close, {}, [](ConstBuffers) noexcept {});
    if (is_broken()) return std::unexpected(error(Stage::close));
    return next_.finish();
  }
  void shutdown() noexcept { next_.shutdown(); }

  /// Answers, where the transport below has them; without faults.
  bool is_two_way() const noexcept
    requires HasAnswers<Next>
  {
    return next_.is_two_way();
  }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept
    requires HasAnswers<Next>
  {
    return next_.write_now(buffers);
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept
    requires HasAnswers<Next>
  {
    return next_.read_now(buffers);
  }

  /// Reads, writes and finishes so far, of this transport alone.
  std::uint64_t operation_count() const noexcept { return state_->operations.load(std::memory_order_relaxed); }

 private:
  /// On the heap, so that a transport whose counters are atomic can move.
  struct State {
    std::atomic<std::uint64_t> operations = 0;
    std::atomic<std::uint64_t> bytes = 0;
    std::atomic<bool> broken = false;
  };

  // Relaxed throughout: each counter stands for itself.

  /// Counts an operation. Returns whether it is the one that goes wrong.
  bool is_hit() noexcept {
    std::uint64_t number = state_->operations.fetch_add(1, std::memory_order_relaxed);
    if (options_.operations) number = options_.operations->fetch_add(1, std::memory_order_relaxed);
    if (options_.delay.count() > 0) std::this_thread::sleep_for(options_.delay);
    return number == options_.fail_at;
  }

  /// Applies the fault to the stream; `write(part)` sends some bytes to the peer.
  template <class Write>
  void break_off(Stage stage, std::span<const iovec> buffers, Write&& write) noexcept {
    switch (options_.kind) {
      case FaultKind::shorten: return;
      case FaultKind::delay: std::this_thread::sleep_for(options_.fault_delay); return;
      case FaultKind::fail: break;
      case FaultKind::cut: next_.shutdown(); break;
      case FaultKind::end:
        if (stage == Stage::read) break;
        if (const std::size_t half = total_bytes(buffers) / 2; half > 0) {
          const iovec some = front(buffers, half);
          write(std::span(&some, 1));
        }
        (void)next_.finish();
        break;
    }
    state_->broken.store(true, std::memory_order_relaxed);
  }

  bool is_broken() const noexcept { return state_->broken.load(std::memory_order_relaxed); }

  Error error(Stage stage) const noexcept {
    Error error = options_.error;
    if (error.stage == Stage::none) error.stage = stage;
    return error;
  }

  /// At most `limit` bytes: every transport may transfer less than it is asked to.
  static iovec front(std::span<const iovec> buffers, std::uint64_t limit) noexcept {
    while (buffers.front().iov_len == 0) buffers = buffers.subspan(1);
    iovec some = buffers.front();
    some.iov_len = static_cast<std::size_t>(std::min<std::uint64_t>(some.iov_len, limit));
    return some;
  }

  template <class Call>
  [[nodiscard]] Result<std::size_t> transfer(Stage stage, std::span<const iovec> buffers, Call call) noexcept {
    const bool hit = is_hit();
    if (hit) break_off(stage, buffers, [&](ConstBuffers some) noexcept { (void)call(some); });
    if (is_broken()) {
      if (options_.kind == FaultKind::end && stage == Stage::read) return std::size_t{0};
      return std::unexpected(error(stage));
    }
    const std::uint64_t moved = state_->bytes.load(std::memory_order_relaxed);
    const std::uint64_t room = options_.cut_after_bytes - std::min(options_.cut_after_bytes, moved);
    if (room == 0) {
      next_.shutdown();
      return fail(Errc::peer_closed, stage, "injected cut");
    }
    std::uint64_t limit = std::min<std::uint64_t>(options_.max_io_bytes, room);
    if (hit && options_.kind == FaultKind::shorten) limit = 1;
    iovec shortened;
    if (total_bytes(buffers) > limit) {
      shortened = front(buffers, limit);
      buffers = std::span(&shortened, 1);
    }
    Result<std::size_t> count = call(buffers);
    if (count) state_->bytes.fetch_add(*count, std::memory_order_relaxed);
    return count;
  }

  Next next_;
  FaultOptions options_;
  std::unique_ptr<State> state_;
};

}  // namespace multifd::testing
