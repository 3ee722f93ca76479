// SPDX-License-Identifier: MIT
//
// The pages of a guest that lies in a file: in a mapped-ram image, as it is or compressed, or in a raw file, which is one
// RAM block from its first byte to its last.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/image/mapped_ram_reader.hpp"
#include "multifd/limits.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::postcopy {

/// Options of ImagePages.
struct ImagePagesOptions {
  /// How many frames of a compressed file a fetcher keeps decompressed, each with a decoder of 160 KiB: faults come in a few
  /// places at a time, and what is fetched in the background is fetched in order. At least 1.
  unsigned urgent_frames = 4, background_frames = 2;
};

/// Serves guests from a file.
///
/// Threads: as PageStore; fetchers share no lock, also those of a compressed file (but for what comes from its base).
/// Cost: a bit for each page up to the last one that the file holds. A fetcher: batch_bytes, and options' frames where the
///   file is compressed.
class ImagePages final : public PageStore {
 public:
  /// Takes the blocks that the image holds. Blocks that are shared memory are not in it, and not in blocks().
  ///
  /// Params: `image`: outlives this, and its file must not change. A page of over batch_bytes is refused.
  /// Errors: Errc::bad_option, page_size_mismatch; those of the file; ENOMEM. Cost: reads the bitmaps.
  [[nodiscard]] static Result<std::unique_ptr<ImagePages>> of_image(const image::MappedRamReader& image,
                                                                    const ImagePagesOptions& options = {}) {
    return make(image.file(), image.page_bytes(), options, [&](Content& content) -> Result<void> {
      for (std::size_t i = 0; i < image.blocks().size(); ++i) {
        const qemu::BlockInfo& block = image.blocks()[i];
        if (block.pages_offset == 0) continue;
        content.blocks.push_back({.idstr = std::string(block.idstr), .bytes = block.used_length});
        Place place{.offset = block.pages_offset, .bitmap = {}};
        // Fresh memory of the system: what stays zero of it, as for the holes of a bitmap, takes no room.
        place.bitmap.reset(static_cast<std::uint64_t*>(
            std::calloc(block.used_length / image.page_bytes() / 64 + 1, sizeof(std::uint64_t))));
        if (!place.bitmap) return fail_errno(Stage::setup, "image pages", ENOMEM);
        MULTIFD_TRY(image.for_each_run(i, [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
          for (std::uint64_t page = offset / image.page_bytes(); bytes > 0; bytes -= image.page_bytes(), ++page)
            place.bitmap[page / 64] |= std::uint64_t{1} << page % 64;
          return {};
        }));
        content.places.push_back(std::move(place));
      }
      return {};
    });
  }

  /// Takes all of a file as one block.
  ///
  /// Params: `file`: outlives this, and must not change; whole pages. `page_bytes`: a power of two, up to batch_bytes.
  /// Errors: Errc::bad_option, page_size_mismatch (the file ends inside of a page); ENOMEM. Cost: reads nothing.
  [[nodiscard]] static Result<std::unique_ptr<ImagePages>> of_raw(const image::RandomAccess& file,
                                                                  std::size_t page_bytes, std::string_view idstr,
                                                                  const ImagePagesOptions& options = {}) {
    if (page_bytes == 0 || file.bytes() == 0 || file.bytes() % page_bytes != 0)
      return fail(Errc::page_size_mismatch, Stage::setup, "image pages", page_bytes, file.bytes(), idstr);
    return make(file, page_bytes, options, [&](Content& content) -> Result<void> {
      content.blocks.push_back({.idstr = std::string(idstr), .bytes = file.bytes()});
      content.places.push_back({.offset = 0, .bitmap = {}});
      return {};
    });
  }

  /// The same pages for another guest, with a cancel() of its own. Errors: ENOMEM. Cost: none.
  [[nodiscard]] Result<std::unique_ptr<ImagePages>> for_another_guest() const noexcept {
    std::unique_ptr<ImagePages> other(new (std::nothrow) ImagePages(content_, options_));
    if (!other) return fail_errno(Stage::setup, "image pages", ENOMEM);
    return other;
  }

  std::span<const StoreBlock> blocks() const noexcept override { return content_->blocks; }
  std::size_t page_bytes() const noexcept override { return content_->page_bytes; }
  /// Never: what a file has refused once it refuses again.
  bool may_return(const Error&) const noexcept override { return false; }
  void cancel() noexcept override { cancelled_.store(true, std::memory_order_relaxed); }

  /// Whether the file holds the page: all others are zero. Of a raw file: all.
  bool holds(BlockId block, std::uint64_t offset) const noexcept {
    const Place& place = content_->places[index(block)];
    const std::uint64_t page = offset / page_bytes();
    return !place.bitmap || (place.bitmap[page / 64] >> page % 64 & 1) != 0;
  }

 private:
  struct Free {
    void operator()(std::uint64_t* memory) const noexcept { std::free(memory); }
  };
  /// Where a block's pages lie, and which are there.
  struct Place {
    std::uint64_t offset = 0;
    std::unique_ptr<std::uint64_t[], Free> bitmap;  ///< null: the file's holes say it
  };
  /// What all guests share.
  struct Content {
    const image::RandomAccess* file;
    std::size_t page_bytes;
    std::vector<StoreBlock> blocks{};
    std::vector<Place> places{};  ///< by BlockId
  };

  /// Reads what is asked for when it is taken.
  class Fetcher final : public PageFetcher {
   public:
    Fetcher(const ImagePages& store, std::unique_ptr<const image::RandomAccess> view,
            std::unique_ptr<std::byte[]> buffer) noexcept
        : store_(&store), view_(std::move(view)), buffer_(std::move(buffer)) {}

    unsigned window() const noexcept override { return 1; }
    PageRange fetched_together(const PageRange& page) const noexcept override {
      if (count_ == 0) return page;  // zero: nothing may have been read for it
      const StoreBlock& block = store_->content_->blocks[index(page.block)];
      const std::uint64_t first = store_->content_->places[index(page.block)].offset;
      const image::Extent frame = file().read_together(first + page.offset);
      if (frame.bytes == 0) return page;
      // Whole pages of the block, and no more than a request takes: of a larger frame what lies behind.
      const std::uint64_t size = store_->page_bytes();
      std::uint64_t begin = std::max(frame.offset, first) - first;
      begin = (begin + size - 1) / size * size;
      const std::uint64_t end = std::min(frame.end() - first, block.bytes) / size * size;
      if (end - begin > batch_bytes) begin = page.offset;
      return {.block = page.block, .offset = begin, .bytes = std::min<std::uint64_t>(end - begin, batch_bytes)};
    }
    void cancel() noexcept override { cancelled_.store(true, std::memory_order_relaxed); }

   private:
    [[nodiscard]] Result<void> do_ask(const PageRange& range) noexcept override {
      asked_ = range;
      return check_cancelled();
    }

    [[nodiscard]] Result<FetchedPages> do_take() noexcept override {
      MULTIFD_TRY(check_cancelled());
      count_ = 0;
      // Without a bitmap one page is read as fast as it is looked for.
      if (store_->content_->places[index(asked_.block)].bitmap || asked_.bytes == store_->page_bytes())
        MULTIFD_TRY(read_marked());
      else
        MULTIFD_TRY(read_data());
      return FetchedPages{.range = asked_,
                          .offsets = std::span(offsets_).first(count_),
                          .bytes = {buffer_.get(), count_ * store_->page_bytes()}};
    }

    [[nodiscard]] Result<void> check_cancelled() const noexcept {
      if (cancelled_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, Stage::read, "image pages");
      return {};
    }

    [[nodiscard]] Result<void> read_marked() noexcept {
      const std::size_t page = store_->page_bytes();
      for (std::uint64_t at = asked_.offset; at < asked_.end();) {
        const std::uint64_t begin = at;
        while (at < asked_.end() && store_->holds(asked_.block, at)) at += page;
        MULTIFD_TRY(read(begin, at));
        while (at < asked_.end() && !store_->holds(asked_.block, at)) at += page;
      }
      return {};
    }

    [[nodiscard]] Result<void> read_data() noexcept {
      const std::uint64_t page = store_->page_bytes();
      for (std::uint64_t at = asked_.offset; at < asked_.end();) {
        MULTIFD_TRY_ASSIGN(const image::Extent data, file().next_data(at));
        if (data.bytes == 0 || data.offset >= asked_.end()) break;
        // Holes have the file system's size of blocks, which may be less than a page.
        const std::uint64_t begin = std::max(at, data.offset / page * page);
        at = std::min((data.end() + page - 1) / page * page, asked_.end());
        MULTIFD_TRY(read(begin, at));
      }
      return {};
    }

    /// Appends a run of pages of the block, without those that are zero.
    [[nodiscard]] Result<void> read(std::uint64_t begin, std::uint64_t end) noexcept {
      if (begin == end) return {};
      const std::size_t page = store_->page_bytes();
      std::byte* from = buffer_.get() + count_ * page;
      MULTIFD_TRY(file().read(store_->content_->places[index(asked_.block)].offset + begin,
                              {from, static_cast<std::size_t>(end - begin)}));
      for (std::uint64_t offset = begin; offset < end; offset += page, from += page) {
        if (buffer_is_zero(from, page)) continue;
        std::byte* const to = buffer_.get() + count_ * page;
        if (to != from) std::memmove(to, from, page);
        offsets_[count_++] = offset;
      }
      return {};
    }

    const image::RandomAccess& file() const noexcept { return view_ ? *view_ : *store_->content_->file; }

    const ImagePages* store_;
    std::unique_ptr<const image::RandomAccess> view_;  ///< null: the store's file
    std::unique_ptr<std::byte[]> buffer_;
    PageRange asked_;
    std::array<std::uint64_t, batch_bytes / 512> offsets_{};
    std::size_t count_ = 0;
    std::atomic<bool> cancelled_ = false;
  };

  ImagePages(std::shared_ptr<const Content> content, const ImagePagesOptions& options) noexcept
      : content_(std::move(content)), options_(options) {}

  template <class Fill>
  [[nodiscard]] static Result<std::unique_ptr<ImagePages>> make(const image::RandomAccess& file, std::size_t page_bytes,
                                                                const ImagePagesOptions& options, Fill&& fill) {
    if (!std::has_single_bit(page_bytes) || page_bytes < 512 || page_bytes > batch_bytes)
      return fail(Errc::page_size_mismatch, Stage::setup, "image pages", page_bytes, batch_bytes);
    if (options.urgent_frames == 0 || options.background_frames == 0)
      return fail(Errc::bad_option, Stage::setup, "image pages: frames");
    return catch_bad_alloc(Stage::setup, "image pages", [&]() -> Result<std::unique_ptr<ImagePages>> {
      auto content = std::make_shared<Content>(Content{.file = &file, .page_bytes = page_bytes});
      if (auto filled = fill(*content); !filled) return std::unexpected(filled.error());
      return std::unique_ptr<ImagePages>(new ImagePages(std::move(content), options));
    });
  }

  [[nodiscard]] Result<std::unique_ptr<PageFetcher>> do_open(FetchKind kind) noexcept override {
    if (cancelled_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, Stage::setup, "image pages");
    MULTIFD_TRY_ASSIGN(auto view, content_->file->for_one_thread(
                                      kind == FetchKind::urgent ? options_.urgent_frames : options_.background_frames));
    std::unique_ptr<std::byte[]> buffer(new (std::nothrow) std::byte[batch_bytes]);
    std::unique_ptr<PageFetcher> fetcher;
    if (buffer) fetcher.reset(new (std::nothrow) Fetcher(*this, std::move(view), std::move(buffer)));
    if (!fetcher) return fail_errno(Stage::setup, "image pages", ENOMEM);
    return fetcher;
  }

  const std::shared_ptr<const Content> content_;
  const ImagePagesOptions options_;
  std::atomic<bool> cancelled_ = false;
};

}  // namespace multifd::postcopy
