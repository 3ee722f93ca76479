// SPDX-License-Identifier: MIT
//
// How the bytes of records are gathered, whichever library makes them: a walk over the caller's buffers, and the records
// that go out in one system call.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/detail/basic_tls_link.hpp"

namespace multifd::detail {

/// A walk over the bytes of some buffers.
class Pieces {
 public:
  explicit Pieces(std::span<const iovec> buffers) noexcept : buffers_(buffers) {}

  /// The next bytes that lie side by side, at most `most`; none at the end.
  std::span<std::byte> next(std::size_t most) noexcept {
    while (index_ < buffers_.size() && offset_ == buffers_[index_].iov_len) ++index_, offset_ = 0;
    if (index_ == buffers_.size()) return {};
    const std::size_t count = std::min(most, buffers_[index_].iov_len - offset_);
    auto* const at = static_cast<std::byte*>(buffers_[index_].iov_base) + offset_;
    offset_ += count;
    return {at, count};
  }

  void skip(std::size_t count) noexcept {
    while (count > 0) {
      const std::size_t passed = next(count).size();
      if (passed == 0) return;
      count -= passed;
    }
  }

 private:
  std::span<const iovec> buffers_;
  std::size_t index_ = 0;
  std::size_t offset_ = 0;
};

/// Memory for a direction that is used at all.
using TlsMemory = std::unique_ptr<std::byte[]>;

[[nodiscard]] inline Result<void> allocate(TlsMemory& memory, std::size_t size) noexcept {
  if (!memory) memory.reset(new (std::nothrow) std::byte[size]);
  if (!memory) return fail_errno(Stage::setup, "TLS records", ENOMEM);
  return {};
}

/// The most that a record carries, and what one call of the socket receives.
inline constexpr std::size_t tls_record_bytes = 16 * 1024;
inline constexpr std::size_t tls_receive_bytes = 256 * 1024;

/// Encrypted records that go out in one system call. Threads: the sending one.
class TlsBatch {
 public:
  /// Begins an empty one. Errors: ENOMEM, the first time.
  [[nodiscard]] Result<void> begin() noexcept {
    bytes_ = 0;
    return allocate(memory_, capacity);
  }

  /// How many full records the next batch should have. With a time limit one, because then it is one for each.
  std::size_t records(const TlsWait* wait) const noexcept { return wait != nullptr ? 1 : records_; }

  /// Where the next record goes, which has room for a full one with new keys ahead of it while records() are not reached.
  std::byte* room() noexcept { return memory_.get() + bytes_; }
  void add(std::size_t bytes) noexcept { bytes_ += bytes; }
  bool fits(std::size_t bytes) const noexcept { return bytes <= capacity - bytes_; }

  /// Sends all of it.
  [[nodiscard]] Result<void> send(TlsLink& link, const TlsWait* wait) noexcept {
    std::size_t calls = 0;
    for (std::span<const std::byte> left(memory_.get(), bytes_); !left.empty(); ++calls) {
      const iovec buffer = const_buffer(left);
      const auto sent = link.send(std::span(&buffer, 1), wait);
      if (!sent) return std::unexpected(sent.error());
      left = left.subspan(*sent);
    }
    bytes_ = 0;
    // A socket's call returns in parts when it takes long: then the bytes shall be seen to move, for a while.
    if (calls > 1) {
      records_ = 1;
      small_writes_ = 64;
    } else if (small_writes_ > 0) {
      --small_writes_;
    } else {
      records_ = std::min(2 * records_, most_records);
    }
    return {};
  }

 private:
  static constexpr std::size_t most_records = 8;
  static constexpr std::size_t capacity = most_records * (tls_record_bytes + 128);

  TlsMemory memory_;
  std::size_t bytes_ = 0;
  std::size_t records_ = 1;
  unsigned small_writes_ = 0;  ///< so many more do not grow
};

}  // namespace multifd::detail
