// SPDX-License-Identifier: MIT
//
// The dirty bitmap that a VMM keeps itself: for what its own device code writes to guest memory. KVM's log has only what
// vCPUs write, so a VMM without this (or a vhost log, for devices elsewhere) loses what devices write while it migrates.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/config.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// Pages that somebody marks. A model of DirtySource; one bit a page.
///
///   memcpy(guest_memory + offset, data, bytes);  // first write
///   dirty_pages.mark(block, offset, bytes);      // then mark
///
/// Threads: mark() from any, at any time, wait-free; what is written before it is in memory for whoever reads the page
///   after the fetch that reports it. All else as DirtySource.
class DirtyPages {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  /// Errors: ENOMEM. Cost: one bit a page of all blocks, zeroed.
  [[nodiscard]] static Result<DirtyPages> create(const RamMap& ram) {
    return catch_bad_alloc(Stage::setup, "allocate dirty bitmap", [&]() -> Result<DirtyPages> {
      DirtyPages pages(ram);
      for (std::uint32_t id = 0; id < ram.blocks().size(); ++id)
        pages.words_.push_back(std::make_unique<Word[]>(bitmap_words(ram.pages(BlockId{id}))));
      return pages;
    });
  }

  /// Marks the pages of bytes that have been written. Not before they are written: a page that is fetched and read in
  /// between would be sent as it was.
  ///
  /// Params: `offset`, `bytes`: inside the block (contract), aligned or not.
  /// Cost: one atomic operation a word of 64 pages, whether the log is on or off. No test whether the bit is set already
  ///   saves it: the fetch that takes the older mark need not see the newer bytes.
  void mark(BlockId block, std::uint64_t offset, std::uint64_t bytes) noexcept {
    const std::uint64_t size = ram_.block(block).bytes;
    MULTIFD_ASSERT(offset <= size && bytes <= size - offset);
    if (bytes == 0) return;
    const std::uint64_t end = (offset + bytes - 1) / ram_.page_bytes() + 1;
    for (std::uint64_t page = offset / ram_.page_bytes(); page < end;) {
      const std::uint64_t run = std::min(64 - page % 64, end - page);
      words_[index(block)][page / 64].fetch_or(~std::uint64_t{0} >> (64 - run) << page % 64,
                                               std::memory_order_release);  // meets take()
      page += run;
    }
  }

  [[nodiscard]] Result<void> start() noexcept {
    for (std::uint32_t id = 0; id < words_.size(); ++id)
      for (std::size_t i = 0; i < bitmap_words(ram_.pages(BlockId{id})); ++i) take(words_[id][i]);
    on_ = true;
    return {};
  }

  /// Cost: one load a word of 64 pages, and one atomic operation a word that has marks.
  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    MULTIFD_TRY(check_fetch(ram_, block, bitmap));
    Word* const words = words_[index(block)].get();
    for (std::size_t i = 0; i < bitmap_words(ram_.pages(block)); ++i) bitmap[i] |= take(words[i]);
    return {};
  }

  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    return check_rearm(ram_, block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return false; }

  /// mark() may go on to be called, and marks nothing that is reported.
  [[nodiscard]] Result<void> stop() noexcept {
    on_ = false;
    return {};
  }
  std::size_t page_bytes() const noexcept { return ram_.page_bytes(); }

 private:
  using Word = std::atomic<std::uint64_t>;

  explicit DirtyPages(const RamMap& ram) : ram_(ram) {}

  static std::uint64_t take(Word& word) noexcept {
    if (word.load(std::memory_order_relaxed) == 0) return 0;
    return word.exchange(0, std::memory_order_acquire);  // meets mark()
  }

  RamMap ram_;
  std::vector<std::unique_ptr<Word[]>> words_;  // of each block
  bool on_ = false;
};
static_assert(check_dirty_source<DirtyPages>());

}  // namespace multifd::migrate
