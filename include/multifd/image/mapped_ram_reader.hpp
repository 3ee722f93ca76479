// SPDX-License-Identifier: MIT
//
// Reads a mapped-ram file (format/mapped_ram.md section 12): QEMU's, or this library's. Nothing in the file is trusted.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "multifd/image/random_access.hpp"
#include "multifd/qemu/main_stream.hpp"

namespace multifd::image {

/// Options of MappedRamReader::open().
struct MappedRamLimits {
  /// Bounds on what the file may announce, and the guest's page size; `mapped_ram` and `extension` play no part.
  qemu::MainStreamLimits stream{};
  /// Where the stream begins: QEMU's `file:PATH,offset=N`. Places of bitmaps and pages count from the file's beginning all
  /// the same.
  std::uint64_t offset = 0;
};

/// A mapped-ram file whose stream has been read, and whose pages have not: they are read from where they lie.
///
/// Threads: const methods from any.
/// Cost: memory as MainStreamParser; nothing grows with the guest's memory.
class MappedRamReader {
 public:
  /// Reads the stream: configuration, list of blocks, and what stands behind RAM, to the file's end.
  ///
  /// Params: `file`: must outlive the reader. Its size must not shrink meanwhile.
  /// Errors: Errc::not_mapped_ram (a stream without the capability), bad_mapped_ram, bad_image_layout (subject: the block;
  ///   detail: the offset), truncated_image, truncated_stream (the stream ends in the middle); those of MainStreamParser;
  ///   the file's.
  /// Cost: reads the stream, and no bitmap and no page.
  [[nodiscard]] static Result<MappedRamReader> open(const RandomAccess& file, const MappedRamLimits& limits = {}) {
    qemu::MainStreamLimits stream = limits.stream;
    stream.mapped_ram = true;
    stream.extension = false;
    auto parser = qemu::MainStreamParser::create(stream);
    if (!parser) return std::unexpected(parser.error());
    MappedRamReader reader(file, std::move(*parser), limits.offset);
    if (auto read = reader.read_stream(); !read) {
      Error error = read.error();
      if (error.subject.view().empty()) error.subject = reader.parser_.subject();
      return std::unexpected(error);
    }
    return reader;
  }

  /// The blocks, in the file's order; a block with pages_offset 0 is shared memory that the file does not hold.
  std::span<const qemu::BlockInfo> blocks() const noexcept { return parser_.blocks(); }
  std::size_t page_bytes() const noexcept { return parser_.page_bytes(); }
  std::uint64_t ram_bytes() const noexcept { return parser_.ram_bytes(); }
  /// Machine type, capabilities, uuid.
  const qemu::MainStreamParser& stream() const noexcept { return parser_; }
  const RandomAccess& file() const noexcept { return *file_; }
  /// Where the stream begins.
  std::uint64_t offset() const noexcept { return offset_; }
  /// The devices' sections, end mark and VM description, as they stand behind RAM's END.
  const Extent& devices() const noexcept { return devices_; }

  /// Calls `on_run(offset, bytes)` for each run of pages of the block that the file holds, in order; all other pages are
  /// zero. `on_run` returns a Result<void>, whose error ends the walk.
  ///
  /// Params: `block`: index into blocks(); `first_page`, `pages`: which pages to look at; inside the block. Runs that
  ///   cross the end are cut there.
  /// Errors: on_run's; those of RandomAccess::read(), as Errc::truncated_image.
  /// Cost: reads the bitmap in pieces of 4 KiB, and no hole of it. Allocates nothing.
  template <class OnRun>
  [[nodiscard]] Result<void> for_each_run(std::size_t block, std::uint64_t first_page, std::uint64_t pages,
                                          OnRun&& on_run) const {
    const qemu::BlockInfo& info = blocks()[block];
    if (info.pages_offset == 0) return {};
    std::array<std::byte, 4096> bitmap;
    std::uint64_t run = 0;  // pages of the open run
    const std::uint64_t end = first_page + pages;
    const auto close = [&](std::uint64_t behind) -> Result<void> {
      if (run == 0) return {};
      const std::uint64_t count = std::exchange(run, 0);
      return on_run((behind - count) * page_bytes(), count * page_bytes());
    };
    for (std::uint64_t page = first_page; page < end;) {
      // Whole words of the bitmap: pages of one word may belong to two walks.
      const std::uint64_t first_word = page / 64;
      const std::uint64_t place = info.bitmap_offset + first_word * 8;
      const auto data = file_->next_data(place);
      if (!data) return std::unexpected(data.error());
      const std::uint64_t words_left = (end + 63) / 64 - first_word;
      if (data->bytes == 0 || data->offset - place >= words_left * 8) {
        MULTIFD_TRY(close(page));
        return {};  // a hole up to the end: no more pages
      }
      if (const std::uint64_t hole = (data->offset - place) / 8; hole > 0) {
        MULTIFD_TRY(close(page));
        page = (first_word + hole) * 64;
        continue;
      }
      const std::size_t words = static_cast<std::size_t>(std::min<std::uint64_t>(words_left, bitmap.size() / 8));
      MULTIFD_TRY(file_->read(place, std::span(bitmap).first(words * 8)));
      for (std::size_t i = 0; i < words; ++i) {
        const std::uint64_t last = std::min(end, (first_word + i + 1) * 64);
        auto bits = wire::load_le<std::uint64_t>(&bitmap[i * 8]);
        while (page < last) {
          const unsigned in_word = page % 64;
          const std::uint64_t rest = bits >> in_word;
          const auto left = static_cast<unsigned>(last - page);
          const auto set = std::min(static_cast<unsigned>(std::countr_one(rest)), left);
          run += set;
          page += set;
          if (set == left) break;
          MULTIFD_TRY(close(page));
          page += std::min(static_cast<unsigned>(std::countr_zero(rest >> set)), left - set);
        }
      }
    }
    return close(end);
  }

  /// The same for a whole block. Errors: as above: Errc::truncated_image and on_run's.
  template <class OnRun>
  [[nodiscard]] Result<void> for_each_run(std::size_t block, OnRun&& on_run) const {
    return for_each_run(block, 0, blocks()[block].used_length / page_bytes(), on_run);
  }

 private:
  MappedRamReader(const RandomAccess& file, qemu::MainStreamParser parser, std::uint64_t offset)
      : file_(&file), parser_(std::move(parser)), offset_(offset) {}

  [[nodiscard]] Result<void> read_stream() noexcept {
    std::uint64_t at = offset_;     // what is read next
    std::uint64_t place = offset_;  // of the next element
    for (;;) {
      auto element = parser_.next();
      if (!element) return std::unexpected(element.error());
      if (*element) {
        place += (*element)->bytes.size();
        if (parser_.ram_complete() && devices_.offset == 0) devices_.offset = place;
        switch ((*element)->kind) {
          case qemu::ElementKind::section_start:
            if (!parser_.mapped_ram()) return fail(Errc::not_mapped_ram, Stage::parse, "image");
            break;
          case qemu::ElementKind::block: {
            const auto next = check_block(parser_.blocks().back(), place);
            if (!next) return std::unexpected(next.error());
            if (*next == place) break;
            at = place = *next;
            parser_.seek();
            break;
          }
          default: break;
        }
        continue;
      }
      if (at >= file_->bytes()) break;
      // Up to the end of RAM the stream is short pieces between long gaps.
      const std::uint64_t most = parser_.ram_complete() ? 64 * 1024 : 4096;
      const auto room = parser_.room();
      const auto bytes = static_cast<std::size_t>(std::min({std::uint64_t{room.size()}, most, file_->bytes() - at}));
      MULTIFD_TRY(file_->read(at, room.first(bytes)));
      parser_.commit(bytes);
      at += bytes;
    }
    MULTIFD_TRY(parser_.finish());
    devices_.bytes = place - devices_.offset;
    return {};
  }

  /// Where the stream goes on behind a block. `place`: behind its header.
  [[nodiscard]] Result<std::uint64_t> check_block(const qemu::BlockInfo& block, std::uint64_t place) const noexcept {
    if (block.bitmap_offset == 0 && block.pages_offset == 0) {
      if (parser_.capabilities().size() > 1) return place;  // x-ignore-shared
      return fail(Errc::bad_mapped_ram, Stage::parse, "image: block without pages, and without x-ignore-shared", 0, 0,
                  block.idstr);
    }
    const wire::MappedRamPlace there{.bitmap_offset = block.bitmap_offset, .pages_offset = block.pages_offset};
    auto checked = wire::check_mapped_ram(there, place, block.used_length, parser_.page_bytes(), file_->bytes());
    if (!checked) {
      checked.error().subject = block.idstr;
      return std::unexpected(checked.error());
    }
    return block.pages_offset + block.used_length;
  }

  const RandomAccess* file_;
  qemu::MainStreamParser parser_;
  std::uint64_t offset_;
  Extent devices_;
};

}  // namespace multifd::image
