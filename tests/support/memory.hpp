// SPDX-License-Identifier: MIT
//
// Guest memory for tests: blocks between inaccessible pages, and contents with a seed.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

#include "multifd/memory/ram_map.hpp"
#include "support/basics.hpp"

namespace test {

/// std::ranges::equal of bytes, but quick without optimisation.
inline bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size()) == 0);
}

/// Page-aligned fresh memory with an unmapped page in front and behind: one byte too far is a crash.
class Block {
 public:
  explicit Block(std::size_t bytes) : bytes_(bytes) {
    const std::size_t host_page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    guard_ = host_page;
    mapped_ = (bytes + host_page - 1) / host_page * host_page + 2 * guard_;
    void* at = ::mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(at != MAP_FAILED);
    base_ = static_cast<std::byte*>(at);
    REQUIRE(::mprotect(base_ + guard_, mapped_ - 2 * guard_, PROT_READ | PROT_WRITE) == 0);
  }
  Block(Block&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        bytes_(other.bytes_),
        mapped_(other.mapped_),
        guard_(other.guard_) {}
  Block& operator=(Block&&) = delete;
  ~Block() {
    if (base_ != nullptr) ::munmap(base_, mapped_);
  }

  std::byte* data() const { return base_ + guard_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> bytes() const { return {data(), bytes_}; }
  /// Page `index` of pages of `page_bytes`.
  std::span<std::byte> page(std::size_t index, std::size_t page_bytes) const {
    return bytes().subspan(index * page_bytes, page_bytes);
  }
  void fill(std::byte value) const { std::memset(data(), std::to_integer<int>(value), bytes_); }

  friend bool operator==(const Block& a, const Block& b) { return same_bytes(a.bytes(), b.bytes()); }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t mapped_ = 0;
  std::size_t guard_ = 0;
};

/// A guest of one RAM block, "pc.ram".
struct GuestRam {
  explicit GuestRam(std::size_t pages, std::byte content = std::byte{7}) : memory(pages * 4096) {
    if (content != std::byte{0}) memory.fill(content);
    const auto added = map.add("pc.ram", memory.bytes());
    REQUIRE(added.has_value());
    block = *added;
  }
  Block memory;
  multifd::RamMap map;
  multifd::BlockId block{};
};

/// What a page may hold; each is a case of its own for zero checks and compressors.
enum class Fill { zero, last_byte, words, noise };

/// Words of random numbers by xorshift: quick without optimisation, which std's are not.
inline void fill_words(std::span<std::byte> page, Rng& rng, auto word_of) {
  std::uint64_t random = rng() | 1;
  std::byte* at = page.data();
  for (std::size_t left = page.size() / 8; left != 0; --left, at += 8) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    const std::uint64_t word = word_of(random);
    std::memcpy(at, &word, 8);
  }
}

inline void fill_page(std::span<std::byte> page, Fill fill, Rng& rng) {
  switch (fill) {
    case Fill::zero: std::memset(page.data(), 0, page.size()); return;
    case Fill::last_byte:
      std::memset(page.data(), 0, page.size());
      page.back() = std::byte{1};
      return;
    case Fill::words:  // few different values: compresses well
      fill_words(page, rng, [](std::uint64_t random) { return 0x0101010101010101u * ((random >> 32) % 5); });
      page.front() |= std::byte{1};
      return;
    case Fill::noise:
      fill_words(page, rng, [](std::uint64_t random) { return random; });
      page.front() |= std::byte{1};
      return;
  }
}

inline Fill any_fill(Rng& rng) { return static_cast<Fill>(rng() % 4); }

/// First byte at which two memories differ, or their size.
inline std::size_t first_difference(std::span<const std::byte> a, std::span<const std::byte> b) {
  const std::size_t both = std::min(a.size(), b.size());
  std::size_t at = 0;
  for (constexpr std::size_t piece = 4096; both - at >= piece; at += piece)
    if (!same_bytes(a.subspan(at, piece), b.subspan(at, piece))) break;
  while (at != both && a[at] == b[at]) ++at;
  return at;
}

}  // namespace test
