// SPDX-License-Identifier: MIT
//
// FaultTransport: any transport with something going wrong. Count the operations of a good run, then fail
// operation 0, 1, 2 ... until a run succeeds, and every error path has been taken once.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <utility>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::testing {

/// What goes wrong. By default nothing does.
struct FaultOptions {
  static constexpr std::uint64_t never = std::numeric_limits<std::uint64_t>::max();

  /// This read, write or finish, counted from 0, fails with `error`, and so does every later one of this
  /// transport. The stream below stays whole: what the peer sees is up to the code under test.
  std::uint64_t fail_at = never;
  Error error = {.code = std::error_code(EIO, std::system_category()), .stage = Stage::none, .op = "injected fault"};

  /// Counts the operations of several transports together; not owned. Null: each counts its own.
  std::atomic<std::uint64_t>* operations = nullptr;

  /// The most that one call moves.
  std::size_t max_io_bytes = std::numeric_limits<std::size_t>::max();

  /// Waits before each operation; shutdown() does not shorten it.
  std::chrono::microseconds delay = std::chrono::microseconds(0);

  /// After so many bytes, read and written together, the stream below is shut down and every call fails with
  /// `peer_closed`.
  std::uint64_t cut_after_bytes = never;
};

/// A Transport that passes everything on to another one, except what its options say.
/// Threads: as the transport below.
template <Transport Next>
class FaultTransport {
 public:
  explicit FaultTransport(Next next, FaultOptions options = {})
      : next_(std::move(next)), options_(options), state_(std::make_unique<State>()) {}

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return transfer(Stage::write, buffers, [this](ConstBuffers some) noexcept { return next_.write_some(some); });
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return transfer(Stage::read, buffers, [this](MutableBuffers some) noexcept { return next_.read_some(some); });
  }
  Result<void> finish() noexcept {
    if (std::optional<Error> fault = next_fault()) return std::unexpected(*fault);
    return next_.finish();
  }
  void shutdown() noexcept { next_.shutdown(); }

  /// Reads, writes and finishes so far, of this transport alone.
  std::uint64_t operation_count() const noexcept { return state_->operations.load(std::memory_order_relaxed); }

 private:
  /// On the heap, so that a transport whose counters are atomic can move.
  struct State {
    std::atomic<std::uint64_t> operations = 0;
    std::atomic<std::uint64_t> bytes = 0;
    std::atomic<bool> failed = false;
  };

  // Relaxed throughout: each counter stands for itself.
  std::optional<Error> next_fault() noexcept {
    std::uint64_t number = state_->operations.fetch_add(1, std::memory_order_relaxed);
    if (options_.operations) number = options_.operations->fetch_add(1, std::memory_order_relaxed);
    if (options_.delay.count() > 0) std::this_thread::sleep_for(options_.delay);
    if (number == options_.fail_at) state_->failed.store(true, std::memory_order_relaxed);
    if (state_->failed.load(std::memory_order_relaxed)) return options_.error;
    return std::nullopt;
  }

  template <class Call>
  Result<std::size_t> transfer(Stage stage, std::span<const iovec> buffers, Call call) noexcept {
    if (std::optional<Error> fault = next_fault()) return std::unexpected(*fault);
    const std::uint64_t moved = state_->bytes.load(std::memory_order_relaxed);
    const std::uint64_t room = options_.cut_after_bytes - std::min(options_.cut_after_bytes, moved);
    if (room == 0) {
      next_.shutdown();
      return fail(Errc::peer_closed, stage, "injected cut");
    }
    const std::uint64_t limit = std::min<std::uint64_t>(options_.max_io_bytes, room);
    iovec shortened;
    if (total_bytes(buffers) > limit) {
      // The first bytes are enough: moving less than asked is every transport's right.
      while (buffers.front().iov_len == 0) buffers = buffers.subspan(1);
      shortened = buffers.front();
      shortened.iov_len = static_cast<std::size_t>(std::min<std::uint64_t>(shortened.iov_len, limit));
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
