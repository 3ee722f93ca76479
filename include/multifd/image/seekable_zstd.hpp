// SPDX-License-Identifier: MIT
//
// Reads a file in zstd's seekable format as if it were not compressed (format/seekable_zstd.md section 20): our own, whole
// or incremental, and other programs'. Nothing in the file is trusted.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "multifd/image/detail/zstd_frame_pool.hpp"
#include "multifd/image/random_access.hpp"
#include "multifd/image/seekable_zstd_table.hpp"

namespace multifd::image {

/// What an incremental image is opened as when its base is not there.
enum class WithoutBase : std::uint8_t {
  refuse,       ///< not at all: Errc::needs_base
  tables_only,  ///< for its digests, or to be verified; reading what is in the base then fails with Errc::needs_base
};

/// Options of SeekableZstd::open().
struct SeekableZstdOptions {
  SeekableZstdLimits limits{};  ///< on what the file may announce
  /// How many threads decompress at once; more wait. Each takes 160 KiB, a frame, and a frame's content, when it is first
  /// needed. At least 1.
  unsigned decoders = 8;
  WithoutBase without_base = WithoutBase::refuse;  ///< what an incremental image without its base is opened as
};

/// A compressed file that is read at any place.
///
/// Threads: any number, all calls but open() and moving.
/// Cost: memory as SeekableZstdTable and SeekableZstdOptions::decoders have it. Reads of whole frames are decompressed to
///   their place, smaller ones once for as long as no other frames have taken all decoders' buffers.
class SeekableZstd final : public RandomAccess {
 public:
  /// Reads the tables.
  ///
  /// Params: `file`: outlives this, and must not change. `base`: what an incremental image was made against; outlives this,
  ///   and must not be moved. Plays no part for a whole image.
  /// Errors: Errc::needs_base (detail: the lower half of its digest), wrong_base, bad_option (no decoders);
  ///   SeekableZstdTable::read()'s.
  /// Cost: reads the tables, and allocates them; decoders come with the first read.
  [[nodiscard]] static Result<SeekableZstd> open(const RandomAccess& file, const SeekableZstdOptions& options = {},
                                                 const SeekableZstd* base = nullptr) {
    if (options.decoders == 0) return fail(Errc::bad_option, Stage::setup, "image: decoders");
    MULTIFD_TRY_ASSIGN(auto table, SeekableZstdTable::read(file, options.limits));
    if (!table.incremental()) {
      base = nullptr;
    } else if (base == nullptr) {
      if (options.without_base == WithoutBase::refuse)
        return fail(Errc::needs_base, Stage::setup, "image", table.header().base_digest.low);
    } else {
      MULTIFD_TRY(check_base(table, base->table()));
    }
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<SeekableZstd> {
      return SeekableZstd(file, std::make_shared<const SeekableZstdTable>(std::move(table)), base,
                          std::make_unique<detail::ZstdFramePool>(options.decoders));
    });
  }

  const RandomAccess& file() const noexcept { return *file_; }
  const SeekableZstdTable& table() const noexcept { return *table_; }

  std::uint64_t bytes() const noexcept override { return table_->bytes(); }

  /// Fills all of `to`.
  /// Errors: Errc::truncated_image (the end comes first; detail: where the read began), corrupt_frame, frame_mismatch
  ///   (detail: where in the file the frame begins), needs_base; the file's; ENOMEM (not even one decoder).
  /// Cost: waits for other threads if all decoders are in use. Allocates a decoder now and then, and never more of them
  ///   than the options say. What is zero is not decompressed.
  [[nodiscard]] Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    if (offset > bytes() || to.size() > bytes() - offset)
      return fail(Errc::truncated_image, Stage::read, "image", offset, bytes());
    if (to.empty()) return {};
    for (std::uint64_t frame = table_->frame_at(offset); !to.empty(); ++frame) {
      const Extent content = table_->content(frame);
      const auto skip = static_cast<std::size_t>(offset - content.offset);
      const auto part = to.first(static_cast<std::size_t>(std::min<std::uint64_t>(to.size(), content.bytes - skip)));
      MULTIFD_TRY(read_frame(frame, skip, part));
      to = to.subspan(part.size());
      offset += part.size();
    }
    return {};
  }

  /// As RandomAccess has it: frames that are zero are holes.
  /// Errors: none. Cost: no byte is read.
  [[nodiscard]] Result<Extent> do_next_data(std::uint64_t from) const noexcept override {
    if (from >= bytes()) return Extent{.offset = bytes()};
    const std::uint64_t first = table_->next_not_zero(table_->frame_at(from));
    if (first == table_->frames()) return Extent{.offset = bytes()};
    const std::uint64_t begin = std::max(from, table_->content(first).offset);
    const std::uint64_t last = table_->next_zero(first);
    const std::uint64_t end = last == table_->frames() ? bytes() : table_->content(last).offset;
    return Extent{.offset = begin, .bytes = end - begin};
  }

  Extent read_together(std::uint64_t offset) const noexcept override {
    return table_->content(table_->frame_at(offset));
  }

  /// Errors: ENOMEM. Cost: as SeekableZstdOptions::decoders, when they are first needed; what comes from a base is
  ///   decompressed by the base's own.
  [[nodiscard]] Result<std::unique_ptr<const RandomAccess>> do_for_one_thread(unsigned kept) const noexcept override {
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<std::unique_ptr<const RandomAccess>> {
      auto pool = std::make_unique<detail::ZstdFramePool>(kept);
      return std::unique_ptr<const RandomAccess>(new SeekableZstd(*file_, table_, base_, std::move(pool)));
    });
  }

 private:
  SeekableZstd(const RandomAccess& file, std::shared_ptr<const SeekableZstdTable> table, const SeekableZstd* base,
               std::unique_ptr<detail::ZstdFramePool> pool) noexcept
      : file_(&file), table_(std::move(table)), base_(base), pool_(std::move(pool)) {}

  /// The base is the one, and what is taken from it is what this image should have there.
  [[nodiscard]] static Result<void> check_base(const SeekableZstdTable& table, const SeekableZstdTable& base) noexcept {
    const wire::ImageHeader& want = table.header();
    const wire::ImageHeader& have = base.header();
    if (!base.has_digests() || have.digest != want.base_digest || have.frame_bytes != want.frame_bytes)
      return fail(Errc::wrong_base, Stage::setup, "image", have.digest.low, want.base_digest.low);
    for (std::uint64_t i = 0; i < table.frames(); ++i)
      if (!table.stored(i) &&
          (i >= base.frames() || base.content(i) != table.content(i) || base.digest(i) != table.digest(i)))
        return fail(Errc::wrong_base, Stage::setup, "image: frame of the base", i);
    return {};
  }

  [[nodiscard]] Result<void> read_frame(std::uint64_t frame, std::size_t skip, std::span<std::byte> to) const noexcept {
    if (table_->zero(frame)) {
      std::memset(to.data(), 0, to.size());
      return {};
    }
    const std::optional<std::uint64_t> stored = table_->stored(frame);
    const Extent content = table_->content(frame);
    if (!stored) {
      if (base_ == nullptr) return fail(Errc::needs_base, Stage::read, "image", table_->header().base_digest.low);
      return base_->read(content.offset + skip, to);
    }
    MULTIFD_TRY_ASSIGN(detail::ZstdFramePool::Slot* const slot, pool_->take(*table_, frame));
    const auto done = read_stored(*slot, frame, *stored, skip, to);
    pool_->give(slot);
    return done;
  }

  [[nodiscard]] Result<void> read_stored(detail::ZstdFramePool::Slot& slot, std::uint64_t frame, std::uint64_t stored,
                                         std::size_t skip, std::span<std::byte> to) const noexcept {
    if (slot.frame != frame) {
      MULTIFD_TRY(slot.reader.fetch(*file_, table_->place(stored)));
      const auto bytes = static_cast<std::size_t>(table_->content(frame).bytes);
      if (to.size() == bytes) return slot.reader.decode(*table_, stored, to);
      slot.frame = slot.none;
      MULTIFD_TRY(slot.reader.decode(*table_, stored, {slot.content.get(), bytes}));
      slot.frame = frame;
    }
    std::memcpy(to.data(), slot.content.get() + skip, to.size());
    return {};
  }

  const RandomAccess* file_;
  std::shared_ptr<const SeekableZstdTable> table_;  ///< one for all views
  const SeekableZstd* base_;
  std::unique_ptr<detail::ZstdFramePool> pool_;
};

}  // namespace multifd::image
