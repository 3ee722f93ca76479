// SPDX-License-Identifier: MIT
//
// What a vCPU's page tables say where an address lies: x86 in long mode, 4 or 5 levels, pages of 4 KiB, 2 MiB and 1 GiB.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "multifd/format/byte_order.hpp"
#include "multifd/image/detail/copy_ranges.hpp"
#include "multifd/image/vcpu_registers.hpp"

namespace multifd::image::detail {

/// Reads bytes of a range; pages that the image does not hold are zeros.
[[nodiscard]] inline Result<void> read_range(const MappedRamReader& image, const PhysicalRange& range, std::uint64_t at,
                                             std::span<std::byte> to) {
  std::ranges::fill(to, std::byte{0});
  const std::uint64_t page = image.page_bytes();
  const std::uint64_t begin = range.offset + at;
  const std::uint64_t end = begin + to.size();
  const std::uint64_t first = begin / page;
  return image.for_each_run(range.block, first, (end + page - 1) / page - first,
                            [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
                              const std::uint64_t from = std::max(offset, begin);
                              const std::uint64_t until = std::min(offset + bytes, end);
                              return image.file().read(image.blocks()[range.block].pages_offset + from,
                                                       to.subspan(static_cast<std::size_t>(from - begin),
                                                                  static_cast<std::size_t>(until - from)));
                            });
}

/// The entry of a page table at a guest-physical address; 0, which maps nothing, where there is no memory.
[[nodiscard]] inline Result<std::uint64_t> page_table_entry(const MappedRamReader& image,
                                                            std::span<const PhysicalRange> ranges, std::uint64_t at) {
  std::array<std::byte, 8> entry{};
  for (const PhysicalRange& range : ranges) {
    if (at < range.address || range.bytes < entry.size() || at - range.address > range.bytes - entry.size()) continue;
    MULTIFD_TRY(read_range(image, range, at - range.address, entry));
    break;
  }
  return wire::load_le<std::uint64_t>(entry.data());
}

/// The guest-physical address of `address`, or none: it is not mapped, or the vCPU is in no long mode.
///
/// Params: `cr3`: the vCPU's, or another one that it would have.
[[nodiscard]] inline Result<std::optional<std::uint64_t>> walk_pages(const MappedRamReader& image,
                                                                     std::span<const PhysicalRange> ranges,
                                                                     const VcpuRegisters& vcpu, std::uint64_t cr3,
                                                                     std::uint64_t address) {
  constexpr std::uint64_t pg = 1ull << 31, pae = 1 << 5, la57 = 1 << 12, present = 1, large = 1 << 7;
  constexpr std::uint64_t frame = 0x000ffffffffff000;
  using Found = std::optional<std::uint64_t>;
  if ((vcpu.cr[0] & pg) == 0 || (vcpu.cr[4] & pae) == 0) return Found{};
  std::uint64_t entry = cr3;
  for (unsigned level = (vcpu.cr[4] & la57) != 0 ? 5 : 4; level > 0; --level) {
    const unsigned shift = 12 + 9 * (level - 1);
    const auto next = page_table_entry(image, ranges, (entry & frame) + (address >> shift & 511) * 8);
    if (!next) return std::unexpected(next.error());
    entry = *next;
    if ((entry & present) == 0) return Found{};
    const std::uint64_t inside = (std::uint64_t{1} << shift) - 1;
    if (level == 1 || (level <= 3 && (entry & large) != 0))
      return Found{(entry & frame & ~inside) + (address & inside)};
  }
  return Found{};
}

}  // namespace multifd::image::detail
