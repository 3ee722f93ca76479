// SPDX-License-Identifier: MIT
//
// What a hole of a mapped file is worth, by file system. Only where lseek(SEEK_DATA) sees the pages that a mapping has
// dirtied is a hole zero memory. FUSE and virtiofs ask their server, which has not heard of those pages; network and
// stacked file systems differ by version. Whoever is not listed has no holes.
#pragma once

#include <sys/vfs.h>

#include <cstdint>

namespace multifd::detail {

enum class FileHoles : std::uint8_t {
  unknown,         ///< everything is data
  zero,            ///< SEEK_DATA finds what a mapping has dirtied, from the first write on
  zero_and_named,  ///< and /proc/self/maps shows the device number that fstat() does
};

/// Params: `system`: what fstatfs() says of the file.
inline FileHoles file_holes(const struct ::statfs& system) noexcept {
  switch (static_cast<std::uint32_t>(system.f_type)) {
    case 0x01021994: return FileHoles::zero_and_named;  // tmpfs, memfd
    case 0xef53:                                        // ext2, ext3, ext4
    case 0x58465342:                                    // XFS
    case 0x9123683e: return FileHoles::zero;            // btrfs
    default: return FileHoles::unknown;
  }
}

}  // namespace multifd::detail
