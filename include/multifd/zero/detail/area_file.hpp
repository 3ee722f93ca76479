// SPDX-License-Identifier: MIT
//
// The file behind an area of shared memory, opened once more: a descriptor of its own has a position of its own, which
// lseek(SEEK_DATA) moves.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "multifd/zero/detail/memory_areas.hpp"

namespace multifd::detail {

/// Threads: one. Nothing is opened but regular files.
class AreaFile {
 public:
  AreaFile() = default;
  AreaFile(AreaFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  AreaFile& operator=(AreaFile&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~AreaFile() {
    if (fd_ >= 0) ::close(fd_);
  }

  /// Finds the file of a whole area, as for_each_memory_area() has it: by the kernel's link (CAP_CHECKPOINT_RESTORE), else
  /// among the files that this process has open. Not found: an empty object.
  [[nodiscard]] static AreaFile of(const MemoryArea& area) noexcept {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/map_files/%" PRIxPTR "-%" PRIxPTR, area.begin, area.end);
    // A file system may show another device number there, so the inode has to do: the link itself is exact.
    if (AreaFile file = open(path, nullptr)) return file;
    ::DIR* const all = ::opendir("/proc/self/fd");
    if (all == nullptr) return {};
    AreaFile found;
    while (!found) {
      const ::dirent* const each = ::readdir(all);
      if (each == nullptr) break;
      const long number =
          std::strtol(each->d_name, nullptr, 10);  // 0 for the names of the two folders: looked at once more
      std::snprintf(path, sizeof path, "/proc/self/fd/%ld", number);
      found = open(path, &area);
    }
    ::closedir(all);
    return found;
  }

  explicit operator bool() const noexcept { return fd_ >= 0; }
  int get() const noexcept { return fd_; }

 private:
  /// Params `area`: whose file it has to be; null: it is.
  static AreaFile open(const char* path, const MemoryArea* area) noexcept {
    const auto fits = [area](const struct ::stat& status) {
      return S_ISREG(status.st_mode) &&
             (area == nullptr || (status.st_dev == area->device && status.st_ino == area->inode));
    };
    struct ::stat status{};
    AreaFile file;
    if (::stat(path, &status) != 0 || !fits(status)) return file;
    file.fd_ = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    // Another thread may have closed that number meanwhile, and opened something else by it.
    if (file && ::fstat(file.get(), &status) == 0 && fits(status)) return file;
    return {};
  }

  int fd_ = -1;
};

}  // namespace multifd::detail
