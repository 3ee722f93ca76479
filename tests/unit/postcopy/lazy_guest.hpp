// SPDX-License-Identifier: MIT
//
// Memory of this process that is to come from a FakeStore, and threads that read it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/postcopy/lazy_memory.hpp"
#include "support/skip.hpp"
#include "unit/postcopy/fake_store.hpp"

namespace test {

using multifd::postcopy::FaultMode;
using multifd::postcopy::LazyMemory;
using multifd::postcopy::LazyMemoryOptions;
using multifd::postcopy::LazyRegion;
using multifd::postcopy::Userfaultfd;

enum class Backing { anonymous, shared_missing, shared_minor, huge, huge_minor };
inline const char* name_of(Backing backing) {
  constexpr const char* names[] = {"anonymous", "shared, missing", "shared, minor", "2 MiB pages",
                                   "2 MiB pages, minor"};
  return names[static_cast<int>(backing)];
}

/// As many bytes as a Backing can give, or nothing where the machine has no such memory.
class LazyBlock {
 public:
  static std::optional<LazyBlock> create(Backing backing, std::uint64_t bytes) {
    LazyBlock block;
    block.backing_ = backing;
    block.bytes_ = bytes;
    const bool huge = backing == Backing::huge || backing == Backing::huge_minor;
    if (backing != Backing::anonymous) {
      block.fd_ = static_cast<int>(::memfd_create("lazy", MFD_CLOEXEC | (huge ? MFD_HUGETLB | huge_2mb : 0)));
      if (block.fd_ < 0) return std::nullopt;
      REQUIRE(::ftruncate(block.fd_, static_cast<off_t>(bytes)) == 0);
    }
    block.memory_ = block.map();
    if (block.memory_ == nullptr) return std::nullopt;
    if (backing == Backing::shared_minor || backing == Backing::huge_minor) block.mapping_ = block.map();
    return block;
  }
  LazyBlock(LazyBlock&& other) noexcept
      : backing_(other.backing_),
        bytes_(other.bytes_),
        fd_(std::exchange(other.fd_, -1)),
        memory_(std::exchange(other.memory_, nullptr)),
        mapping_(std::exchange(other.mapping_, nullptr)) {}
  LazyBlock& operator=(LazyBlock&&) = delete;
  ~LazyBlock() {
    if (memory_ != nullptr) ::munmap(memory_, bytes_);
    if (mapping_ != nullptr) ::munmap(mapping_, bytes_);
    if (fd_ >= 0) ::close(fd_);
  }

  LazyRegion region(std::uint32_t block, std::uint64_t unit = page_size) const {
    const bool huge = backing_ == Backing::huge || backing_ == Backing::huge_minor;
    return {.address = reinterpret_cast<std::uintptr_t>(memory_),
            .bytes = bytes_,
            .block = BlockId{block},
            .unit_bytes = huge ? std::uint64_t{2} << 20 : unit,
            .mode = mapping_ != nullptr ? FaultMode::minor : FaultMode::missing,
            .mapping = mapping_};
  }
  std::byte* data() const { return memory_; }
  int memfd() const { return fd_; }
  std::uint64_t pages() const { return bytes_ / page_size; }
  std::uint64_t first_word(std::uint64_t page) const {
    return *reinterpret_cast<const volatile std::uint64_t*>(memory_ + page * page_size);
  }
  /// Whether each byte of the page is what the store says.
  bool right(const FakeStore& store, std::uint32_t block, std::uint64_t page) const {
    const std::uint64_t word = store.word(block, page);
    const auto* at = reinterpret_cast<const volatile std::uint64_t*>(memory_ + page * page_size);
    for (std::size_t i = 0; i < page_size / 8; ++i)
      if (at[i] != word) return false;
    return true;
  }
  /// Pages that are in memory.
  std::uint64_t resident() const {
    std::vector<unsigned char> there(pages());
    REQUIRE(::mincore(memory_, bytes_, there.data()) == 0);
    std::uint64_t sum = 0;
    for (const unsigned char each : there) sum += each & 1u;
    return sum;
  }

 private:
  static constexpr unsigned huge_2mb = 21u << 26;  // MFD_HUGE_2MB

  LazyBlock() = default;
  std::byte* map() const {
    const int flags = fd_ < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    // Aligned to the largest unit.
    const std::uint64_t align = std::uint64_t{2} << 20;
    void* const room = ::mmap(nullptr, bytes_ + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(room != MAP_FAILED);
    const auto begin = reinterpret_cast<std::uintptr_t>(room);
    const std::uintptr_t at = (begin + align - 1) / align * align;
    if (at > begin) ::munmap(room, at - begin);
    if (at - begin < align) ::munmap(reinterpret_cast<void*>(at + bytes_), align - (at - begin));
    void* const made = ::mmap(reinterpret_cast<void*>(at), bytes_, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd_, 0);
    if (made != MAP_FAILED) return static_cast<std::byte*>(made);
    ::munmap(reinterpret_cast<void*>(at), bytes_);
    return nullptr;
  }

  Backing backing_{};
  std::uint64_t bytes_ = 0;
  int fd_ = -1;
  std::byte* memory_ = nullptr;
  std::byte* mapping_ = nullptr;
};

/// Reads pages in an order of its own and counts those that are wrong.
inline std::uint64_t read_at_random(const LazyBlock& memory, const FakeStore& store, std::uint32_t block,
                                    std::uint64_t count, std::uint64_t number) {
  Rng rng(seed() + number);
  std::uint64_t wrong = 0;
  for (std::uint64_t i = 0; i < count; ++i)
    if (!memory.right(store, block, below(rng, memory.pages()))) ++wrong;
  return wrong;
}
inline std::uint64_t wrong_pages(const LazyBlock& memory, const FakeStore& store, std::uint32_t block) {
  std::uint64_t wrong = 0;
  for (std::uint64_t page = 0; page < memory.pages(); ++page)
    if (!memory.right(store, block, page)) ++wrong;
  return wrong;
}

/// Whether there are userfaultfds here; else the test case is skipped.
inline bool have_userfaultfd() {
  if (const auto made = Userfaultfd::create(); !made) {
    skip("no userfaultfd: " + text(made));
    return false;
  }
  return true;
}

/// 2 MiB pages for a while, where this process may ask for them.
class HugePages {
 public:
  explicit HugePages(unsigned wanted) {
    std::ifstream(path) >> before_;
    std::ofstream(path) << before_ + wanted;
  }
  ~HugePages() { std::ofstream(path) << before_; }

 private:
  static constexpr const char* path = "/proc/sys/vm/nr_hugepages";
  unsigned before_ = 0;
};

}  // namespace test
