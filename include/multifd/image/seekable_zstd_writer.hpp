// SPDX-License-Identifier: MIT
//
// Writes a compressed image (format/seekable_zstd.md section 20), by several threads: whole, or what differs from a base.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "multifd/compress/zstd_frame.hpp"
#include "multifd/format/seekable_zstd.hpp"
#include "multifd/image/detail/seekable_zstd_tail.hpp"
#include "multifd/image/detail/zstd_image_worker.hpp"
#include "multifd/image/file.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/image/workers.hpp"
#include "multifd/memory/page_digest.hpp"

namespace multifd::image {

/// Options of write_seekable_zstd().
struct SeekableZstdWriteOptions {
  WorkOptions work{};  ///< threads, and what they call
  int level = 1;       ///< as Zstd::level
  /// Content of a frame, a power of two from 64 KiB to 1 MiB: what a read of a single page has to decompress. Larger ones
  /// compress better.
  std::size_t frame_bytes = 256 * 1024;
  /// What the image is to be incremental to, opened if need be with WithoutBase::tables_only: frames that it has, too, are
  /// left out. Default: none, the image stands for itself.
  const SeekableZstd* base = nullptr;
};

/// What write_seekable_zstd() has done.
struct SeekableZstdWritten {
  std::uint64_t frames = 0;          ///< of the image
  std::uint64_t zero_frames = 0;     ///< of these, those that hold zeros only and are in the file
  std::uint64_t frames_in_base = 0;  ///< of these, those that were left out
  std::uint64_t image_bytes = 0;
  std::uint64_t file_bytes = 0;
};

/// Compresses all of `from` to `to`. The file is the same whatever the number of threads.
///
/// Params: `from`: must not change meanwhile; empty is allowed. `to`: a regular file, open for writing; what it holds goes.
/// Errors: Errc::bad_option (frame size, level; an image of more than 2^27 frames; a base of another frame size), wrong_base
///   (a base without digests), cancelled, bad_channel_count (threads); those of both files; ENOMEM. What has been written of
///   the file stays: no reader takes it for whole.
/// Threads: the caller's waits for options.work.threads others.
/// Cost: what the source says is a hole, or zero, costs 40 bytes a frame in the file and is neither read nor compressed.
///   Allocates 40 bytes for each frame, and 4.5 MiB and zstd's workspace for each thread.
[[nodiscard]] inline Result<SeekableZstdWritten> write_seekable_zstd(const RandomAccess& from, File& to,
                                                                     const SeekableZstdWriteOptions& options = {}) {
  if (!wire::valid_image_frame_bytes(options.frame_bytes))
    return fail(Errc::bad_option, Stage::setup, "image: frame size", options.frame_bytes);
  wire::ImageHeader header{.incremental = options.base != nullptr,
                           .frame_bytes = static_cast<std::uint32_t>(options.frame_bytes),
                           .image_bytes = from.bytes()};
  if (header.frames() >= wire::max_seek_entries)
    return fail(Errc::bad_option, Stage::setup, "image: frames", header.frames(), wire::max_seek_entries);
  if (options.base != nullptr) {
    const SeekableZstdTable& base = options.base->table();
    if (!base.has_digests()) return fail(Errc::wrong_base, Stage::setup, "image: base without digests");
    header.base_digest = base.header().digest;
    if (base.header().frame_bytes != header.frame_bytes)
      return fail(Errc::bad_option, Stage::setup, "image: frame size, and the base's", header.frame_bytes,
                  base.header().frame_bytes);
  }
  return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<SeekableZstdWritten> {
    MULTIFD_TRY(to.resize(0));
    std::vector<detail::StoredFrame> frames(header.frames());
    detail::ZstdImageWork work{.from = from,
                               .to = to,
                               .base = options.base != nullptr ? &options.base->table() : nullptr,
                               .level = options.level,
                               .on_progress = options.work.on_progress,
                               .header = header,
                               .frames = frames};
    {
      const std::vector<std::byte> zeros(header.frame_bytes);
      MULTIFD_TRY_ASSIGN(auto encoder, ZstdFrameEncoder::create(options.level, header.frame_bytes));
      work.zero_frame.resize(ZstdFrameEncoder::bound(zeros.size()));
      MULTIFD_TRY_ASSIGN(const std::size_t bytes, encoder.encode(zeros, work.zero_frame));
      work.zero_frame.resize(bytes);
      work.zero.digest = digest128_of(zeros);
      work.zero.set(work.zero_frame);
    }
    std::vector<detail::ZstdImageWorker> workers;
    for (unsigned i = 0; i < std::min<std::uint64_t>(options.work.threads, work.pieces()); ++i) {
      MULTIFD_TRY_ASSIGN(auto worker, detail::ZstdImageWorker::create(work));
      workers.push_back(std::move(worker));
    }
    MULTIFD_TRY(in_threads(
        options.work, work.pieces(), [&](std::uint64_t piece, unsigned worker) { return workers[worker].piece(piece); },
        [&] { work.places.stop(); }));
    MULTIFD_TRY_ASSIGN(const std::uint64_t file_bytes,
                       detail::write_seekable_zstd_tail(to, work.places.end(), header, frames));
    MULTIFD_TRY(to.resize(file_bytes));
    SeekableZstdWritten written{.frames = frames.size(), .image_bytes = header.image_bytes, .file_bytes = file_bytes};
    for (const detail::StoredFrame& frame : frames) {
      written.frames_in_base += !frame.stored();
      written.zero_frames += frame.stored() && frame.digest == work.zero.digest;
    }
    return written;
  });
}

}  // namespace multifd::image
