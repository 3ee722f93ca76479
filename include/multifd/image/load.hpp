// SPDX-License-Identifier: MIT
//
// Loads guest memory from an image, by several threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "multifd/image/mapped_ram_reader.hpp"
#include "multifd/image/pieces.hpp"
#include "multifd/image/workers.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/options.hpp"
#include "multifd/qemu/ram_blocks.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::image {

/// Options of load_ram().
struct LoadOptions {
  WorkOptions work{};  ///< threads, and what they call
  /// What the memory holds before. `unknown`, the default: pages that the image does not hold are read, and overwritten where
  /// they are not zero. `zeroed`, for fresh memory: they are left alone, so nothing of them becomes resident; where it is
  /// wrong, old bytes stay in the guest.
  DestinationMemory destination = DestinationMemory::unknown;
  /// What pages are read from, where not from the reader's file: the same file opened with O_DIRECT, which spares the page
  /// cache. Memory and page size must suit the file system then: 4096 does. Default: none.
  const RandomAccess* pages = nullptr;
};

struct Loaded {
  std::uint64_t normal_pages = 0;
  std::uint64_t zero_pages = 0;
};

/// Reads all pages of an image into the blocks of `ram`. Blocks that are shared memory and not in the image are left alone.
///
/// Errors: Errc::block_list_mismatch (ram and image have other blocks), page_size_mismatch, read_only_block; the file's.
/// Threads: the caller's waits for options.work.threads others.
/// Cost: pages are read to their places, without a copy in between. Allocates 16 bytes a thread.
[[nodiscard]] inline Result<Loaded> load_ram(const MappedRamReader& image, const RamMap& ram,
                                             const LoadOptions& options = {}) {
  if (ram.page_bytes() != image.page_bytes())
    return fail(Errc::page_size_mismatch, Stage::setup, "image: load", image.page_bytes(), ram.page_bytes());
  MULTIFD_TRY(qemu::compare_blocks(image.blocks(), ram));
  for (const RamBlock& block : ram.blocks())
    if (block.access != Access::read_write)
      return fail(Errc::read_only_block, Stage::setup, "image: load", 0, 0, block.idstr);
  MULTIFD_TRY_ASSIGN(const RamPieces pieces, RamPieces::create(image.blocks(), image.page_bytes()));
  return catch_bad_alloc(Stage::setup, "image: load", [&]() -> Result<Loaded> {
    std::vector<Loaded> loaded(options.work.threads);
    const RandomAccess& pages = options.pages != nullptr ? *options.pages : image.file();
    auto done = in_threads(options.work, pieces.count(), [&](std::uint64_t number, unsigned worker) -> Result<void> {
      const RamPiece piece = pieces.at(number);
      const qemu::BlockInfo& block = image.blocks()[piece.block];
      if (block.pages_offset == 0) return {};  // shared memory
      const std::span<std::byte> host = ram.block(*ram.find(block.idstr)).host;
      std::uint64_t at = piece.first_page * image.page_bytes();
      const std::uint64_t end = at + piece.pages * image.page_bytes();
      std::uint64_t normal = 0;
      const auto clear = [&](std::uint64_t until) {
        if (options.destination != DestinationMemory::zeroed)
          for (; at < until; at += image.page_bytes()) {
            const auto page = host.subspan(at, image.page_bytes());
            if (!buffer_is_zero(page.data(), page.size())) std::memset(page.data(), 0, page.size());
          }
      };
      MULTIFD_TRY(image.for_each_run(piece.block, piece.first_page, piece.pages,
                                     [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
                                       clear(offset);
                                       at = offset + bytes;
                                       normal += bytes / image.page_bytes();
                                       return pages.read(block.pages_offset + offset, host.subspan(offset, bytes));
                                     }));
      clear(end);
      loaded[worker].normal_pages += normal;
      loaded[worker].zero_pages += piece.pages - normal;
      if (options.work.on_progress) options.work.on_progress(piece.pages * image.page_bytes());
      return {};
    });
    if (!done) return std::unexpected(done.error());
    Loaded sum;
    for (const Loaded& each : loaded) {
      sum.normal_pages += each.normal_pages;
      sum.zero_pages += each.zero_pages;
    }
    return sum;
  });
}

}  // namespace multifd::image
