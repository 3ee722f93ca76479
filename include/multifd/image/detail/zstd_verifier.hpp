// SPDX-License-Identifier: MIT
//
// One thread's part of verifying a compressed image.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "multifd/compress/zstd_frame.hpp"
#include "multifd/format/seekable_zstd.hpp"
#include "multifd/image/detail/zstd_frame_pool.hpp"
#include "multifd/image/seekable_zstd.hpp"
#include "multifd/memory/page_digest.hpp"

namespace multifd::image::detail {

/// One thread's part of verify().
class ZstdVerifier {
 public:
  [[nodiscard]] static Result<ZstdVerifier> create(const SeekableZstd& image) noexcept {
    MULTIFD_TRY_ASSIGN(auto reader, ZstdFrameReader::create(image.table()));
    ZstdVerifier verifier(image, std::move(reader));
    verifier.content_.reset(new (std::nothrow) std::byte[image.table().most_content_bytes()]);
    if (!verifier.content_) return fail_errno(Stage::setup, "image: verify", ENOMEM);
    return verifier;
  }

  [[nodiscard]] Result<void> frame(std::uint64_t frame, std::uint64_t stored) noexcept {
    const SeekableZstdTable& table = image_->table();
    const Extent place = table.place(stored);
    const std::span content(content_.get(), static_cast<std::size_t>(table.content(frame).bytes));
    if (content.empty()) return skippable(place);
    MULTIFD_TRY_ASSIGN(const auto bytes, reader_.fetch(image_->file(), place));
    if (table.has_digests())
      if (const std::uint64_t digest = digest_of(bytes); digest != table.frame_digest(stored))
        return fail(Errc::corrupt_frame, Stage::decode, "image: digest of the frame", place.offset,
                    table.frame_digest(stored));
    if (same_as_before(table, frame, stored, bytes)) return {};
    MULTIFD_TRY(reader_.decode(table, stored, content));
    if (table.has_digests() && digest128_of(content) != table.digest(frame))
      return fail(Errc::frame_mismatch, Stage::decode, "image: digest of the content", place.offset,
                  table.digest(frame).low);
    remember(frame, stored, bytes);
    return {};
  }

 private:
  ZstdVerifier(const SeekableZstd& image, ZstdFrameReader reader) noexcept
      : image_(&image), reader_(std::move(reader)) {}

  /// Another program's frame without content.
  [[nodiscard]] Result<void> skippable(const Extent& place) noexcept {
    std::array<std::byte, wire::skippable_header_bytes> head;
    MULTIFD_TRY(image_->file().read(place.offset, head));
    const wire::SkippableHeader header = wire::parse_skippable_header(head);
    if ((header.magic & ~0xfu) == 0x184d2a50 && header.content_bytes == place.bytes - head.size()) return {};
    if (place.bytes <= image_->table().most_frame_bytes() && header.magic == 0xfd2fb528) {
      MULTIFD_TRY_ASSIGN(const auto bytes, reader_.fetch(image_->file(), place));
      MULTIFD_TRY_ASSIGN(auto decoder, ZstdFrameDecoder::create());
      MULTIFD_TRY(decoder.decode(bytes, {}, ZstdContentSize::may_be_absent));
      return {};
    }
    return fail(Errc::corrupt_frame, Stage::decode, "image: frame without content", place.offset);
  }

  // Zero frames are the same bytes again and again, and of an image with holes nearly all: the same bytes hold the same.
  bool same_as_before(const SeekableZstdTable& table, std::uint64_t frame, std::uint64_t stored,
                      std::span<const std::byte> bytes) const noexcept {
    return last_size_ == bytes.size() && std::memcmp(last_.data(), bytes.data(), bytes.size()) == 0 &&
           table.content(frame).bytes == table.content(last_frame_).bytes &&
           (!table.has_checksums() || table.checksum(stored) == table.checksum(last_stored_)) &&
           (!table.has_digests() || table.digest(frame) == table.digest(last_frame_));
  }
  void remember(std::uint64_t frame, std::uint64_t stored, std::span<const std::byte> bytes) noexcept {
    if (bytes.size() > last_.size()) return;
    std::ranges::copy(bytes, last_.begin());
    last_size_ = bytes.size();
    last_frame_ = frame;
    last_stored_ = stored;
  }

  const SeekableZstd* image_;
  ZstdFrameReader reader_;
  std::unique_ptr<std::byte[]> content_;
  std::array<std::byte, 64> last_{};
  std::size_t last_size_ = 0;  ///< 0: none yet
  std::uint64_t last_frame_ = 0;
  std::uint64_t last_stored_ = 0;
};

}  // namespace multifd::image::detail
