// SPDX-License-Identifier: MIT
//
// What a piece of code leaves behind in this process: threads, descriptors, memory.
#pragma once

#include <dirent.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>

#include "support/allocation_count.hpp"
#include "support/basics.hpp"

namespace test {

inline std::size_t entries_of(const char* folder) {
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(folder), &::closedir);
  REQUIRE(open != nullptr);
  std::size_t count = 0;
  while (const dirent* entry = ::readdir(open.get())) count += entry->d_name[0] != '.';
  return count;
}

/// Threads that run; one that was joined may be seen for a moment more.
inline std::size_t threads_now() { return entries_of("/proc/self/task"); }
inline std::size_t descriptors_now() { return entries_of("/proc/self/fd"); }

/// The same; a sanitizer starts a thread of its own with the process's first one, and keeps it.
inline std::size_t settled_threads() {
  static const bool started = (std::thread([] {}).join(), true);
  static_cast<void>(started);
  return threads_now();
}

/// Remembers what there is, to be compared with what there is later.
class Leftovers {
 public:
  /// Whether all threads that came have gone.
  bool no_thread() const {
    return eventually([this] { return threads_now() <= threads_; });
  }
  bool no_descriptor() const { return descriptors_now() == descriptors_; }
  /// Bytes on the heap that were not there. Not exact: the system keeps some of a thread that has ended for the next one.
  std::int64_t bytes() const { return live_bytes() - bytes_; }

 private:
  std::size_t threads_ = settled_threads();
  std::size_t descriptors_ = descriptors_now();
  std::int64_t bytes_ = live_bytes();
};

}  // namespace test
