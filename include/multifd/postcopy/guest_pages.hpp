// SPDX-License-Identifier: MIT
//
// GuestPages: the memory of a guest that has stopped, as a PageStore. A page that was never touched is not read.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"
#include "multifd/zero/buffer_is_zero.hpp"
#include "multifd/zero/untouched_pages.hpp"

namespace multifd::postcopy {

/// Guest memory of this process. The guest must have stopped before open(): nobody writes to its memory any more.
///
/// Threads: any, all methods. Lifetime: the memory must outlive it.
class GuestPages final : public PageStore {
 public:
  /// Params: `ram`: at least one block, all with memory; may be destroyed afterwards. `untouched`: the files of shared
  ///   memory, as UntouchedPages::snapshot() wants them.
  /// Errors: Errc::bad_option (no block), block_without_memory; those of UntouchedPages::snapshot().
  /// Cost: one bit a page, and the scan for pages that were never touched.
  [[nodiscard]] static Result<std::unique_ptr<GuestPages>> open(const RamMap& ram,
                                                                const UntouchedOptions& untouched = {}) {
    MULTIFD_TRY_ASSIGN(auto snapshot, UntouchedPages::snapshot(ram, untouched));
    return open(ram, std::move(snapshot));
  }
  /// The same without a scan. Params: `untouched`: a snapshot of the stopped guest; an empty one where nobody asks for pages
  ///   that were never touched: then each page is read that is asked for.
  /// Errors: Errc::bad_option, block_without_memory; ENOMEM. Cost: none that grows with the memory.
  [[nodiscard]] static Result<std::unique_ptr<GuestPages>> open(const RamMap& ram, UntouchedPages untouched) {
    if (ram.blocks().empty()) return fail(Errc::bad_option, Stage::setup, "GuestPages: no RAM block");
    for (const RamBlock& block : ram.blocks())
      if (block.access == Access::none)
        return fail(Errc::block_without_memory, Stage::setup, "GuestPages", 0, 0, block.idstr);
    return catch_bad_alloc(Stage::setup, "GuestPages", [&]() -> Result<std::unique_ptr<GuestPages>> {
      std::unique_ptr<GuestPages> pages(new GuestPages(ram, std::move(untouched)));
      for (const RamBlock& block : ram.blocks()) pages->blocks_.push_back({block.idstr, block.bytes});
      return pages;
    });
  }

  using PageStore::open;

  std::span<const StoreBlock> blocks() const noexcept override { return blocks_; }
  std::size_t page_bytes() const noexcept override { return ram_.page_bytes(); }
  bool may_return(const Error&) const noexcept override { return false; }
  void cancel() noexcept override {}

  /// Writes the offsets of a range's pages into `offsets`: first those that are not zero, ascending, then the others, ascending.
  ///
  /// Params `range`: inside of a block (contract); `offsets`: room for its pages; `runs`: gets the memory of the pages that
  ///   are not zero. Returns how many are not zero. Cost: reads pages up to their first byte that is not zero.
  std::size_t list(const PageRange& range, std::span<std::uint64_t> offsets, PageRuns& runs) const noexcept {
    const std::size_t size = page_bytes();
    const std::size_t count = range.bytes / size;
    std::byte* const memory = ram_.block(range.block).host.data() + range.offset;
    std::array<std::uint64_t, batch_bytes / min_page_bytes> zeros;
    std::size_t normal = 0;
    std::size_t zero = 0;
    runs.clear();
    for (std::size_t at = 0; at < count;) {
      const std::size_t group = std::min(count - at, zero_mask_pages);
      std::uint64_t mask = zero_mask(range.block, range.offset / size + at, memory + at * size, group);
      for (std::size_t i = 0; i < group; ++i, mask >>= 1) {
        const std::uint64_t offset = range.offset + (at + i) * size;
        if ((mask & 1) != 0) {
          zeros[zero++] = offset;
        } else {
          offsets[normal++] = offset;
          runs.add(memory + (at + i) * size, size);
        }
      }
      at += group;
    }
    std::copy_n(zeros.begin(), zero, offsets.begin() + static_cast<std::ptrdiff_t>(normal));
    return normal;
  }

  const RamMap& ram() const noexcept { return ram_; }

 private:
  class Fetcher;

  GuestPages(const RamMap& ram, UntouchedPages untouched) : ram_(ram), untouched_(std::move(untouched)) {}

  [[nodiscard]] Result<std::unique_ptr<PageFetcher>> do_open(FetchKind) noexcept override;

  /// Which of up to 64 adjacent pages are zero. Asks what is known of untouched pages without taking them from it, because
  /// the guest has stopped and a page may be asked for twice.
  std::uint64_t zero_mask(BlockId block, std::uint64_t first, const std::byte* memory,
                          std::size_t count) const noexcept {
    std::array<const std::byte*, zero_mask_pages> pages;
    std::array<std::uint8_t, zero_mask_pages> bits;
    std::uint64_t mask = 0;
    std::size_t touched = 0;
    for (std::size_t i = 0; i < count;) {
      const std::size_t run = untouched_.other_run(block, first + i, count - i);
      for (const std::size_t end = i + run; i < end; ++i) {
        pages[touched] = memory + i * page_bytes();
        bits[touched++] = static_cast<std::uint8_t>(i);
      }
      while (i < count && untouched_.other_run(block, first + i, 1) == 0) mask |= std::uint64_t{1} << i++;
    }
    if (touched == 0) return mask;
    for (std::uint64_t found = zero_page_mask(pages.data(), touched, page_bytes()); found != 0; found &= found - 1)
      mask |= std::uint64_t{1} << bits[static_cast<std::size_t>(std::countr_zero(found))];
    return mask;
  }

  RamMap ram_;
  UntouchedPages untouched_;
  std::vector<StoreBlock> blocks_;
};

/// Copies only where zero pages lie in between. Threads: one; cancel() any.
class GuestPages::Fetcher final : public PageFetcher {
 public:
  /// Errors: ENOMEM. Cost: 512 KiB, of which what is copied is touched.
  [[nodiscard]] static Result<std::unique_ptr<PageFetcher>> create(const GuestPages& pages) noexcept {
    const std::size_t most = pages.ram_.batch_pages();
    MULTIFD_TRY_ASSIGN(auto runs, PageRuns::create(most));
    std::unique_ptr<Fetcher> fetcher(new (std::nothrow) Fetcher(pages, std::move(runs)));
    if (fetcher) fetcher->offsets_.reset(new (std::nothrow) std::uint64_t[most]);
    if (fetcher) fetcher->copy_.reset(new (std::nothrow) std::byte[batch_bytes]);
    if (!fetcher || !fetcher->offsets_ || !fetcher->copy_) return fail_errno(Stage::setup, "allocate fetcher", ENOMEM);
    return fetcher;
  }

  unsigned window() const noexcept override { return 1; }
  void cancel() noexcept override { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  Fetcher(const GuestPages& pages, PageRuns runs) noexcept : pages_(pages), runs_(std::move(runs)) {}

  [[nodiscard]] Result<void> do_ask(const PageRange& range) noexcept override {
    if (cancelled_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, Stage::read, "fetch");
    range_ = range;
    return {};
  }

  [[nodiscard]] Result<FetchedPages> do_take() noexcept override {
    if (cancelled_.load(std::memory_order_relaxed)) return fail(Errc::cancelled, Stage::read, "fetch");
    const std::span offsets(offsets_.get(), range_.bytes / pages_.page_bytes());
    const std::size_t normal = pages_.list(range_, offsets, runs_);
    FetchedPages fetched{.range = range_, .offsets = offsets.first(normal)};
    const ConstBuffers runs = runs_.view();
    if (runs.size() == 1) {
      fetched.bytes = {static_cast<const std::byte*>(runs[0].iov_base), runs[0].iov_len};
      return fetched;
    }
    std::size_t used = 0;
    for (const iovec& run : runs) {
      std::memcpy(copy_.get() + used, run.iov_base, run.iov_len);
      used += run.iov_len;
    }
    fetched.bytes = {copy_.get(), used};
    return fetched;
  }

  const GuestPages& pages_;
  PageRuns runs_;
  PageRange range_{};
  std::unique_ptr<std::uint64_t[]> offsets_;
  std::unique_ptr<std::byte[]> copy_;
  std::atomic<bool> cancelled_{false};
};

[[nodiscard]] inline Result<std::unique_ptr<PageFetcher>> GuestPages::do_open(FetchKind) noexcept {
  return Fetcher::create(*this);
}

}  // namespace multifd::postcopy
