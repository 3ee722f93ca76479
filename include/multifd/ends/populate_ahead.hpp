// SPDX-License-Identifier: MIT
//
// First touches of fresh destination memory cost more than the transfer: each is a page fault, and the kernel clears
// the page before it is overwritten. A helper thread takes those faults ahead of the data: where data arrives, the
// thread populates the next few megabytes, with huge pages where the system has them.
//
//   block:  | received | received | arriving | populated ... up to window_bytes | untouched ...
//
// The helper follows data only where at least every fourth page holds some. Memory whose pages stay zero is left alone,
// except for the first window_bytes of it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/options.hpp"
#include "multifd/thread.hpp"

namespace multifd {

/// Populates the memory of a RamMap ahead of the data.
///
/// Threads: note() by any, stop() by any, run() in a thread of its own.
/// Bounded: populates no more than window_bytes beyond the furthest data of a block, so at most that much in vain.
class PopulateAhead {
 public:
  static constexpr std::size_t region_bytes = std::size_t{2} << 20;  ///< a huge page
  static constexpr std::size_t window_bytes = std::size_t{32} << 20;

  /// Asks for huge pages in all blocks; a system without them is no error.
  ///
  /// Params: `map`: must outlive the object; its memory in this process, writable.
  /// Errors: ENOMEM.
  /// Cost: one madvise() a block, and a byte for each 2 MiB of memory or less.
  [[nodiscard]] static Result<std::unique_ptr<PopulateAhead>> create(const RamMap& map) {
    std::unique_ptr<PopulateAhead> ahead(new (std::nothrow) PopulateAhead(map));
    if (!ahead || !ahead->allocate()) return fail_errno(Stage::setup, "allocate populate-ahead", ENOMEM);
    for (const RamBlock& block : map.blocks()) (void)::madvise(block.host.data(), block.host.size(), MADV_HUGEPAGE);
    return ahead;
  }

  /// Says that a packet has `pages` normal pages, the last of them at `offset`. Wakes the helper where data is new.
  ///
  /// Cost: one atomic addition; a system call per region_bytes of data at most.
  void note(BlockId block, std::uint64_t offset, std::size_t pages) noexcept {
    const std::uint64_t region = offset / region_bytes;
    // Relaxed: the numbers only steer a guess.
    if (blocks_[index(block)].pages[region].fetch_add(static_cast<std::uint32_t>(pages), std::memory_order_relaxed) !=
        0)
      return;
    latest_.store(std::uint64_t{index(block)} << 32 | region, std::memory_order_relaxed);
    notes_.fetch_add(1, std::memory_order_release);  // meets the acquire in run()
    notes_.notify_one();
  }

  /// Ends run(), for good.
  void stop() noexcept {
    stopped_.store(true, std::memory_order_relaxed);
    notes_.fetch_add(1, std::memory_order_release);  // meets the acquire in run()
    notes_.notify_one();
  }

  /// The helper's body.
  void run() noexcept {
    for (std::uint32_t seen = 0;;) {
      notes_.wait(seen, std::memory_order_acquire);   // meets note() and stop()
      seen = notes_.load(std::memory_order_acquire);  // meets note() and stop()
      if (stopped_.load(std::memory_order_relaxed)) return;
      const std::uint64_t latest = latest_.load(std::memory_order_relaxed);
      if (!follow(static_cast<std::uint32_t>(latest >> 32), latest & 0xffff'ffff, seen)) return;
    }
  }

 private:
  struct Block {
    std::unique_ptr<std::atomic<std::uint32_t>[]> pages;  ///< normal pages that have arrived, per region
    std::unique_ptr<bool[]> populated;                    ///< used by the helper alone
    std::uint64_t regions = 0;
  };

  explicit PopulateAhead(const RamMap& map) noexcept : map_(map) {}

  bool allocate() {
    for (const RamBlock& block : map_.blocks()) {
      Block here;
      here.regions = (block.bytes + region_bytes - 1) / region_bytes;
      here.pages.reset(new (std::nothrow) std::atomic<std::uint32_t>[here.regions] {});
      here.populated.reset(new (std::nothrow) bool[here.regions]{});
      if (!here.pages || !here.populated) return false;
      blocks_.push_back(std::move(here));
    }
    return true;
  }

  /// Populates from `region` on, until there is newer data. False: this system cannot populate.
  bool follow(std::uint32_t block, std::uint64_t region, std::uint32_t seen) noexcept {
    Block& here = blocks_[block];
    if (!is_dense(here, region)) return true;
    const std::uint64_t end = std::min(here.regions, region + 1 + window_bytes / region_bytes);
    for (std::uint64_t next = region + 1; next < end; ++next) {
      if (here.populated[next] || here.pages[next].load(std::memory_order_relaxed) != 0) continue;
      if (!populate(block, next)) return false;
      here.populated[next] = true;
      if (notes_.load(std::memory_order_relaxed) != seen) return true;
    }
    return true;
  }

  /// Whether at least every fourth page of the last four regions held data.
  bool is_dense(const Block& here, std::uint64_t region) const noexcept {
    constexpr std::uint64_t regions = 4;
    const std::uint64_t first = region - std::min(region, regions - 1);
    std::uint64_t pages = 0;
    for (std::uint64_t i = first; i <= region; ++i) pages += here.pages[i].load(std::memory_order_relaxed);
    return 4 * pages >= (region - first + 1) * (region_bytes / map_.page_bytes());
  }

  bool populate(std::uint32_t block, std::uint64_t region) noexcept {
#if !defined(MADV_POPULATE_WRITE)
    constexpr int MADV_POPULATE_WRITE = 23;  // Linux 5.14, newer than some C libraries
#endif
    const std::span<std::byte> host = map_.block(BlockId{block}).host;
    const std::size_t at = region * region_bytes;
    // Only whole pages inside the block; 64 KiB is the largest page of any system.
    constexpr std::uintptr_t system_page = 64 * 1024;
    const auto from = reinterpret_cast<std::uintptr_t>(host.data() + at) + system_page - 1;
    const auto to = reinterpret_cast<std::uintptr_t>(host.data() + std::min(at + region_bytes, host.size()));
    const std::uintptr_t begin = from - from % system_page;
    const std::uintptr_t end = to - to % system_page;
    if (begin >= end) return true;
    return ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE) == 0;
  }

  const RamMap& map_;
  std::vector<Block> blocks_;
  std::atomic<std::uint64_t> latest_{0};  ///< block and region of the newest data
  std::atomic<std::uint32_t> notes_{0};   ///< what the helper sleeps on
  std::atomic<bool> stopped_{false};
};

}  // namespace multifd
