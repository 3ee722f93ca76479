// SPDX-License-Identifier: MIT
//
// Writes a channel's pages to their places in a mapped-ram file: a model of engine::Outlet.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/engine/outlet.hpp"
#include "multifd/format/mapped_ram.hpp"
#include "multifd/image/file.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/main_memory.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/qemu/element.hpp"

namespace multifd::image {

/// What the outlets of one file share: where the blocks lie, which pages the file holds, and a barrier: the reader of packets
/// orders epochs, a file does not. So no channel writes pages of an epoch before all have written those of the one before.
///
/// Threads: any, all methods; write_bitmaps() when the outlets are through.
class MappedRamPlaces {
 public:
  /// Params: `blocks`: with their places, in the order of the map's BlockIds. Errors: ENOMEM.
  /// Cost: a bit for each page.
  [[nodiscard]] static Result<std::unique_ptr<MappedRamPlaces>> create(File& file,
                                                                       std::span<const qemu::BlockInfo> blocks,
                                                                       std::size_t page_bytes, std::size_t channels) {
    return catch_bad_alloc(Stage::setup, "image", [&]() -> Result<std::unique_ptr<MappedRamPlaces>> {
      return std::unique_ptr<MappedRamPlaces>(new MappedRamPlaces(file, blocks, page_bytes, channels));
    });
  }

  /// Notes that the file holds so many adjacent pages from `offset` on, or that they are zero: these become holes where they
  /// were pages before.
  void set(BlockId block, std::uint64_t offset, std::uint64_t pages) noexcept {
    for_each_word(block, offset, pages, [](std::atomic<std::uint64_t>& word, std::uint64_t bits, std::uint64_t) {
      word.fetch_or(bits, std::memory_order_relaxed);  // relaxed: the crew's join comes before write_bitmaps()
    });
  }
  void clear(BlockId block, std::uint64_t offset, std::uint64_t pages) noexcept {
    for_each_word(block, offset, pages, [&](std::atomic<std::uint64_t>& word, std::uint64_t bits, std::uint64_t first) {
      std::uint64_t was = word.fetch_and(~bits, std::memory_order_relaxed) & bits;
      while (was != 0) {
        const auto skip = static_cast<unsigned>(std::countr_zero(was));
        const auto count = static_cast<unsigned>(std::countr_one(was >> skip));
        // Where the file system has no holes the bytes stay: the bitmap says that they do not count.
        file_.punch({place(block) + (first + skip) * page_bytes_, count * page_bytes_});
        if (skip + count == 64) break;
        was &= ~std::uint64_t{0} << (skip + count);
      }
    });
  }

  /// Whether the file holds a page.
  bool holds(BlockId block, std::uint64_t offset) const noexcept {
    const std::uint64_t page = offset / page_bytes_;
    const std::uint64_t word = blocks_[index(block)].bitmap[page / 64].load(std::memory_order_relaxed);
    return (word >> page % 64 & 1) != 0;
  }

  /// Writes all bitmaps. Zeros stay a hole, and replace what a device, or an older file, holds there.
  ///
  /// All pages of blocks that are not main memory count as held (format/mapped_ram.md section 12.2): zero pages among them
  /// are holes that a reader reads. Errors: errno of pwrite() and lseek().
  [[nodiscard]] Result<void> write_bitmaps() noexcept {
    for (Block& block : blocks_) {
      if (!block.main_memory) MULTIFD_TRY(hold_all(block));
      std::array<std::byte, 4096> bytes;
      for (std::size_t word = 0; word < block.words; word += bytes.size() / 8) {
        const std::size_t count = std::min(bytes.size() / 8, block.words - word);
        std::uint64_t any = 0;
        for (std::size_t i = 0; i < count; ++i) {
          const std::uint64_t bits = block.bitmap[word + i].load(std::memory_order_relaxed);
          any |= bits;
          wire::store_le(&bytes[i * 8], bits);
        }
        const std::uint64_t place = block.bitmap_offset + word * 8;
        if (any == 0) {
          MULTIFD_TRY_ASSIGN(const Extent data, file_.next_data(place));
          if (data.bytes == 0 || data.offset >= place + count * 8) continue;
        }
        MULTIFD_TRY(file_.write(place, std::span(bytes).first(count * 8)));
      }
    }
    return {};
  }

  /// Pages that the file holds: behind write_bitmaps() also the zero pages of blocks that are not main memory.
  std::uint64_t pages() const noexcept {
    std::uint64_t sum = 0;
    for (const Block& block : blocks_)
      for (std::size_t i = 0; i < block.words; ++i)
        sum += static_cast<unsigned>(std::popcount(block.bitmap[i].load(std::memory_order_relaxed)));
    return sum;
  }

  std::uint64_t place(BlockId block) const noexcept { return blocks_[index(block)].pages_offset; }
  std::size_t page_bytes() const noexcept { return page_bytes_; }

  /// Waits until every channel has closed this epoch. Errors: Errc::cancelled, by stop().
  [[nodiscard]] Result<void> close_epoch(std::uint64_t epoch) noexcept {
    barrier_.update([this] { ++closings_; });
    const auto all_closed = [&] { return closings_ >= (epoch + 1) * channels_; };
    engine::Monitor::Lock held = barrier_.lock();
    barrier_.wait(held, all_closed);
    return all_closed() ? Result<void>{} : fail(Errc::cancelled, Stage::sync);
  }
  void stop() noexcept { barrier_.stop(); }

 private:
  struct Block {
    std::uint64_t bitmap_offset;
    std::uint64_t pages_offset;
    std::uint64_t pages;
    std::size_t words;
    bool main_memory;
    std::unique_ptr<std::atomic<std::uint64_t>[]> bitmap;
  };

  MappedRamPlaces(File& file, std::span<const qemu::BlockInfo> blocks, std::size_t page_bytes, std::size_t channels)
      : file_(file), page_bytes_(page_bytes), channels_(channels) {
    const MainMemory main_memory(blocks, &qemu::BlockInfo::used_length);
    for (const qemu::BlockInfo& block : blocks) {
      const std::uint64_t pages = block.used_length / page_bytes;
      const std::size_t words = bitmap_words(pages);
      blocks_.push_back({block.bitmap_offset, block.pages_offset, pages, words, main_memory.holds(block),
                         std::make_unique<std::atomic<std::uint64_t>[]>(words)});
    }
  }

  /// Makes the file hold a block's zero pages, too. They take room only where the file has no holes.
  [[nodiscard]] Result<void> hold_all(Block& block) noexcept {
    static constexpr std::array<std::byte, 4096> zeros{};
    for (std::uint64_t page = 0; page < block.pages; ++page) {
      const std::uint64_t bit = std::uint64_t{1} << page % 64;
      if ((block.bitmap[page / 64].fetch_or(bit, std::memory_order_relaxed) & bit) != 0) continue;
      const Extent place{block.pages_offset + page * page_bytes_, page_bytes_};
      MULTIFD_TRY_ASSIGN(const Extent data, file_.next_data(place.offset));
      if (data.bytes == 0 || data.offset >= place.end()) continue;
      for (std::uint64_t at = 0; at < place.bytes; at += zeros.size())
        MULTIFD_TRY(file_.write(place.offset + at, std::span(zeros).first(std::min(page_bytes_ - at, zeros.size()))));
    }
    return {};
  }

  /// Calls change(word, bits, page of bit 0) for each word that holds some of the pages.
  template <class Change>
  void for_each_word(BlockId block, std::uint64_t offset, std::uint64_t pages, Change&& change) noexcept {
    std::uint64_t page = offset / page_bytes_;
    while (pages > 0) {
      const std::uint64_t count = std::min(pages, 64 - page % 64);
      const std::uint64_t bits = ~std::uint64_t{0} >> (64 - count) << page % 64;
      change(blocks_[index(block)].bitmap[page / 64], bits, page / 64 * 64);
      page += count;
      pages -= count;
    }
  }

  File& file_;
  const std::size_t page_bytes_;
  const std::size_t channels_;
  std::vector<Block> blocks_;
  engine::Monitor barrier_;
  std::uint64_t closings_ = 0;  ///< under the monitor: epochs closed, summed up over the channels
};

/// A model of engine::Outlet. Counts the bytes of pages as what it writes.
class MappedRamOutlet {
 public:
  /// Params `pages`: what pages are written to: the file, or the same one opened with O_DIRECT. Both outlive this object.
  MappedRamOutlet(MappedRamPlaces& places, File& pages) noexcept : places_(&places), pages_(&pages) {}

  [[nodiscard]] Result<engine::Sent> begin() noexcept { return engine::Sent{}; }

  [[nodiscard]] Result<engine::Sent> send(const engine::PageList& list, engine::Meter& meter) noexcept {
    const std::uint64_t page_bytes = places_->page_bytes();
    const std::uint64_t place = places_->place(list.id);
    const std::uint64_t bytes = list.normal_pages * page_bytes;
    MULTIFD_TRY(meter.acquire(bytes));
    std::size_t done = 0;
    // Neighbours in memory are neighbours in the file, unless they are copies.
    for (const iovec& run : list.runs) {
      for (std::size_t at = 0; at < run.iov_len;) {
        const std::size_t count =
            adjacent_pages(list.offsets.subspan(done, (run.iov_len - at) / page_bytes), page_bytes);
        const std::span part(static_cast<const std::byte*>(run.iov_base) + at, count * page_bytes);
        MULTIFD_TRY(pages_->write(place + list.offsets[done], part));
        meter.moved(part.size());
        places_->set(list.id, list.offsets[done], count);
        done += count;
        at += part.size();
      }
    }
    while (done < list.offsets.size()) {
      const std::size_t count = adjacent_pages(list.offsets.subspan(done), page_bytes);
      places_->clear(list.id, list.offsets[done], count);
      done += count;
    }
    meter.wrote();
    return engine::Sent{.payload_bytes = bytes, .wire_bytes = bytes};
  }

  [[nodiscard]] Result<void> push_out(engine::Meter&) noexcept { return {}; }

  [[nodiscard]] Result<engine::Sent> close_epoch(std::uint64_t epoch, engine::Meter&) noexcept {
    MULTIFD_TRY(places_->close_epoch(epoch));
    return engine::Sent{};
  }

  [[nodiscard]] Result<void> end() noexcept { return {}; }
  void shutdown() noexcept { places_->stop(); }

 private:
  MappedRamPlaces* places_;
  File* pages_;
};
static_assert(engine::check_outlet<MappedRamOutlet>());

}  // namespace multifd::image
