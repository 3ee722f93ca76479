// SPDX-License-Identifier: MIT
//
// Verifies a compressed image (format/seekable_zstd.md section 20.5): every byte of the file.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "multifd/image/detail/zstd_verifier.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/image/workers.hpp"

namespace multifd::image {

/// Reads and decompresses the whole file, and compares every checksum and digest in it. Together with open(), which has done
/// that for the tables, this finds any byte of our files that is not as it was written; of other programs', what their
/// checksums cover. A base is not looked into: it is verified by itself.
///
/// Errors: Errc::corrupt_frame, frame_mismatch (detail: where in the file the frame begins); bad_channel_count (threads);
///   the file's; ENOMEM.
/// Threads: the caller's waits for options.threads others.
/// Cost: a decoder and a frame for each thread.
[[nodiscard]] inline Result<void> verify(const SeekableZstd& image, const WorkOptions& options = {}) {
  constexpr std::uint64_t piece_frames = 16;
  const SeekableZstdTable& table = image.table();
  const std::uint64_t pieces = table.frames() / piece_frames + (table.frames() % piece_frames != 0);
  return catch_bad_alloc(Stage::setup, "image: verify", [&]() -> Result<void> {
    std::vector<detail::ZstdVerifier> verifiers;
    for (unsigned i = 0; i < std::min<std::uint64_t>(options.threads, pieces); ++i) {
      MULTIFD_TRY_ASSIGN(auto verifier, detail::ZstdVerifier::create(image));
      verifiers.push_back(std::move(verifier));
    }
    return in_threads(options, pieces, [&](std::uint64_t piece, unsigned worker) -> Result<void> {
      const std::uint64_t first = piece * piece_frames;
      const std::uint64_t end = std::min(first + piece_frames, table.frames());
      for (std::uint64_t frame = first; frame < end; ++frame)
        if (const auto stored = table.stored(frame)) MULTIFD_TRY(verifiers[worker].frame(frame, *stored));
      const Extent last = table.content(end - 1);
      if (options.on_progress) options.on_progress(last.end() - table.content(first).offset);
      return {};
    });
  });
}

}  // namespace multifd::image
