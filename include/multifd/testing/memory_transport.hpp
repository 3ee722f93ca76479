// SPDX-License-Identifier: MIT
//
// Two connected transports without an operating system between them, for tests: each direction is a bounded ring under
// a monitor. The ends behave as with TCP: after finish() the peer reads everything and then 0; shutdown(), and a
// destructor without finish(), break the stream at once and drop the bytes in it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "multifd/buffers.hpp"
#include "multifd/config.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::testing {

struct MemoryTransportOptions {
  /// The most bytes that one call transfers; 1 splits everything at every byte.
  std::size_t max_io_bytes = std::numeric_limits<std::size_t>::max();
};

namespace detail {

/// One direction.
class MemoryPipe {
 public:
  explicit MemoryPipe(std::size_t capacity_bytes) : ring_(capacity_bytes) {}

  enum class Wait : unsigned char { yes, no };

  [[nodiscard]] Result<std::size_t> write(ConstBuffers buffers, std::size_t limit, Wait wait = Wait::yes) noexcept {
    if (total_bytes(buffers) == 0) return std::size_t{0};
    auto held = monitor_.lock();
    const auto writable = [&] { return cut_ != Cut::none || finished_ || used_ < ring_.size(); };
    if (wait == Wait::no && !writable()) return std::size_t{0};
    monitor_.wait(held, writable);
    if (cut_ != Cut::none) return broken(Stage::write, "write", Cut::by_writer);
    if (finished_) return fail(Errc::already_closed, Stage::write, "write");
    limit = std::min(limit, ring_.size() - used_);
    std::size_t done = 0;
    for (const iovec& buffer : buffers) {
      const std::size_t bytes = std::min(buffer.iov_len, limit - done);
      copy_in(static_cast<const std::byte*>(buffer.iov_base), bytes);
      done += bytes;
      if (done == limit) break;
    }
    monitor_.notify();
    return done;
  }

  [[nodiscard]] Result<std::size_t> read(MutableBuffers buffers, std::size_t limit, Wait wait = Wait::yes) noexcept {
    if (total_bytes(buffers) == 0) return std::size_t{0};
    auto held = monitor_.lock();
    const auto readable = [&] { return cut_ != Cut::none || finished_ || used_ > 0; };
    if (wait == Wait::no && !readable()) return std::size_t{0};
    monitor_.wait(held, readable);
    if (cut_ != Cut::none) return broken(Stage::read, "read", Cut::by_reader);
    limit = std::min(limit, used_);  // 0 here: finished, and all of it was read
    std::size_t done = 0;
    for (const iovec& buffer : buffers) {
      const std::size_t bytes = std::min(buffer.iov_len, limit - done);
      copy_out(static_cast<std::byte*>(buffer.iov_base), bytes);
      done += bytes;
      if (done == limit) break;
    }
    monitor_.notify();
    return done;
  }

  [[nodiscard]] Result<void> finish() noexcept {
    const auto held = monitor_.lock();
    if (cut_ != Cut::none) return broken(Stage::close, "finish", Cut::by_writer);
    finished_ = true;
    monitor_.notify();
    return {};
  }

  enum class Cut : unsigned char { none, by_writer, by_reader };

  void cut(Cut side) noexcept {
    const auto held = monitor_.lock();
    cut_locked(side);
  }

  void close_writer() noexcept {
    const auto held = monitor_.lock();
    if (!finished_) cut_locked(Cut::by_writer);
  }

 private:
  void cut_locked(Cut side) noexcept {
    if (cut_ == Cut::none) cut_ = side;
    monitor_.notify();
  }

  std::unexpected<Error> broken(Stage stage, const char* op, Cut self) const noexcept {
    return fail(cut_ == self ? Errc::cancelled : Errc::peer_closed, stage, op);
  }

  void copy_in(const std::byte* from, std::size_t bytes) noexcept {
    if (bytes == 0) return;  // an empty buffer may have a null pointer, which memcpy must not get
    const std::size_t end = (begin_ + used_) % ring_.size();
    const std::size_t first = std::min(bytes, ring_.size() - end);
    std::memcpy(ring_.data() + end, from, first);
    if (bytes > first) std::memcpy(ring_.data(), from + first, bytes - first);
    used_ += bytes;
  }

  void copy_out(std::byte* to, std::size_t bytes) noexcept {
    if (bytes == 0) return;
    const std::size_t first = std::min(bytes, ring_.size() - begin_);
    std::memcpy(to, ring_.data() + begin_, first);
    if (bytes > first) std::memcpy(to + first, ring_.data(), bytes - first);
    begin_ = (begin_ + bytes) % ring_.size();
    used_ -= bytes;
  }

  engine::Monitor monitor_;
  std::vector<std::byte> ring_;
  std::size_t begin_ = 0;
  std::size_t used_ = 0;
  bool finished_ = false;
  Cut cut_ = Cut::none;
};

}  // namespace detail

/// One end of an in-memory connection.
/// Errors: `peer_closed` when the other end was shut down or destroyed, `cancelled` after this end's shutdown(),
///   `already_closed` for a write after finish().
/// Threads: one writes, one reads; shutdown() from any while they do.
/// Lifetime: the destructor closes; without finish() before, the other end sees a broken stream.
class MemoryTransport {
 public:
  MemoryTransport(MemoryTransport&&) noexcept = default;
  MemoryTransport& operator=(MemoryTransport&& other) noexcept {
    if (this == &other) return *this;
    close();
    out_ = std::move(other.out_);
    in_ = std::move(other.in_);
    options_ = other.options_;
    return *this;
  }
  ~MemoryTransport() { close(); }

  [[nodiscard]] Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    return out_->write(buffers, options_.max_io_bytes);
  }
  [[nodiscard]] Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    return in_->read(buffers, options_.max_io_bytes);
  }

  bool is_two_way() const noexcept { return true; }
  [[nodiscard]] Result<std::size_t> write_now(ConstBuffers buffers) noexcept {
    return out_->write(buffers, options_.max_io_bytes, detail::MemoryPipe::Wait::no);
  }
  [[nodiscard]] Result<std::size_t> read_now(MutableBuffers buffers) noexcept {
    return in_->read(buffers, options_.max_io_bytes, detail::MemoryPipe::Wait::no);
  }

  [[nodiscard]] Result<void> finish() noexcept { return out_->finish(); }

  void shutdown() noexcept {
    if (!out_) return;  // moved from
    out_->cut(detail::MemoryPipe::Cut::by_writer);
    in_->cut(detail::MemoryPipe::Cut::by_reader);
  }

 private:
  friend std::pair<MemoryTransport, MemoryTransport> memory_transport_pair(std::size_t, MemoryTransportOptions);

  MemoryTransport(std::shared_ptr<detail::MemoryPipe> out, std::shared_ptr<detail::MemoryPipe> in,
                  MemoryTransportOptions options) noexcept
      : out_(std::move(out)), in_(std::move(in)), options_(options) {}

  void close() noexcept {
    if (!out_) return;
    out_->close_writer();
    in_->cut(detail::MemoryPipe::Cut::by_reader);  // no read will follow
    out_.reset();
    in_.reset();
  }

  std::shared_ptr<detail::MemoryPipe> out_;
  std::shared_ptr<detail::MemoryPipe> in_;
  MemoryTransportOptions options_;
};

static_assert(check_transport<MemoryTransport>());

/// Makes two connected ends. Params `capacity_bytes`: how much each direction holds before a writer waits, at least 1.
[[nodiscard]] inline std::pair<MemoryTransport, MemoryTransport> memory_transport_pair(
    std::size_t capacity_bytes, MemoryTransportOptions options = {}) {
  MULTIFD_ASSERT(capacity_bytes > 0 && options.max_io_bytes > 0);
  auto forth = std::make_shared<detail::MemoryPipe>(capacity_bytes);
  auto back = std::make_shared<detail::MemoryPipe>(capacity_bytes);
  return {MemoryTransport(forth, back, options), MemoryTransport(back, forth, options)};
}

}  // namespace multifd::testing
