// SPDX-License-Identifier: MIT
//
// What the programs that measure once, and are run by a script, share: results that end the program, mapped memory, files.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>

#include <multifd/image/file.hpp>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

/// The value, or an exception with `what` in front.
template <class T>
T need(multifd::Result<T> result, const std::string& what) {
  if (!result) throw std::runtime_error(what + ": " + describe(result.error()));
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

struct Unmap {
  std::size_t bytes;
  void operator()(std::byte* memory) const noexcept { ::munmap(memory, bytes); }
};
using Memory = std::unique_ptr<std::byte[], Unmap>;

inline Memory map(std::size_t bytes, int protection, int flags, int fd = -1) {
  void* const memory = ::mmap(nullptr, bytes, protection, flags, fd, 0);
  if (memory == MAP_FAILED) throw std::runtime_error(std::string("mmap: ") + std::strerror(errno));
  return Memory(static_cast<std::byte*>(memory), Unmap{bytes});
}

inline multifd::image::File open_file(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  if (fd < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
  return need(multifd::image::File::adopt(fd), path);
}
