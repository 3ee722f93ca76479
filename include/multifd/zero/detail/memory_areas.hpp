// SPDX-License-Identifier: MIT
//
// The areas of this process's memory, from /proc/self/maps. Untouched pages can be found only in private anonymous
// memory, and in shared memory by its file.
#pragma once

#include <sys/sysmacros.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "multifd/result.hpp"

namespace multifd::detail {

/// One line of /proc/self/maps.
struct MemoryArea {
  std::uintptr_t begin, end;
  bool shared;
  std::uint64_t file_offset;  ///< of `begin`
  dev_t device;
  ino_t inode;          ///< 0: no file, anonymous memory
  bool huge_anonymous;  ///< MAP_ANONYMOUS with MAP_HUGETLB, which has a file of the kernel's

  /// Whether what no page table maps is zero. Of other private memory it is what the file has.
  bool anonymous() const noexcept { return !shared && (inode == 0 || huge_anonymous); }

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
    int name = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &area.begin, &area.end,
                    rights, &area.file_offset, &major_number, &minor_number, &inode, &name) != 7)
      continue;
    // The kernel's own file systems have no device: a file of that name on a disk is another one.
    area.huge_anonymous = major_number == 0 && std::string_view(line + name) == "/anon_hugepage (deleted)\n";
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
