// SPDX-License-Identifier: MIT
//
// Pages that arrive from elsewhere, into a mapped-ram file: what a receiver's hook and a main stream bring.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/image/mapped_ram_head.hpp"
#include "multifd/image/mapped_ram_outlet.hpp"
#include "multifd/options.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::image {

/// Writes pages to their places, as they come, in any number of epochs: a page that comes again replaces the one before.
/// Pages that are zero become holes, in whatever form they came.
///
/// The order of calls: create(), any number of take(), page(), zero(), then end_ram(), stream().raw()... for the devices, end().
/// Threads: take(), page(), zero() and read() any, for different pages; the rest one.
/// Errors: errno of pwrite(), of all calls that write.
class MappedRamSink {
 public:
  /// Params, Errors, Cost: as MappedRamHead::create(), and a bit for each page. `blocks`: in the order of their BlockIds.
  [[nodiscard]] static Result<MappedRamSink> create(File& file, const qemu::StreamConfiguration& what,
                                                    std::span<const qemu::BlockInfo> blocks,
                                                    std::size_t page_bytes = 4096) {
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<MappedRamSink> {
      MULTIFD_TRY_ASSIGN(auto head, MappedRamHead::create(file, what, blocks, page_bytes));
      MULTIFD_TRY_ASSIGN(auto places, MappedRamPlaces::create(file, head.blocks(), page_bytes, 0));
      return MappedRamSink(file, std::make_unique<MappedRamHead>(std::move(head)), std::move(places));
    });
  }

  /// A packet's pages: for a receiver's PacketHook. The buffer stays the receiver's. Errors: errno of pwrite().
  [[nodiscard]] Result<void> take(const ReceivedPacket& packet) noexcept {
    const std::size_t page_bytes = places_->page_bytes();
    const auto normal = packet.offsets.first(packet.normal_pages);
    for (std::size_t i = 0; i < normal.size();) {
      // The pages that are adjacent in the file; in the buffer all are.
      const std::size_t count = adjacent_pages(normal.subspan(i), page_bytes);
      MULTIFD_TRY(write(packet.block, normal[i], {packet.pages.data() + i * page_bytes, count * page_bytes}));
      i += count;
    }
    for (auto zeros = packet.offsets.subspan(packet.normal_pages); !zeros.empty();) {
      const std::size_t count = adjacent_pages(zeros, page_bytes);
      places_->clear(packet.block, zeros[0], count);
      zeros = zeros.subspan(count);
    }
    return {};
  }

  /// One page's bytes. Params: `block`, `offset`: of a page of the file (contract). Errors: errno of pwrite().
  [[nodiscard]] Result<void> page(BlockId block, std::uint64_t offset, std::span<const std::byte> bytes) noexcept {
    return write(block, offset, bytes);
  }
  /// One zero page.
  void zero(BlockId block, std::uint64_t offset) noexcept { places_->clear(block, offset, 1); }

  /// Reads a page back, as it was written last; zeros where it is zero, or has not come.
  ///
  /// Params: `block`, `offset`: as page()'s; `to`: a page's bytes. Errors: errno of pread().
  [[nodiscard]] Result<void> read(BlockId block, std::uint64_t offset, std::span<std::byte> to) const noexcept {
    if (places_->holds(block, offset)) return file_->read(places_->place(block) + offset, to);
    std::ranges::fill(to, std::byte{});
    return {};
  }

  /// Writes the bitmaps, and ends RAM in the stream. Errors: errno of pwrite().
  [[nodiscard]] Result<void> end_ram() noexcept {
    MULTIFD_TRY(places_->write_bitmaps());
    return head_->end_ram();
  }
  /// For the devices' sections, behind end_ram().
  qemu::MainStreamWriter<FileStream>& stream() noexcept { return head_->stream(); }
  /// Ends a stream whose devices came by raw(), with their end mark and description. Errors: errno of pwrite() and
  /// ftruncate().
  [[nodiscard]] Result<void> end() noexcept { return head_->end(); }

  /// Pages that the file holds now. Cost: counts.
  std::uint64_t pages() const noexcept { return places_->pages(); }

 private:
  MappedRamSink(File& file, std::unique_ptr<MappedRamHead> head, std::unique_ptr<MappedRamPlaces> places) noexcept
      : file_(&file), head_(std::move(head)), places_(std::move(places)) {}

  /// Writes adjacent pages, those that are not zero.
  [[nodiscard]] Result<void> write(BlockId block, std::uint64_t offset, std::span<const std::byte> bytes) noexcept {
    const std::size_t page_bytes = places_->page_bytes();
    const auto is_zero = [&](std::size_t at) { return buffer_is_zero(bytes.data() + at, page_bytes); };
    for (std::size_t at = 0; at < bytes.size();) {
      const bool zero = is_zero(at);
      std::size_t end = at + page_bytes;
      while (end < bytes.size() && is_zero(end) == zero) end += page_bytes;
      const std::uint64_t pages = (end - at) / page_bytes;
      if (zero) {
        places_->clear(block, offset + at, pages);
      } else {
        MULTIFD_TRY(file_->write(places_->place(block) + offset + at, bytes.subspan(at, end - at)));
        places_->set(block, offset + at, pages);
      }
      at = end;
    }
    return {};
  }

  File* file_;
  std::unique_ptr<MappedRamHead> head_;
  std::unique_ptr<MappedRamPlaces> places_;
};

}  // namespace multifd::image
