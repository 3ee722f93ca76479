// SPDX-License-Identifier: MIT
//
// The file behind an area of shared memory. A descriptor that the process has is used as it is: to open that file once more,
// and to close it again, would take away the process' record locks (fcntl) on it.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <utility>

#include "multifd/zero/detail/memory_areas.hpp"

namespace multifd::detail {

/// Threads: one. Only regular files.
class AreaFile {
 public:
  AreaFile() = default;
  AreaFile(AreaFile&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), owned_(other.owned_), device_(other.device_), inode_(other.inode_) {}
  AreaFile& operator=(AreaFile&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(owned_, other.owned_);
    std::swap(device_, other.device_);
    std::swap(inode_, other.inode_);
    return *this;
  }
  ~AreaFile() {
    if (owned_ && fd_ >= 0) ::close(fd_);
  }

  /// Finds the file of a whole area, as for_each_memory_area() has it: among the files that this process has open, else by the
  /// kernel's link (CAP_CHECKPOINT_RESTORE). Not found: an empty object.
  /// Cost: a system call for each open descriptor, which asks no server of a network file system.
  [[nodiscard]] static AreaFile of(const MemoryArea& area) noexcept {
    AreaFile found;
    if (::DIR* const all = ::opendir("/proc/self/fd")) {
      while (const ::dirent* const each = ::readdir(all)) {
        char* end = nullptr;
        const auto number = static_cast<int>(std::strtol(each->d_name, &end, 10));
        if (end == each->d_name) continue;  // "." and ".."
        found.fd_ = number, found.device_ = area.device, found.inode_ = area.inode;
        if (found.is_the_same()) break;
        found.fd_ = -1;
      }
      ::closedir(all);
    }
    return found ? std::move(found) : by_link(area);
  }

  explicit operator bool() const noexcept { return fd_ >= 0; }
  int get() const noexcept { return fd_; }

  /// Whether the descriptor is the file's still: another thread may have closed it, and opened something else by its number.
  bool is_the_same() const noexcept {
    struct ::statx status{};
    constexpr int how = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
    return owned_ || (::statx(fd_, "", how, STATX_TYPE | STATX_INO, &status) == 0 && S_ISREG(status.stx_mode) &&
                      makedev(status.stx_dev_major, status.stx_dev_minor) == device_ && status.stx_ino == inode_);
  }

 private:
  static AreaFile by_link(const MemoryArea& area) noexcept {
    char path[64];
    std::snprintf(path, sizeof path, "/proc/self/map_files/%" PRIxPTR "-%" PRIxPTR, area.begin, area.end);
    struct ::stat status{};
    AreaFile file;
    if (::stat(path, &status) != 0 || !S_ISREG(status.st_mode)) return file;  // who opens a device may start something
    file.fd_ = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    file.owned_ = true;
    return file;
  }

  int fd_ = -1;
  bool owned_ = false;
  // What a descriptor that is not owned has to be.
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

/// The files of several areas in turn: that of the last area is kept, because one file often has many. Threads: one.
class AreaFiles {
 public:
  const AreaFile& of(const MemoryArea& area) noexcept {
    if (!last_ || device_ != area.device || inode_ != area.inode) {
      last_.emplace(AreaFile::of(area));
      device_ = area.device;
      inode_ = area.inode;
    }
    return *last_;
  }

 private:
  std::optional<AreaFile> last_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace multifd::detail
