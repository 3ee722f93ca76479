// SPDX-License-Identifier: MIT
//
// Files for the tests of images: in memory, with holes as a file system has them.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "multifd/image/file.hpp"

namespace test {

inline multifd::image::File image_file(std::span<const std::byte> bytes = {}) {
  auto file = multifd::image::File::adopt(::memfd_create("image", MFD_CLOEXEC));
  REQUIRE(file.has_value());
  REQUIRE(file->write(0, bytes).has_value());
  REQUIRE(file->resize(bytes.size()).has_value());
  return std::move(*file);
}

inline std::vector<std::byte> bytes_of(const multifd::image::File& file) {
  std::vector<std::byte> all(file.bytes());
  REQUIRE(file.read(0, all).has_value());
  return all;
}

/// Bytes of the disk that a file takes.
inline std::uint64_t disk_bytes(const multifd::image::File& file) {
  struct stat status{};
  REQUIRE(::fstat(file.native_handle(), &status) == 0);
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

}  // namespace test
