// SPDX-License-Identifier: MIT
//
// Copies an image byte for byte, and leaves its holes out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "multifd/image/file.hpp"
#include "multifd/image/workers.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::image {

/// Copies the data of an extent of `from` to `place`, in another file; zeros become holes where the file has none there.
///
/// Params `buffer`: what is copied at once; a multiple of 4096. Contract: `to` is zero there.
/// Errors: those of both files.
[[nodiscard]] inline Result<void> copy_data(const RandomAccess& from, const Extent& extent, File& to,
                                            std::uint64_t place, std::span<std::byte> buffer) noexcept {
  constexpr std::size_t unit = 4096;  // of holes
  for (std::uint64_t at = extent.offset; at < extent.end();) {
    MULTIFD_TRY_ASSIGN(const Extent data, from.next_data(at));
    if (data.bytes == 0 || data.offset >= extent.end()) break;
    at = data.offset;
    const auto part = buffer.first(std::min<std::uint64_t>({buffer.size(), data.bytes, extent.end() - at}));
    MULTIFD_TRY(from.read(at, part));
    // Runs of units that are not zero.
    for (std::size_t begin = 0; begin < part.size();) {
      const auto is_zero = [&](std::size_t unit_at) {
        return buffer_is_zero(part.data() + unit_at, std::min(unit, part.size() - unit_at));
      };
      if (is_zero(begin)) {
        begin += unit;
        continue;
      }
      std::size_t end = begin + unit;
      while (end < part.size() && !is_zero(end)) end += unit;
      end = std::min(end, part.size());
      MULTIFD_TRY(to.write(place + (at - extent.offset) + begin, part.subspan(begin, end - begin)));
      begin = end;
    }
    at += part.size();
  }
  return {};
}

/// Makes `to` a copy of `from`, which takes no more of the disk than its data.
///
/// Params `to`: empty. Errors: Errc::bad_channel_count; out of memory or threads; those of both files.
/// Threads: the caller's waits for options.threads others. Cost: 1 MiB a thread.
[[nodiscard]] inline Result<void> copy_sparse(const RandomAccess& from, File& to, const WorkOptions& options = {}) {
  constexpr std::uint64_t piece_bytes = 32 * 1024 * 1024;
  MULTIFD_TRY(to.resize(from.bytes()));
  return catch_bad_alloc(Stage::setup, "image: copy", [&]() -> Result<void> {
    std::vector<std::vector<std::byte>> buffers(options.threads);
    return in_threads(options, (from.bytes() + piece_bytes - 1) / piece_bytes,
                      [&](std::uint64_t piece, unsigned worker) {
                        return catch_bad_alloc(Stage::setup, "image: copy", [&]() -> Result<void> {
                          buffers[worker].resize(1024 * 1024);
                          const Extent extent{.offset = piece * piece_bytes,
                                              .bytes = std::min(piece_bytes, from.bytes() - piece * piece_bytes)};
                          MULTIFD_TRY(copy_data(from, extent, to, extent.offset, buffers[worker]));
                          if (options.on_progress) options.on_progress(extent.bytes);
                          return {};
                        });
                      });
  });
}

}  // namespace multifd::image
