// SPDX-License-Identifier: MIT
//
// The memory that the zero check benchmarks read: fresh, in pages of 4 KiB, at a size that the environment sets.
//
//   MULTIFD_BENCH_MIB=64   size of cold memory in MiB; 2048 without it
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>
#include <span>

namespace kernels {

inline constexpr std::size_t page_bytes = 4096;

/// Size of memory that no cache holds.
inline std::size_t cold_bytes() {
  const char* const mib = std::getenv("MULTIFD_BENCH_MIB");
  const std::size_t size = mib != nullptr ? std::strtoull(mib, nullptr, 10) : 0;
  return (size != 0 ? size : 2048) << 20;
}

/// Anonymous memory, given back at the end. No huge pages: they would make the baseline look better than it is in the
/// memory of most guests.
class Arena {
 public:
  explicit Arena(std::size_t bytes) : bytes_(bytes) {
    data_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    ::madvise(data_, bytes, MADV_NOHUGEPAGE);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { ::munmap(data_, bytes_); }

  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(data_), bytes_}; }
  std::size_t pages() const { return bytes_ / page_bytes; }

  /// Makes every page resident; new ones are zero.
  void populate() const { ::madvise(data_, bytes_, MADV_POPULATE_WRITE); }
  /// Makes all memory as if it had never been touched.
  void forget() const { ::madvise(data_, bytes_, MADV_DONTNEED); }

 private:
  void* data_;
  std::size_t bytes_;
};

}  // namespace kernels
