// SPDX-License-Identifier: MIT
//
// Guest memory in pieces that threads take one after the other: each lies in one block.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/qemu/element.hpp"
#include "multifd/result.hpp"

namespace multifd::image {

/// Some adjacent pages of one block.
struct RamPiece {
  std::size_t block = 0;  ///< index into the list of blocks
  std::uint64_t first_page = 0;
  std::uint64_t pages = 0;
};

/// Threads: const methods from any.
class RamPieces {
 public:
  /// Params `blocks`: whole pages each, not empty. Errors: ENOMEM. Cost: 16 bytes a block.
  [[nodiscard]] static Result<RamPieces> create(std::span<const qemu::BlockInfo> blocks, std::size_t page_bytes) {
    return catch_bad_alloc(Stage::setup, "image: pieces", [&]() -> Result<RamPieces> {
      RamPieces pieces;
      // 32 MiB, and whole words of a bitmap.
      pieces.pages_ = std::max<std::uint64_t>(32 * 1024 * 1024 / page_bytes, 64);
      for (const qemu::BlockInfo& block : blocks) {
        const std::uint64_t pages = block.used_length / page_bytes;
        pieces.blocks_.push_back({pieces.count_, pages});
        pieces.count_ += (pages + pieces.pages_ - 1) / pieces.pages_;
      }
      return pieces;
    });
  }

  std::uint64_t count() const noexcept { return count_; }

  /// Contract: `number` is below count().
  RamPiece at(std::uint64_t number) const noexcept {
    const auto block = std::ranges::upper_bound(blocks_, number, {}, &Block::first_piece) - 1;
    const std::uint64_t first = (number - block->first_piece) * pages_;
    return {.block = static_cast<std::size_t>(block - blocks_.begin()),
            .first_page = first,
            .pages = std::min(pages_, block->pages - first)};
  }

 private:
  struct Block {
    std::uint64_t first_piece;
    std::uint64_t pages;
  };
  RamPieces() = default;

  std::uint64_t pages_ = 0;
  std::uint64_t count_ = 0;
  std::vector<Block> blocks_;
};

}  // namespace multifd::image
