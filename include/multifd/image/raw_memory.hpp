// SPDX-License-Identifier: MIT
//
// Guest memory by guest-physical address, as plain bytes: raw (an address is an offset) and LiME (each range behind a
// header of 32 bytes, little-endian). The third format is in elf_core.hpp. What the image does not hold is a hole.
//
//   LiME's header:   0 be 4: magic "EMiL"   4 be 4: version 1   8 be 8: first address   16 be 8: last address   24 be 8: 0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "multifd/format/byte_order.hpp"
#include "multifd/image/detail/copy_ranges.hpp"

namespace multifd::image {

/// Writes memory so that an address is an offset: what `crash VMLINUX FILE@0` and volatility3 read. The file ends with the
/// last range, so it is 2 TiB long where RAM goes on at 1 TiB, and holds only the pages.
///
/// Params: `out`: empty, or all holes: nothing in it is erased. `layout`: of this image.
/// Errors: Errc::bad_range, block_without_memory (RAM that is shared memory, and not in the image), bad_channel_count,
///   cancelled; the two files'; ENOMEM. What has been written then is no whole file.
/// Threads: the caller's waits for options.threads others.
/// Cost: each page is read and written once; 1 MiB a thread.
[[nodiscard]] inline Result<WrittenMemory> write_raw_memory(const MappedRamReader& image, const PhysicalLayout& layout,
                                                            File& out, const WorkOptions& options = {}) {
  return catch_bad_alloc(Stage::setup, "raw memory", [&]() -> Result<WrittenMemory> {
    MULTIFD_TRY(detail::check_ranges(image, layout.ranges));
    std::vector<std::uint64_t> places;
    for (const PhysicalRange& range : layout.ranges) places.push_back(range.address);
    MULTIFD_TRY(out.resize(layout.end()));
    return detail::copy_ranges(image, layout.ranges, places, out, options);
  });
}

/// Writes a LiME file: the ranges one behind the other, without the hole below 4 GiB.
///
/// Params, Errors, Threads, Cost: as write_raw_memory().
[[nodiscard]] inline Result<WrittenMemory> write_lime(const MappedRamReader& image, const PhysicalLayout& layout,
                                                      File& out, const WorkOptions& options = {}) {
  return catch_bad_alloc(Stage::setup, "LiME", [&]() -> Result<WrittenMemory> {
    MULTIFD_TRY(detail::check_ranges(image, layout.ranges));
    std::vector<std::uint64_t> places;
    std::uint64_t at = 0;
    for (const PhysicalRange& range : layout.ranges) {
      places.push_back(at + 32);
      at += 32 + range.bytes;
    }
    MULTIFD_TRY(out.resize(at));
    for (std::size_t i = 0; i < places.size(); ++i) {
      std::byte header[32] = {};
      wire::store_le<std::uint32_t>(&header[0], 0x4C694D45);
      wire::store_le<std::uint32_t>(&header[4], 1);
      wire::store_le<std::uint64_t>(&header[8], layout.ranges[i].address);
      wire::store_le<std::uint64_t>(&header[16], layout.ranges[i].end() - 1);
      MULTIFD_TRY(out.write(places[i] - sizeof header, header));
    }
    return detail::copy_ranges(image, layout.ranges, places, out, options);
  });
}

}  // namespace multifd::image
