// SPDX-License-Identifier: MIT
//
// The memory file: what protocols that know no RAM blocks count offsets in. It is the guest's main memory
// (memory/main_memory.hpp), blocks in the image's order, one behind the other; of a raw image all of it. A PC's "pc.ram"
// alone is main memory, and is in order of guest-physical addresses without the hole below 4 GiB.
#pragma once

#include <multifd/postcopy/lazy_region.hpp>
#include <multifd/postcopy/page_store.hpp>

#include <cstdint>
#include <span>
#include <vector>

#include "multifd_pager/handshake.hpp"

namespace pager {

/// Threads: const methods from any. Lifetime: the blocks outlive it.
class MemoryFile {
 public:
  explicit MemoryFile(std::span<const multifd::postcopy::StoreBlock> blocks);

  std::uint64_t bytes() const noexcept { return bytes_; }

  /// Where the bytes of a region lie: one region for each block that it reaches into. Throws Failure: past the end, or a
  /// block that the image does not have. All else is LazyMemory's to check.
  std::vector<multifd::postcopy::LazyRegion> regions_of(const Region& region) const;

  /// Clears the bits of pages that the guest has given back, in bitmaps as LazyMemoryOptions::missing, which become whole
  /// ones. Throws Failure: outside of its block, or not whole pages.
  void drop(const Dropped& dropped, std::uint64_t page_bytes, std::vector<std::vector<std::uint64_t>>& missing) const;

 private:
  struct Part {
    multifd::BlockId block;
    std::uint64_t begin;
    std::uint64_t bytes;
  };
  multifd::BlockId block_of(const std::string& idstr) const;
  /// The same bytes by block. Throws Failure.
  struct Piece {
    multifd::BlockId block;
    std::uint64_t offset;
    std::uint64_t bytes;
  };
  std::vector<Piece> pieces_of(const std::string& idstr, std::uint64_t offset, std::uint64_t bytes) const;

  std::span<const multifd::postcopy::StoreBlock> blocks_;
  std::vector<Part> parts_;
  std::uint64_t bytes_ = 0;
};

}  // namespace pager
