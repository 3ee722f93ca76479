// SPDX-License-Identifier: MIT
//
// The order that a dirty source with a re-arm asks for, in one place: clear the log of a chunk, then queue its pages, then
// the next chunk.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_block.hpp"
#include "multifd/migrate/dirty_source.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// 64 MiB of pages of 4 KiB. Smaller chunks are cleared closer to when they are sent, so that fewer pages come twice; each
/// costs a system call, and the vCPUs a flush of their translations.
inline constexpr std::uint64_t default_rearm_pages = 16384;

/// Re-arms and hands on the dirty pages of a block chunk by chunk; all at once where the source needs no re-arm. Chunks
/// without dirty pages are skipped.
///
///   rearm_chunks(source, block, bitmap, default_rearm_pages, [&](std::uint64_t first_page, auto chunk) -> Result<void> {
///     MULTIFD_TRY(sender.queue_dirty(block, chunk, first_page));
///     return {};
///   });
///
/// Params: `bitmap`: of the whole block, as fetch() fills it; `chunk_pages`: of the map, a multiple of 64;
///   `on_chunk(first_page, chunk)`: returns a Result<void>.
/// Errors: Errc::bad_option (chunk_pages); the first error of rearm() or on_chunk, which ends it. Threads: as DirtySource.
template <DirtySource S, class OnChunk>
[[nodiscard]] Result<void> rearm_chunks(S& source, BlockId block, std::span<const std::uint64_t> bitmap,
                                        std::uint64_t chunk_pages, OnChunk&& on_chunk) {
  if (chunk_pages == 0 || chunk_pages % 64 != 0)
    return fail(Errc::bad_option, Stage::none, "re-arm dirty log: chunk_pages is no multiple of 64", chunk_pages);
  const std::uint64_t words = source.needs_rearm() ? chunk_pages / 64 : bitmap.size();
  for (std::uint64_t at = 0; at < bitmap.size(); at += words) {
    const auto chunk = bitmap.subspan(at, std::min<std::uint64_t>(words, bitmap.size() - at));
    if (end_of_dirty(chunk) == 0) continue;
    if (source.needs_rearm()) {
      MULTIFD_TRY(source.rearm(block, at * 64, chunk));
    }
    MULTIFD_TRY(on_chunk(at * 64, chunk));
  }
  return {};
}

}  // namespace multifd::migrate
