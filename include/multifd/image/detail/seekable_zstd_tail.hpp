// SPDX-License-Identifier: MIT
//
// What stands behind the frames of a compressed image: the image frame and the seek table (format/seekable_zstd.md section
// 20). Written in pieces, so that large tables take no memory a second time.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "multifd/format/seekable_zstd.hpp"
#include "multifd/image/file.hpp"
#include "multifd/memory/page_digest.hpp"

namespace multifd::image::detail {

/// What the tables say of one frame of the image.
struct StoredFrame {
  Digest128 digest{};              ///< of its content
  std::uint64_t frame_digest = 0;  ///< of the frame in the file
  std::uint32_t frame_bytes = 0;   ///< 0: it is in the base
  std::uint32_t checksum = 0;      ///< of its content

  bool stored() const noexcept { return frame_bytes != 0; }
  /// Params `frame`: from a ZstdFrameEncoder: its last four bytes are the checksum that the seek table has as well.
  void set(std::span<const std::byte> frame) noexcept {
    frame_digest = digest_of(frame);
    frame_bytes = static_cast<std::uint32_t>(frame.size());
    checksum = wire::load_le<std::uint32_t>(&frame[frame.size() - 4]);
  }
};

/// Writes to a file from one place on, a few KiB at a time.
class TailWriter {
 public:
  TailWriter(File& file, std::uint64_t at) noexcept : file_(&file), at_(at) {}

  [[nodiscard]] Result<void> operator()(std::span<const std::byte> bytes) noexcept {
    if (bytes.size() > buffer_.size() - used_) MULTIFD_TRY(flush());
    std::ranges::copy(bytes, buffer_.begin() + static_cast<std::ptrdiff_t>(used_));
    used_ += bytes.size();
    return {};
  }
  [[nodiscard]] Result<void> flush() noexcept {
    MULTIFD_TRY(file_->write(at_, std::span(buffer_).first(used_)));
    at_ += used_;
    used_ = 0;
    return {};
  }
  /// Behind flush().
  std::uint64_t end() const noexcept { return at_; }

 private:
  File* file_;
  std::uint64_t at_;
  std::size_t used_ = 0;
  std::array<std::byte, 16 * 1024> buffer_;
};

/// Hands all bytes of the image frame ahead of its trailer to `sink`, which takes at most 72 at once.
template <class Sink>
[[nodiscard]] Result<void> emit_image_frame(const wire::ImageHeader& header, std::uint64_t stored,
                                            std::span<const StoredFrame> frames, Sink&& sink) {
  const auto content_bytes = static_cast<std::uint32_t>(header.content_bytes(stored));
  MULTIFD_TRY(sink(wire::encode_skippable_header({wire::image_frame_magic, content_bytes})));
  MULTIFD_TRY(sink(wire::encode_image_header(header)));
  std::array<std::byte, 8> number;
  for (const StoredFrame& frame : frames) MULTIFD_TRY(sink(wire::encode_digest128(frame.digest)));
  for (const StoredFrame& frame : frames)
    if (frame.stored()) {
      wire::store_le(number.data(), frame.frame_digest);
      MULTIFD_TRY(sink(number));
    }
  for (std::uint64_t word = 0; word < header.bitmap_words(); ++word) {
    std::uint64_t bits = 0;
    for (std::uint64_t i = 0; i < 64 && word * 64 + i < frames.size(); ++i)
      bits |= std::uint64_t{frames[word * 64 + i].stored()} << i;
    wire::store_le(number.data(), bits);
    MULTIFD_TRY(sink(number));
  }
  return {};
}

template <class Sink>
[[nodiscard]] Result<void> emit_seek_table(const wire::ImageHeader& header, std::uint64_t stored,
                                           std::span<const StoredFrame> frames, Sink&& sink) {
  const auto entries = static_cast<std::uint32_t>(stored + 1);
  const wire::SeekFooter footer{.entries = entries};
  const auto content_bytes = static_cast<std::uint32_t>(footer.table_bytes() - wire::skippable_header_bytes);
  MULTIFD_TRY(sink(wire::encode_skippable_header({wire::seek_table_frame_magic, content_bytes})));
  for (std::uint64_t i = 0; i < frames.size(); ++i)
    if (frames[i].stored())
      MULTIFD_TRY(sink(wire::encode_seek_entry({.frame_bytes = frames[i].frame_bytes,
                                                .content_bytes = header.bytes_of(i),
                                                .checksum = frames[i].checksum})));
  const std::uint64_t image_frame_bytes = wire::skippable_header_bytes + header.content_bytes(stored);
  MULTIFD_TRY(sink(wire::encode_seek_entry({.frame_bytes = static_cast<std::uint32_t>(image_frame_bytes),
                                            .content_bytes = 0,
                                            .checksum = zstd_checksum_of({})})));
  return sink(wire::encode_seek_footer(entries));
}

/// Writes both. Returns where the file ends.
///
/// Params: `at`: where the frames end; `header`: all but its digest; `frames`: all of the image, below max_seek_entries.
/// Errors: the file's; ENOMEM.
[[nodiscard]] inline Result<std::uint64_t> write_seekable_zstd_tail(File& file, std::uint64_t at,
                                                                    wire::ImageHeader header,
                                                                    std::span<const StoredFrame> frames) {
  const auto stored = static_cast<std::uint64_t>(std::ranges::count_if(frames, &StoredFrame::stored));
  MULTIFD_TRY_ASSIGN(PageDigest digest, PageDigest::create());
  digest.begin128();
  digest.add128(wire::encode_digest_head(header));
  for (const StoredFrame& frame : frames) digest.add128(wire::encode_digest128(frame.digest));
  header.digest = digest.value128();

  digest.begin();
  const auto into_digest = [&](std::span<const std::byte> bytes) -> Result<void> {
    digest.add(bytes);
    return {};
  };
  MULTIFD_TRY(emit_image_frame(header, stored, frames, into_digest));
  MULTIFD_TRY(emit_seek_table(header, stored, frames, into_digest));
  std::array<std::byte, wire::image_trailer_bytes> trailer;
  wire::store_le(trailer.data(), digest.value());
  std::memcpy(&trailer[8], wire::image_mark.data(), wire::image_mark.size());

  TailWriter writer(file, at);
  MULTIFD_TRY(emit_image_frame(header, stored, frames, writer));
  MULTIFD_TRY(writer(trailer));
  MULTIFD_TRY(emit_seek_table(header, stored, frames, writer));
  MULTIFD_TRY(writer.flush());
  return writer.end();
}

}  // namespace multifd::image::detail
