// SPDX-License-Identifier: MIT
//
// Bytes at offsets, wherever they come from: a file as it is, or one that is decompressed on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "multifd/result.hpp"

namespace multifd::image {

/// A range of bytes of a file.
struct Extent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;

  std::uint64_t end() const noexcept { return offset + bytes; }
  friend bool operator==(const Extent&, const Extent&) = default;
};

/// What an image is read from. A base class and not a policy: each call reads many pages, and a program learns only from
/// the file which of them it is.
///
/// Threads: any number, all calls.
/// Lifetime: the destructor waits for nothing; no call may be under way.
/// Models: File, SeekableZstd.
class RandomAccess {
 public:
  RandomAccess() = default;
  RandomAccess(RandomAccess&&) = default;
  RandomAccess& operator=(RandomAccess&&) = default;
  virtual ~RandomAccess() = default;

  /// Size of the whole.
  virtual std::uint64_t bytes() const noexcept = 0;

  /// Fills all of `to`.
  /// Errors: Errc::truncated_image (the end comes first; detail: where the read began); those of the source.
  [[nodiscard]] Result<void> read(std::uint64_t offset, std::span<std::byte> to) const noexcept {
    return do_read(offset, to);
  }

  /// The first extent at or behind `from` that may hold other bytes than 0, cut at the end; bytes == 0: there is none.
  /// Errors: those of the source: errno. Cost: no byte is read.
  [[nodiscard]] Result<Extent> next_data(std::uint64_t from) const noexcept { return do_next_data(from); }

  /// What is best read with one byte: the frame that is decompressed for it; of a file, as much as takes little longer.
  /// bytes == 0: nothing but the byte.
  /// Params: `offset`: less than bytes() (contract). Cost: none of reading.
  virtual Extent read_together(std::uint64_t offset) const noexcept { return {.offset = offset}; }

  /// The same bytes for a thread that reads small pieces, beside others that do, and waits for none of them: what it has
  /// decompressed last stays its own. Null: this object is as good, since nothing of it is decompressed.
  ///
  /// Params: `kept`: how many pieces that were decompressed last are kept; at least 1.
  /// Lifetime: must not outlive this object. Errors: ENOMEM. Cost: memory, as the model's decoders take.
  [[nodiscard]] Result<std::unique_ptr<const RandomAccess>> for_one_thread(unsigned kept) const noexcept {
    return do_for_one_thread(kept);
  }

 private:
  // What is called is not what is virtual: GCC lets pass that the result of a virtual call is dropped.
  [[nodiscard]] virtual Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept = 0;
  [[nodiscard]] virtual Result<Extent> do_next_data(std::uint64_t from) const noexcept = 0;
  [[nodiscard]] virtual Result<std::unique_ptr<const RandomAccess>> do_for_one_thread(unsigned) const noexcept {
    return nullptr;
  }
};

}  // namespace multifd::image
