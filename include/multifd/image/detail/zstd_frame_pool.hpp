// SPDX-License-Identifier: MIT
//
// What reads and decompresses the frames of a compressed image, for several threads at once.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "multifd/compress/zstd_frame.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/image/random_access.hpp"
#include "multifd/image/seekable_zstd_table.hpp"
#include "multifd/memory/page_digest.hpp"

namespace multifd::image::detail {

/// A decoder with room for one frame of the file.
class ZstdFrameReader {
 public:
  [[nodiscard]] static Result<ZstdFrameReader> create(const SeekableZstdTable& table) noexcept {
    MULTIFD_TRY_ASSIGN(auto decoder, ZstdFrameDecoder::create());
    ZstdFrameReader reader(std::move(decoder));
    reader.frame_.reset(new (std::nothrow) std::byte[table.most_frame_bytes()]);
    if (!reader.frame_) return fail_errno(Stage::setup, "image: decoder", ENOMEM);
    return reader;
  }

  /// The bytes of one stored frame, up to the next call.
  [[nodiscard]] Result<std::span<const std::byte>> fetch(const RandomAccess& file, const Extent& place) noexcept {
    const std::span<std::byte> frame(frame_.get(), static_cast<std::size_t>(place.bytes));
    MULTIFD_TRY(file.read(place.offset, frame));
    return frame;
  }
  /// Decompresses what fetch() has returned, and compares checksums.
  [[nodiscard]] Result<void> decode(const SeekableZstdTable& table, std::uint64_t stored,
                                    std::span<std::byte> to) noexcept {
    const Extent place = table.place(stored);
    const auto size = table.has_digests() ? ZstdContentSize::required : ZstdContentSize::may_be_absent;
    const auto said = decoder_.decode({frame_.get(), static_cast<std::size_t>(place.bytes)}, to, size);
    if (!said) {
      Error error = said.error();
      error.detail = place.offset;
      return std::unexpected(error);
    }
    if (!table.has_checksums()) return {};
    const std::uint32_t checksum = *said ? **said : zstd_checksum_of(to);
    if (checksum != table.checksum(stored))
      return fail(Errc::frame_mismatch, Stage::decode, "image", place.offset, table.checksum(stored));
    return {};
  }

 private:
  explicit ZstdFrameReader(ZstdFrameDecoder decoder) noexcept : decoder_(std::move(decoder)) {}

  ZstdFrameDecoder decoder_;
  std::unique_ptr<std::byte[]> frame_;
};

/// Decoders for whichever threads read, and the content of the last frame of each.
class ZstdFramePool {
 public:
  struct Slot {
    static constexpr std::uint64_t none = ~std::uint64_t{0};

    ZstdFrameReader reader;
    std::unique_ptr<std::byte[]> content;
    std::uint64_t frame = none;  ///< whose content is in there
  };

  explicit ZstdFramePool(unsigned most) : most_(most) {
    slots_.reserve(most);
    free_.reserve(most);
  }

  /// The slot with that frame, or another one; waits for one if all are in use.
  [[nodiscard]] Result<Slot*> take(const SeekableZstdTable& table, std::uint64_t frame) noexcept {
    engine::Monitor::Lock held = monitor_.lock();
    if (!std::ranges::any_of(free_, [&](const Slot* slot) { return slot->frame == frame; }) && slots_.size() < most_) {
      auto slot = make(table);  // with the others waiting: once a slot
      if (slot) {
        slots_.push_back(std::move(*slot));
        return slots_.back().get();
      }
      if (slots_.empty()) return std::unexpected(slot.error());
    }
    monitor_.wait(held, [this] { return !free_.empty(); });
    auto best = std::ranges::find(free_, frame, &Slot::frame);
    if (best == free_.end()) best = free_.begin();
    Slot* const slot = *best;
    free_.erase(best);
    return slot;
  }
  void give(Slot* slot) noexcept {
    monitor_.update([&] { free_.push_back(slot); });
  }

 private:
  [[nodiscard]] static Result<std::unique_ptr<Slot>> make(const SeekableZstdTable& table) noexcept {
    MULTIFD_TRY_ASSIGN(auto reader, ZstdFrameReader::create(table));
    std::unique_ptr<Slot> slot(new (std::nothrow) Slot{.reader = std::move(reader), .content = {}});
    if (slot) slot->content.reset(new (std::nothrow) std::byte[table.most_content_bytes()]);
    if (!slot || !slot->content) return fail_errno(Stage::setup, "image: decoder", ENOMEM);
    return slot;
  }

  engine::Monitor monitor_;
  const unsigned most_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_;  ///< the one that has been free longest first
};

}  // namespace multifd::image::detail
