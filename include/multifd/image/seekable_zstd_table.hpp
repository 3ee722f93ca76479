// SPDX-License-Identifier: MIT
//
// The tables of a file in zstd's seekable format (format/seekable_zstd.md section 20): where each frame lies and what it
// holds. Nothing in the file is trusted, and no frame is read.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/compress/zstd_frame.hpp"
#include "multifd/format/seekable_zstd.hpp"
#include "multifd/image/random_access.hpp"
#include "multifd/memory/page_digest.hpp"

namespace multifd::image {

/// Bounds on what a file may announce.
struct SeekableZstdLimits {
  /// Frames of the image, and entries of the seek table. The default: an image of 4 TiB in frames of 256 KiB.
  std::uint64_t max_frames = std::uint64_t{1} << 24;
  /// Of a frame's content, in files of other programs: each decoder has a buffer of that size. Our own stop at 1 MiB.
  std::size_t max_frame_bytes = 8 * 1024 * 1024;
};

/// A *frame* is a part of the image here, counted from 0; a *stored* one is also a frame of the file, with its own count.
/// Both are the same but in an incremental image, whose other frames are in its base.
///
/// Threads: const methods from any.
/// Cost: memory at most 2.5 times the size of the tables in the file: about 36 bytes a frame.
class SeekableZstdTable {
 public:
  /// Reads and checks the tables.
  ///
  /// Errors: Errc::not_seekable, bad_seek_table; the file's; ENOMEM.
  [[nodiscard]] static Result<SeekableZstdTable> read(const RandomAccess& file, const SeekableZstdLimits& limits = {}) {
    return catch_bad_alloc(Stage::setup, "image: tables", [&]() -> Result<SeekableZstdTable> {
      SeekableZstdTable table;
      MULTIFD_TRY(table.read_all(file, limits));
      return table;
    });
  }

  /// Whether the image frame is there: else another program made the file, and it has no digests.
  bool has_digests() const noexcept { return own_; }
  bool has_checksums() const noexcept { return checksums_; }
  bool incremental() const noexcept { return header_.incremental; }
  /// All 0 without digests.
  const wire::ImageHeader& header() const noexcept { return header_; }

  std::uint64_t bytes() const noexcept { return own_ ? header_.image_bytes : starts_.back(); }
  std::uint64_t frames() const noexcept { return own_ ? digests_.size() : stored_count(); }
  /// The one that holds the byte. Params `offset`: below bytes().
  std::uint64_t frame_at(std::uint64_t offset) const noexcept {
    if (own_) return offset / header_.frame_bytes;
    return static_cast<std::uint64_t>(std::ranges::upper_bound(starts_, offset) - starts_.begin() - 1);
  }
  /// Where its content lies in the image.
  Extent content(std::uint64_t frame) const noexcept {
    if (own_) return {.offset = frame * header_.frame_bytes, .bytes = header_.bytes_of(frame)};
    return {.offset = starts_[frame], .bytes = starts_[frame + 1] - starts_[frame]};
  }
  /// The most of all of them.
  std::size_t most_content_bytes() const noexcept { return most_content_bytes_; }
  /// Whether nothing but zeros is in it, as the digest has it, or size and checksum.
  bool zero(std::uint64_t frame) const noexcept { return (zero_[frame / 64] >> frame % 64 & 1) != 0; }
  /// The first one from `frame` on that is zero, or is not; frames() if there is none.
  std::uint64_t next_zero(std::uint64_t frame) const noexcept { return next(frame, 0); }
  std::uint64_t next_not_zero(std::uint64_t frame) const noexcept { return next(frame, ~std::uint64_t{0}); }
  /// Params `frame`: with digests only.
  const Digest128& digest(std::uint64_t frame) const noexcept { return digests_[frame]; }

  std::uint64_t stored_count() const noexcept { return places_.size() - 1; }
  /// The number of a frame of the image in the file; nothing: it is in the base.
  std::optional<std::uint64_t> stored(std::uint64_t frame) const noexcept {
    if (!incremental()) return frame;
    const std::uint64_t word = stored_[frame / 64];
    if ((word >> frame % 64 & 1) == 0) return std::nullopt;
    const std::uint64_t below = word & ((std::uint64_t{1} << frame % 64) - 1);
    return ranks_[frame / 64] + static_cast<std::uint64_t>(std::popcount(below));
  }
  /// Where it lies in the file.
  Extent place(std::uint64_t stored) const noexcept {
    return {.offset = places_[stored], .bytes = places_[stored + 1] - places_[stored]};
  }
  std::size_t most_frame_bytes() const noexcept { return most_frame_bytes_; }
  /// Of the content; where has_checksums().
  std::uint32_t checksum(std::uint64_t stored) const noexcept { return checksum_[stored]; }
  /// Of the frame as it stands in the file; where has_digests().
  std::uint64_t frame_digest(std::uint64_t stored) const noexcept { return frame_digests_[stored]; }

 private:
  static constexpr Errc bad = Errc::bad_seek_table;

  /// Reads tables in pieces of a few KiB, whatever their size, and takes a digest of what it reads.
  class Pieces {
   public:
    [[nodiscard]] static Result<Pieces> create(const RandomAccess& file, std::uint64_t at) noexcept {
      auto digest = PageDigest::create();
      if (!digest) return std::unexpected(digest.error());
      digest->begin();
      return Pieces(file, at, std::move(*digest));
    }

    /// Calls `each(index, bytes)`, which returns a Result, for `count` records of `bytes`.
    template <class Each>
    [[nodiscard]] Result<void> records(std::uint64_t count, std::size_t bytes, Each&& each) {
      std::array<std::byte, 12 * 1024> buffer;  // whole records of any of the sizes
      const std::size_t room = buffer.size() / bytes;
      for (std::uint64_t done = 0; done < count;) {
        const auto now = static_cast<std::size_t>(std::min<std::uint64_t>(count - done, room));
        const std::span piece = std::span(buffer).first(now * bytes);
        MULTIFD_TRY(bytes_of(piece));
        for (std::size_t i = 0; i < now; ++i) MULTIFD_TRY(each(done + i, piece.subspan(i * bytes, bytes)));
        done += now;
      }
      return {};
    }
    [[nodiscard]] Result<void> bytes_of(std::span<std::byte> to) {
      MULTIFD_TRY(file_->read(at_, to));
      at_ += to.size();
      digest_.add(to);
      return {};
    }
    /// The same, for what the digest leaves out.
    [[nodiscard]] Result<void> bytes_beside(std::span<std::byte> to) {
      MULTIFD_TRY(file_->read(at_, to));
      at_ += to.size();
      return {};
    }
    std::uint64_t digest() const noexcept { return digest_.value(); }

   private:
    Pieces(const RandomAccess& file, std::uint64_t at, PageDigest digest) noexcept
        : file_(&file), at_(at), digest_(std::move(digest)) {}

    const RandomAccess* file_;
    std::uint64_t at_;
    PageDigest digest_;
  };

  SeekableZstdTable() = default;

  std::uint64_t next(std::uint64_t frame, std::uint64_t flip) const noexcept {
    for (; frame < frames(); frame = (frame / 64 + 1) * 64)
      if (const std::uint64_t rest = (zero_[frame / 64] ^ flip) >> frame % 64; rest != 0)
        return std::min(frame + static_cast<std::uint64_t>(std::countr_zero(rest)), frames());
    return frames();
  }

  [[nodiscard]] Result<void> read_all(const RandomAccess& file, const SeekableZstdLimits& limits) {
    const std::uint64_t file_bytes = file.bytes();
    std::array<std::byte, wire::seek_footer_bytes> end;
    if (file_bytes < wire::skippable_header_bytes + end.size())
      return fail(Errc::not_seekable, Stage::parse, "seek table", file_bytes);
    MULTIFD_TRY(file.read(file_bytes - end.size(), end));
    MULTIFD_TRY_ASSIGN(const wire::SeekFooter footer, wire::parse_seek_footer(end));
    checksums_ = footer.checksums;
    const std::uint64_t table_bytes = footer.table_bytes();
    if (table_bytes > file_bytes || footer.entries > limits.max_frames + 1)
      return fail(bad, Stage::parse, "entries of the seek table", footer.entries,
                  table_bytes > file_bytes ? file_bytes : limits.max_frames + 1);
    const std::uint64_t table_at = file_bytes - table_bytes;
    std::array<std::byte, wire::skippable_header_bytes> head;
    MULTIFD_TRY(file.read(table_at, head));
    const wire::SkippableHeader header = wire::parse_skippable_header(head);
    if (header.magic != wire::seek_table_frame_magic || header.content_bytes != table_bytes - head.size())
      return fail(bad, Stage::parse, "seek table: its frame", table_at);

    MULTIFD_TRY_ASSIGN(const std::optional<Extent> image, find_image_frame(file, footer, table_at));
    own_ = image.has_value();
    MULTIFD_TRY_ASSIGN(Pieces pieces, Pieces::create(file, own_ ? image->offset : table_at));
    std::uint64_t digest_said = 0;
    if (own_) {
      MULTIFD_TRY_ASSIGN(digest_said, read_image_frame(pieces, *image, footer.entries - 1, limits));
    } else if (footer.entries > limits.max_frames) {
      return fail(bad, Stage::parse, "entries of the seek table", footer.entries, limits.max_frames);
    }
    MULTIFD_TRY(pieces.bytes_of(head));
    MULTIFD_TRY(read_entries(pieces, footer, limits));
    MULTIFD_TRY(pieces.bytes_of(end));
    const std::uint64_t frames_end = places_.back() + (own_ ? image->bytes : 0);
    if (frames_end != table_at) return fail(bad, Stage::parse, "sum of the frames' sizes", frames_end, table_at);
    if (own_ && pieces.digest() != digest_said)
      return fail(bad, Stage::parse, "digest of the tables", pieces.digest(), digest_said);
    mark_zero();
    return {};
  }

  /// Where it lies. One mark is enough to take the file for ours, and then both have to be there.
  [[nodiscard]] static Result<std::optional<Extent>> find_image_frame(const RandomAccess& file,
                                                                      const wire::SeekFooter& footer,
                                                                      std::uint64_t table_at) {
    if (footer.entries == 0) return std::nullopt;
    std::array<std::byte, wire::seek_entry_bytes> last;
    const auto entry_bytes = std::span(last).first(footer.entry_bytes());
    MULTIFD_TRY(file.read(file.bytes() - wire::seek_footer_bytes - entry_bytes.size(), entry_bytes));
    const std::uint64_t bytes = wire::parse_seek_entry(entry_bytes).frame_bytes;
    if (bytes > table_at) return fail(bad, Stage::parse, "size of the last frame", bytes, table_at);
    const std::uint64_t at = table_at - bytes;
    constexpr std::size_t least = wire::skippable_header_bytes + wire::image_header_bytes + wire::image_trailer_bytes;
    if (bytes < least) return std::nullopt;
    std::array<std::byte, wire::skippable_header_bytes + wire::image_mark.size()> begin;
    std::array<std::byte, wire::image_mark.size()> end;
    MULTIFD_TRY(file.read(at, begin));
    MULTIFD_TRY(file.read(table_at - end.size(), end));
    const bool front = std::ranges::equal(std::span(begin).last<wire::image_mark.size()>(), wire::image_mark);
    const bool back = end == wire::image_mark;
    if (!front && !back) return std::nullopt;
    const auto header = wire::parse_skippable_header(std::span(begin).first<wire::skippable_header_bytes>());
    if (!front || !back || !footer.checksums || header.magic != wire::image_frame_magic ||
        header.content_bytes != bytes - wire::skippable_header_bytes)
      return fail(bad, Stage::parse, "image: its frame", at);
    return Extent{.offset = at, .bytes = bytes};
  }

  /// Returns the digest that the tables should have.
  [[nodiscard]] Result<std::uint64_t> read_image_frame(Pieces& pieces, const Extent& image, std::uint64_t stored,
                                                       const SeekableZstdLimits& limits) {
    std::array<std::byte, wire::skippable_header_bytes + wire::image_header_bytes> head;
    MULTIFD_TRY(pieces.bytes_of(head));
    MULTIFD_TRY_ASSIGN(header_, wire::parse_image_header(std::span(head).last<wire::image_header_bytes>()));
    const std::uint64_t frames = header_.frames();
    if (frames > limits.max_frames) return fail(bad, Stage::parse, "image: frames", frames, limits.max_frames);
    if (header_.incremental ? stored > frames : stored != frames)
      return fail(bad, Stage::parse, "image: entries of the seek table", stored, frames);
    // From here on, as many bytes as the tables take are in the file.
    if (const std::uint64_t want = header_.content_bytes(stored); want != image.bytes - wire::skippable_header_bytes)
      return fail(bad, Stage::parse, "image: size of the tables", image.bytes - wire::skippable_header_bytes, want);
    MULTIFD_TRY_ASSIGN(PageDigest whole, PageDigest::create());
    whole.begin128();
    whole.add128(wire::encode_digest_head(header_));
    digests_.resize(frames);
    MULTIFD_TRY(pieces.records(frames, 16, [&](std::uint64_t i, std::span<const std::byte> bytes) -> Result<void> {
      digests_[i] = wire::load_digest128(bytes.data());
      whole.add128(bytes);
      return {};
    }));
    if (whole.value128() != header_.digest) return fail(bad, Stage::parse, "image: digest of the digests");
    frame_digests_.resize(stored);
    MULTIFD_TRY(pieces.records(stored, 8, [&](std::uint64_t i, std::span<const std::byte> bytes) -> Result<void> {
      frame_digests_[i] = wire::load_le<std::uint64_t>(bytes.data());
      return {};
    }));
    MULTIFD_TRY(read_bitmap(pieces, stored));
    std::array<std::byte, wire::image_trailer_bytes> trailer;
    MULTIFD_TRY(pieces.bytes_beside(trailer));
    return wire::load_le<std::uint64_t>(trailer.data());
  }

  [[nodiscard]] Result<void> read_bitmap(Pieces& pieces, std::uint64_t stored) {
    const std::uint64_t words = header_.bitmap_words();
    stored_.resize(words);
    ranks_.resize(words);
    std::uint64_t count = 0;
    MULTIFD_TRY(pieces.records(words, 8, [&](std::uint64_t i, std::span<const std::byte> bytes) -> Result<void> {
      stored_[i] = wire::load_le<std::uint64_t>(bytes.data());
      ranks_[i] = static_cast<std::uint32_t>(count);
      count += static_cast<std::uint64_t>(std::popcount(stored_[i]));
      return {};
    }));
    const std::uint64_t rest = header_.frames() % 64;
    const bool beyond = words != 0 && rest != 0 && stored_.back() >> rest != 0;
    if (words != 0 && (count != stored || beyond)) return fail(bad, Stage::parse, "image: bitmap", count, stored);
    return {};
  }

  [[nodiscard]] Result<void> read_entries(Pieces& pieces, const wire::SeekFooter& footer,
                                          const SeekableZstdLimits& limits) {
    const std::uint64_t stored = footer.entries - (own_ ? 1 : 0);
    const std::size_t most_content = own_ ? header_.frame_bytes : limits.max_frame_bytes;
    const std::size_t most_frame = ZstdFrameEncoder::bound(most_content);
    places_.resize(stored + 1);
    if (checksums_) checksum_.resize(stored);
    if (!own_) starts_.resize(stored + 1);
    std::uint64_t frame = 0;  // of the image
    return pieces.records(
        footer.entries, footer.entry_bytes(), [&](std::uint64_t i, std::span<const std::byte> bytes) -> Result<void> {
          const wire::SeekEntry entry = wire::parse_seek_entry(bytes);
          if (i == stored) {
            if (entry.content_bytes != 0)
              return fail(bad, Stage::parse, "image: content of its frame", entry.content_bytes);
            return {};
          }
          const bool skipped = !own_ && entry.content_bytes == 0;  // its bytes are nobody's
          if (entry.frame_bytes < wire::skippable_header_bytes || (entry.frame_bytes > most_frame && !skipped))
            return fail(bad, Stage::parse, "seek table: size of a frame", entry.frame_bytes, most_frame);
          if (own_) {
            if (header_.incremental) frame = next_stored(frame);
            const std::uint32_t want = header_.bytes_of(frame++);
            if (entry.content_bytes != want)
              return fail(bad, Stage::parse, "seek table: size of a content", entry.content_bytes, want);
          } else {
            if (entry.content_bytes > most_content)
              return fail(bad, Stage::parse, "seek table: size of a content", entry.content_bytes, most_content);
            starts_[i + 1] = starts_[i] + entry.content_bytes;
          }
          places_[i + 1] = places_[i] + entry.frame_bytes;
          if (checksums_) checksum_[i] = entry.checksum;
          most_content_bytes_ = std::max<std::size_t>(most_content_bytes_, entry.content_bytes);
          if (!skipped) most_frame_bytes_ = std::max<std::size_t>(most_frame_bytes_, entry.frame_bytes);
          return {};
        });
  }

  /// The next stored frame from `frame` on; there is one.
  std::uint64_t next_stored(std::uint64_t frame) const noexcept {
    std::uint64_t rest = stored_[frame / 64] >> frame % 64;
    for (; rest == 0; rest = stored_[frame / 64]) frame = (frame / 64 + 1) * 64;
    return frame + static_cast<std::uint64_t>(std::countr_zero(rest));
  }

  void mark_zero() {
    zero_.assign(frames() / 64 + 1, 0);
    if (frames() == 0) return;
    const auto mark = [&](std::uint64_t frame) { zero_[frame / 64] |= std::uint64_t{1} << frame % 64; };
    if (own_) {
      const std::vector<std::byte> zeros(header_.frame_bytes);
      const Digest128 full = digest128_of(zeros);
      const std::uint64_t last = frames() - 1;
      for (std::uint64_t i = 0; i < last; ++i)
        if (digests_[i] == full) mark(i);
      if (digests_[last] == digest128_of(std::span(zeros).first(header_.bytes_of(last)))) mark(last);
      return;
    }
    // A checksum has 32 bits only: one that is right by accident is no matter where hardly any frame is so small.
    std::vector<std::byte> zeros;
    std::uint32_t checksum = 0;
    for (std::uint64_t i = 0; i < frames(); ++i) {
      const std::uint64_t bytes = content(i).bytes;
      if (bytes == 0) mark(i);  // skippable: nothing to decompress
      if (bytes == 0 || !checksums_ || place(i).bytes > 64 + bytes / 4096) continue;
      if (zeros.empty()) {  // other sizes than that of the first one are no holes
        zeros.resize(bytes);
        checksum = zstd_checksum_of(zeros);
      }
      if (bytes == zeros.size() && checksum_[i] == checksum) mark(i);
    }
  }

  bool own_ = false;
  bool checksums_ = false;
  wire::ImageHeader header_;
  std::size_t most_content_bytes_ = 0;
  std::size_t most_frame_bytes_ = 0;
  std::vector<std::uint64_t> places_;         ///< of stored frames, and where they end
  std::vector<std::uint32_t> checksum_;       ///< of stored frames
  std::vector<std::uint64_t> frame_digests_;  ///< of stored frames, ours only
  std::vector<Digest128> digests_;            ///< of all frames, ours only
  std::vector<std::uint64_t> starts_;         ///< in the image, others' only
  std::vector<std::uint64_t> stored_;         ///< a bit for each frame, incremental only
  std::vector<std::uint32_t> ranks_;          ///< stored frames ahead of each word of stored_
  std::vector<std::uint64_t> zero_;           ///< a bit for each frame
};

}  // namespace multifd::image
