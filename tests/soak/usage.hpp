// SPDX-License-Identifier: MIT
//
// What this process holds: what must be flat however many migrations there were.
#pragma once

#include <malloc.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>

#include "support/allocation_count.hpp"

namespace soak {

struct Usage {
  std::uint64_t descriptors = 0;
  std::uint64_t threads = 0;
  std::uint64_t resident_bytes = 0;
  std::uint64_t heap_bytes = 0;  ///< allocated and not freed; 0 under a sanitizer
};

inline std::uint64_t entries_of(const char* folder) {
  const std::filesystem::directory_iterator all(folder);
  return static_cast<std::uint64_t>(std::distance(begin(all), end(all)));
}

inline Usage usage_now() {
  // What is free but not given back is no growth.
  ::malloc_trim(0);
  std::uint64_t size = 0;
  std::uint64_t resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return {.descriptors = entries_of("/proc/self/fd") - 1,  // the folder's own
          .threads = entries_of("/proc/self/task"),
          .resident_bytes = resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)),
          // Not mallinfo2(), which counts what the allocator itself keeps as used.
          .heap_bytes = static_cast<std::uint64_t>(test::live_bytes())};
}

}  // namespace soak
