// SPDX-License-Identifier: MIT
//
// The areas of this process's memory, from /proc/self/maps. Untouched pages can be found only in private anonymous
// memory, and in shared memory whose file is known.
#pragma once

#include <sys/sysmacros.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "multifd/result.hpp"

namespace multifd::detail {

/// One line of /proc/self/maps.
struct MemoryArea {
  std::uintptr_t begin, end;
  bool shared;
  std::uint64_t file_offset;  ///< of `begin`
  dev_t device;
  ino_t inode;  ///< 0: no file, anonymous memory

  bool anonymous() const noexcept { return !shared && inode == 0; }

  /// Cuts the area down to the pages that contain `from` to `to`, a range that overlaps the area.
  void clip(std::uintptr_t from, std::uintptr_t to) noexcept {
    const auto page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    from = std::max(begin, from / page_bytes * page_bytes);
    file_offset += from - begin;
    begin = from;
    end = std::min(end, (to + page_bytes - 1) / page_bytes * page_bytes);
  }
};

/// Calls on_area(MemoryArea), which returns a Result<void>, for each area, in order of addresses.
///
/// Errors: errno where /proc is missing; what on_area returns.
template <class OnArea>
[[nodiscard]] Result<void> for_each_memory_area(OnArea&& on_area) {
  std::FILE* const maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return fail_errno(Stage::setup, "open /proc/self/maps");
  char* line = nullptr;
  std::size_t capacity = 0;
  Result<void> done;
  while (done && ::getline(&line, &capacity, maps) >= 0) {
    MemoryArea area{};
    char rights[5] = {};
    unsigned major_number = 0, minor_number = 0;
    std::uint64_t inode = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %x:%x %" SCNu64, &area.begin, &area.end, rights,
                    &area.file_offset, &major_number, &minor_number, &inode) != 7)
      continue;
    area.shared = rights[3] == 's';
    area.device = makedev(major_number, minor_number);
    area.inode = static_cast<ino_t>(inode);
    done = on_area(area);
  }
  std::free(line);
  std::fclose(maps);
  return done;
}

}  // namespace multifd::detail
