// SPDX-License-Identifier: MIT
//
// One thread's part of writing a compressed image.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/compress/zstd_frame.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/format/seekable_zstd.hpp"
#include "multifd/image/detail/seekable_zstd_tail.hpp"
#include "multifd/image/file.hpp"
#include "multifd/image/random_access.hpp"
#include "multifd/image/seekable_zstd_table.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::image::detail {

/// Hands the file out from its front, piece by piece in their order, to threads that finish them in any.
class PlacesInOrder {
 public:
  /// Where the piece goes. Waits for all pieces ahead of it to ask. Errors: Errc::cancelled (stop()).
  [[nodiscard]] Result<std::uint64_t> place(std::uint64_t piece, std::uint64_t bytes) noexcept {
    std::uint64_t at = 0;
    {
      engine::Monitor::Lock held = turns_.lock();
      turns_.wait(held, [&] { return next_ == piece; });
      if (next_ != piece) return fail(Errc::cancelled, Stage::write, "image");
      at = end_;
      end_ += bytes;
      ++next_;
    }
    turns_.notify();
    return at;
  }
  void stop() noexcept { turns_.stop(); }
  /// When all threads have ended.
  std::uint64_t end() const noexcept { return end_; }

 private:
  engine::Monitor turns_;
  std::uint64_t next_ = 0;
  std::uint64_t end_ = 0;
};

/// What all workers share.
struct ZstdImageWork {
  const RandomAccess& from;
  File& to;
  const SeekableZstdTable* base;  ///< null: none
  int level;
  const std::function<void(std::uint64_t)>& on_progress;
  wire::ImageHeader header;
  std::vector<StoredFrame>& frames;  ///< one for each frame of the image
  std::vector<std::byte> zero_frame{};
  StoredFrame zero{};
  PlacesInOrder places{};

  std::uint64_t piece_frames() const noexcept {
    return std::max<std::uint64_t>(4 * 1024 * 1024 / header.frame_bytes, 1);
  }
  std::uint64_t pieces() const noexcept {
    return header.frames() / piece_frames() + (header.frames() % piece_frames() != 0);
  }
  bool in_base(std::uint64_t frame, const Digest128& digest) const noexcept {
    return base != nullptr && frame < base->frames() && base->content(frame).bytes == header.bytes_of(frame) &&
           base->digest(frame) == digest;
  }
};

/// One thread's part of write_seekable_zstd().
class ZstdImageWorker {
 public:
  [[nodiscard]] static Result<ZstdImageWorker> create(ZstdImageWork& work) {
    MULTIFD_TRY_ASSIGN(auto encoder, ZstdFrameEncoder::create(work.level, work.header.frame_bytes));
    ZstdImageWorker worker(work, std::move(encoder));
    worker.content_.resize(work.header.frame_bytes);
    worker.out_.resize(work.piece_frames() * ZstdFrameEncoder::bound(work.header.frame_bytes));
    return worker;
  }

  [[nodiscard]] Result<void> piece(std::uint64_t piece) {
    const std::uint64_t first = piece * work_->piece_frames();
    const std::uint64_t end = std::min(first + work_->piece_frames(), work_->header.frames());
    used_ = 0;
    for (std::uint64_t i = first; i < end; ++i) MULTIFD_TRY(frame(i));
    MULTIFD_TRY_ASSIGN(const std::uint64_t at, work_->places.place(piece, used_));
    MULTIFD_TRY(work_->to.write(at, std::span(out_).first(used_)));
    if (work_->on_progress) {
      const std::uint64_t frame_bytes = work_->header.frame_bytes;
      work_->on_progress(std::min(end * frame_bytes, work_->header.image_bytes) - first * frame_bytes);
    }
    return {};
  }

 private:
  ZstdImageWorker(ZstdImageWork& work, ZstdFrameEncoder encoder) noexcept
      : work_(&work), encoder_(std::move(encoder)) {}

  [[nodiscard]] Result<void> frame(std::uint64_t frame) {
    const std::uint64_t at = frame * work_->header.frame_bytes;
    const std::span content = std::span(content_).first(work_->header.bytes_of(frame));
    if (data_.end() <= at) {
      MULTIFD_TRY_ASSIGN(data_, work_->from.next_data(at));
    }
    bool zero = data_.bytes == 0 || data_.offset >= at + content.size();
    if (!zero) {
      MULTIFD_TRY(work_->from.read(at, content));
      zero = buffer_is_zero(content.data(), content.size());
    }
    StoredFrame& row = work_->frames[frame];
    if (zero && content.size() == content_.size()) {
      row.digest = work_->zero.digest;
      if (work_->in_base(frame, row.digest)) return {};
      row = work_->zero;
      std::ranges::copy(work_->zero_frame, &out_[used_]);
      used_ += work_->zero_frame.size();
      return {};
    }
    if (zero) std::memset(content.data(), 0, content.size());
    row.digest = digest128_of(content);
    if (work_->in_base(frame, row.digest)) return {};
    MULTIFD_TRY_ASSIGN(const std::size_t bytes, encoder_.encode(content, std::span(out_).subspan(used_)));
    row.set(std::span(out_).subspan(used_, bytes));
    used_ += bytes;
    return {};
  }

  ZstdImageWork* work_;
  ZstdFrameEncoder encoder_;
  std::vector<std::byte> content_;  ///< of one frame
  std::vector<std::byte> out_;      ///< a piece's frames
  std::size_t used_ = 0;
  Extent data_{};  ///< the next one that is not behind us: a worker's pieces only go up
};

}  // namespace multifd::image::detail
