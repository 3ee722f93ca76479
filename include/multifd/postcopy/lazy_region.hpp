// SPDX-License-Identifier: MIT
//
// Which addresses of a guest's memory hold which bytes of a page store, and how faults there are served.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy {

/// How a page gets to where a fault waits for it.
enum class FaultMode : std::uint8_t {
  missing,  ///< the kernel copies it in, at once and whole: anonymous memory, shared memory, hugetlbfs
  minor,  ///< shared memory that this process has mapped, too: written there, then shown to the guest (UFFDIO_CONTINUE)
};

/// Adjacent addresses that hold adjacent bytes of one RAM block.
///
/// Where pages are missing, the memory is empty: the caller has discarded what was there (MADV_DONTNEED; in a file's or
/// shared memory fallocate(FALLOC_FL_PUNCH_HOLE)). What the kernel has there is what the guest sees.
struct LazyRegion {
  std::uint64_t address = 0;        ///< in the process whose userfaultfd it is; never read here
  std::uint64_t bytes = 0;          ///< a whole number of units
  BlockId block{};                  ///< of the page store
  std::uint64_t offset = 0;         ///< in that block
  std::uint64_t unit_bytes = 4096;  ///< what is placed at once: the host's page, or hugetlbfs' (2 MiB)
  FaultMode mode = FaultMode::missing;
  /// With FaultMode::minor: the same shared memory as this process has it mapped, all of the region.
  std::byte* mapping = nullptr;

  std::uint64_t end() const noexcept { return address + bytes; }
};

/// No unit is larger: it is assembled in memory of this process. hugetlbfs of 1 GiB is none for faults.
inline constexpr std::uint64_t max_unit_bytes = std::uint64_t{32} << 20;

/// The memory of this process that a map names, as regions with FaultMode::missing.
///
/// Params: `unit_bytes`: as LazyRegion::unit_bytes; a larger page of the map's counts.
/// Errors: Errc::block_without_memory, bad_region (a block that is not made of whole units); ENOMEM.
[[nodiscard]] inline Result<std::vector<LazyRegion>> regions_of(const RamMap& ram, std::uint64_t unit_bytes = 4096) {
  const std::uint64_t unit = std::max<std::uint64_t>(unit_bytes, ram.page_bytes());
  return catch_bad_alloc(Stage::setup, "regions_of", [&]() -> Result<std::vector<LazyRegion>> {
    std::vector<LazyRegion> regions;
    regions.reserve(ram.blocks().size());
    for (const RamBlock& block : ram.blocks()) {
      constexpr auto stage = Stage::setup;
      if (block.access == Access::none) return fail(Errc::block_without_memory, stage, "regions_of", 0, 0, block.idstr);
      const std::uint64_t address = reinterpret_cast<std::uintptr_t>(block.host.data());
      if (unit == 0 || address % unit != 0 || block.bytes % unit != 0)
        return fail(Errc::bad_region, stage, "regions_of: not whole units", unit == 0 ? 0 : address, unit, block.idstr);
      regions.push_back({.address = address,
                         .bytes = block.bytes,
                         .block = BlockId{static_cast<std::uint32_t>(regions.size())},
                         .unit_bytes = unit});
    }
    return regions;
  });
}

/// Checks regions against each other and against the store's blocks: units are powers of two, of whole pages of the host
/// and the store; address, bytes, offset and mapping are multiples of the unit; nothing reaches past a block or the address
/// space; no two regions share addresses or bytes of a block.
///
/// Errors: Errc::bad_region (op: what is wrong; detail: the address or offset; expected: what it is compared with; subject:
///   the block), unknown_block (detail: its id); ENOMEM.
[[nodiscard]] inline Result<void> check_regions(std::span<const LazyRegion> regions, const PageStore& store) {
  constexpr auto stage = Stage::setup;
  if (regions.empty()) return fail(Errc::bad_region, stage, "regions: there is none");
  const auto host_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t least = std::max<std::uint64_t>(host_page, store.page_bytes());
  for (const LazyRegion& region : regions) {
    if (index(region.block) >= store.blocks().size())
      return fail(Errc::unknown_block, stage, "region", index(region.block), store.blocks().size());
    const StoreBlock& block = store.blocks()[index(region.block)];
    const auto refuse = [&](const char* what, std::uint64_t at, std::uint64_t of) {
      return fail(Errc::bad_region, stage, what, at, of, block.idstr);
    };
    const std::uint64_t unit = region.unit_bytes;
    if (!std::has_single_bit(unit) || unit < least || unit > max_unit_bytes)
      return refuse("region: unit is no power of two, smaller than a page, or too large", unit, least);
    if (region.address % unit != 0 || region.address == 0)
      return refuse("region: address is not aligned", region.address, unit);
    if (region.bytes == 0 || region.bytes % unit != 0)
      return refuse("region: size is no whole number of units", region.bytes, unit);
    if (region.offset % unit != 0) return refuse("region: offset is not aligned", region.offset, unit);
    if (region.bytes > UINT64_MAX - region.address)
      return refuse("region: reaches past the address space", region.address, region.bytes);
    if (region.offset > block.bytes || region.bytes > block.bytes - region.offset)
      return refuse("region: reaches past its block", region.offset, block.bytes);
    if (region.mode == FaultMode::minor && region.mapping == nullptr)
      return refuse("region: minor faults take a mapping of this process", region.address, 0);
    if (reinterpret_cast<std::uintptr_t>(region.mapping) % host_page != 0)
      return refuse("region: mapping is not aligned", reinterpret_cast<std::uintptr_t>(region.mapping), host_page);
  }
  return catch_bad_alloc(stage, "regions", [&]() -> Result<void> {
    std::vector<LazyRegion> sorted(regions.begin(), regions.end());
    std::ranges::sort(sorted, {}, &LazyRegion::address);
    for (std::size_t i = 1; i < sorted.size(); ++i)
      if (sorted[i].address < sorted[i - 1].end())
        return fail(Errc::bad_region, stage, "regions share addresses", sorted[i].address, sorted[i - 1].end(),
                    store.blocks()[index(sorted[i].block)].idstr);
    std::ranges::sort(sorted, [](const LazyRegion& a, const LazyRegion& b) {
      return a.block != b.block ? a.block < b.block : a.offset < b.offset;
    });
    for (std::size_t i = 1; i < sorted.size(); ++i)
      if (sorted[i].block == sorted[i - 1].block && sorted[i].offset < sorted[i - 1].offset + sorted[i - 1].bytes)
        return fail(Errc::bad_region, stage, "regions share bytes of a block", sorted[i].offset,
                    sorted[i - 1].offset + sorted[i - 1].bytes, store.blocks()[index(sorted[i].block)].idstr);
    return {};
  });
}

}  // namespace multifd::postcopy
