// SPDX-License-Identifier: MIT
//
// Which pages a destination does not have as the stopped guest has them, and how they are dropped, so that the kernel tells
// when somebody touches them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/format/missing_pages.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/postcopy/lazy_region.hpp"
#include "multifd/postcopy/userfaultfd.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate::detail {

/// Whether faults in this memory can be served: tries it, and leaves nothing behind.
/// Errors: those of Userfaultfd and regions_of().
[[nodiscard]] inline Result<void> check_faults(const RamMap& ram, std::uint64_t unit_bytes) {
  MULTIFD_TRY_ASSIGN(const auto regions, postcopy::regions_of(ram, unit_bytes));
  MULTIFD_TRY_ASSIGN(const auto faults, postcopy::Userfaultfd::create());
  for (const postcopy::LazyRegion& region : regions) {
    MULTIFD_TRY(faults.register_range(region.address, region.bytes, region.mode));
    MULTIFD_TRY(faults.unregister(region.address, region.bytes));
  }
  return {};
}

/// Threads: one.
class MissingMemory {
 public:
  using Bitmaps = std::vector<std::vector<std::uint64_t>>;

  /// Params `ram`: outlives this object. `unit_bytes`: what is dropped and placed at once.
  /// Errors: those of regions_of(); ENOMEM. Cost: a bit a page.
  [[nodiscard]] static Result<MissingMemory> create(const RamMap& ram, std::uint64_t unit_bytes) {
    return catch_bad_alloc(Stage::setup, "missing pages", [&]() -> Result<MissingMemory> {
      MULTIFD_TRY_ASSIGN(auto regions, postcopy::regions_of(ram, unit_bytes));
      return MissingMemory(ram, std::move(regions));
    });
  }

  /// Takes a MISSING_PAGES. Params `block`: the one that it names. Errors: those of wire::add_missing_pages().
  [[nodiscard]] Result<void> add(const wire::PageBitmap& pages, BlockId block) noexcept {
    const RamBlock& of = ram_->block(block);
    return wire::add_missing_pages(pages, bitmaps_[index(block)], of.bytes, ram_->page_bytes(), of.idstr);
  }
  std::uint64_t count() const noexcept {
    std::uint64_t sum = 0;
    for (const auto& bitmap : bitmaps_) sum += count_dirty(bitmap);
    return sum;
  }
  const Bitmaps& bitmaps() const noexcept { return bitmaps_; }
  std::span<const postcopy::LazyRegion> regions() const noexcept { return regions_; }

  /// Empties each unit that has a missing page. Errors: errno of madvise(): EINVAL of locked memory.
  [[nodiscard]] Result<void> drop() const noexcept {
    std::size_t private_block = bitmaps_.size();
    return for_each_run([&](std::size_t block, std::byte* memory, std::size_t bytes) -> Result<void> {
      // Shared memory keeps its pages when a mapping lets go of them. Other memory knows no MADV_REMOVE.
      if (block != private_block) {
        if (::madvise(memory, bytes, MADV_REMOVE) == 0) return {};
        if (errno == EINVAL || errno == EACCES) private_block = block;
      }
      if (block == private_block && ::madvise(memory, bytes, MADV_DONTNEED) == 0) return {};
      return fail_errno(Stage::setup, "drop a page of the guest's memory that is to come (is it locked?)");
    });
  }

  /// Whether all of these units are empty. They may not be: the kernel makes huge pages of what is partly empty, as long as
  /// nobody has registered the memory for faults. Errors: errno of mincore(); ENOMEM.
  [[nodiscard]] Result<bool> is_empty() const {
    const auto host_page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> resident;
    bool empty = true;
    MULTIFD_TRY(for_each_run([&](std::size_t, std::byte* memory, std::size_t bytes) -> Result<void> {
      for (std::size_t at = 0; at < bytes && empty;) {
        const std::size_t part = std::min(bytes - at, host_page * 65536);
        resident.resize(part / host_page);
        if (::mincore(memory + at, part, resident.data()) != 0) return fail_errno(Stage::setup, "mincore");
        empty = std::ranges::none_of(resident, [](unsigned char page) { return (page & 1) != 0; });
        at += part;
      }
      return {};
    }));
    return empty;
  }

 private:
  MissingMemory(const RamMap& ram, std::vector<postcopy::LazyRegion> regions)
      : ram_(&ram), regions_(std::move(regions)) {
    for (const RamBlock& block : ram.blocks()) bitmaps_.emplace_back(bitmap_words(block.bytes / ram.page_bytes()));
  }

  /// Calls `on_run(block, memory, bytes)` for each run of units that have a missing page, up to the first error.
  template <class OnRun>
  [[nodiscard]] Result<void> for_each_run(OnRun on_run) const {
    for (std::size_t b = 0; b < bitmaps_.size(); ++b) {
      const postcopy::LazyRegion& region = regions_[b];
      const std::uint64_t pages_per_unit = region.unit_bytes / ram_->page_bytes();
      const std::uint64_t units = region.bytes / region.unit_bytes;
      std::byte* const memory = ram_->block(region.block).host.data();
      const auto missing = [&](std::uint64_t unit) {
        for (std::uint64_t page = unit * pages_per_unit; page < (unit + 1) * pages_per_unit; ++page)
          if ((bitmaps_[b][page / 64] >> page % 64 & 1) != 0) return true;
        return false;
      };
      for (std::uint64_t unit = 0; unit < units;) {
        if (pages_per_unit == 1 && unit % 64 == 0 && bitmaps_[b][unit / 64] == 0) {
          unit += 64;
          continue;
        }
        const std::uint64_t begin = unit;
        while (unit < units && missing(unit)) ++unit;
        if (unit > begin) {
          MULTIFD_TRY(on_run(b, memory + begin * region.unit_bytes, (unit - begin) * region.unit_bytes));
        } else {
          ++unit;
        }
      }
    }
    return {};
  }

  const RamMap* ram_;
  std::vector<postcopy::LazyRegion> regions_;  ///< one a block, in their order
  Bitmaps bitmaps_;
};

}  // namespace multifd::migrate::detail
