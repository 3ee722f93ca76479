// SPDX-License-Identifier: MIT
//
// Whether a hole of a mapped file is zero memory, by file system. It is only where lseek(SEEK_DATA) finds the pages
// that a mapping has dirtied. FUSE and virtiofs ask their server, which does not know those pages; network and stacked
// file systems differ by version. Files on other file systems count as data throughout.
#pragma once

#include <sys/vfs.h>

#include <cstdint>

namespace multifd {

/// What holes of a file system mean, as lseek(SEEK_DATA) finds them.
enum class FileHoles : std::uint8_t {
  unknown,         ///< everything is data
  zero,            ///< SEEK_DATA finds a page from the first write through a mapping on
  zero_and_named,  ///< also, /proc/self/maps shows the device number of fstat()
};

/// Tells it by the file system's type. Params: `system`: fstatfs() of the file.
inline FileHoles file_holes(const struct ::statfs& system) noexcept {
  switch (static_cast<std::uint32_t>(system.f_type)) {
    case 0x01021994: return FileHoles::zero_and_named;  // tmpfs, memfd
    case 0xef53:                                        // ext2, ext3, ext4
    case 0x58465342:                                    // XFS
    case 0x9123683e: return FileHoles::zero;            // btrfs
    default: return FileHoles::unknown;
  }
}

}  // namespace multifd
