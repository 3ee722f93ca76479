// SPDX-License-Identifier: MIT
//
// The unit that passes from the producer to a worker: up to one packet of pages of one RAM block. Preallocated,
// swapped, never copied.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "multifd/config.hpp"
#include "multifd/limits.hpp"
#include "multifd/memory/page_buffer.hpp"
#include "multifd/memory/ram_block.hpp"

namespace multifd {

/// A packet that the format has encoded already; its bytes are written as they are.
struct Message {
  std::unique_ptr<std::byte[]> bytes;
  std::size_t size = 0;
};

/// N page offsets of one block. The worker partitions them in place: normal pages first, zero pages after, which is
/// the order of the packet's offset array. Pages that the producer knows to be zero are at the end already.
///
/// A batch that carries a message carries no pages.
///
/// Threads: one at a time. The hand-off passes ownership.
class PageBatch {
 public:
  BlockId block{};
  std::uint64_t epoch = 0;      ///< the epoch these pages belong to
  std::size_t known_zeros = 0;  ///< how many of the last offsets are zero pages
  bool copied = false;          ///< the bytes of the other pages are in `copies`
  PageBuffer copies;            ///< in the order of their offsets
  Message message{};            ///< instead of pages
  PageBatch* next = nullptr;    ///< the hand-off's: links batches that are empty

  /// `slots`: offsets of all pages that fit, memory owned by the hand-off that made the batch.
  explicit PageBatch(std::span<std::uint64_t> slots = {}) noexcept : slots_(slots) {}

  std::size_t size() const noexcept { return size_; }
  std::size_t capacity() const noexcept { return slots_.size(); }
  std::size_t room() const noexcept { return slots_.size() - size_; }
  bool empty() const noexcept { return size_ == 0 && !message.bytes; }
  bool full() const noexcept { return size_ == slots_.size(); }

  void push(std::uint64_t offset) noexcept { slots_[size_++] = offset; }

  /// Appends `count` adjacent pages; `count` must not exceed room().
  void push_run(std::uint64_t offset, std::size_t count, std::size_t page_bytes) noexcept {
    std::uint64_t* slot = slots_.data() + size_;
    for (std::size_t i = 0; i < count; ++i) slot[i] = offset + i * page_bytes;
    size_ += count;
  }

  /// Appends pages in any order; no more than room().
  void push_all(std::span<const std::uint64_t> offsets) noexcept {
    std::copy(offsets.begin(), offsets.end(), slots_.data() + size_);
    size_ += offsets.size();
  }

  /// Appends a page that is zero. Only zero pages may follow it.
  void push_zero(std::uint64_t offset) noexcept {
    push(offset);
    ++known_zeros;
  }

  void clear() noexcept {
    size_ = 0;
    known_zeros = 0;
    copied = false;
    message = {};
  }

  std::span<std::uint64_t> offsets() noexcept { return slots_.first(size_); }
  std::span<const std::uint64_t> offsets() const noexcept { return slots_.first(size_); }

 private:
  std::span<std::uint64_t> slots_;
  std::size_t size_ = 0;
};

}  // namespace multifd
