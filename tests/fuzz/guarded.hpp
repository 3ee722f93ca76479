// SPDX-License-Identifier: MIT
//
// Memory that catches writes outside of it, also by a codec library without a sanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "fuzz/fuzz.hpp"

namespace fuzz {

/// Some bytes that end where a forbidden page begins; what lies between them and the forbidden page in front of them is
/// filled with a pattern.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : bytes_(bytes) {
    const auto host_page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t inside = (bytes + host_page - 1) / host_page * host_page;
    mapped_ = inside + 2 * host_page;
    void* const at = ::mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(at != MAP_FAILED, "mmap");
    base_ = static_cast<std::byte*>(at);
    require(::mprotect(base_ + host_page, inside, PROT_READ | PROT_WRITE) == 0, "mprotect");
    front_ = {base_ + host_page, inside - bytes};
    std::ranges::fill(front_, pattern);
  }
  Guarded(Guarded&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        bytes_(other.bytes_),
        mapped_(other.mapped_),
        front_(other.front_) {}
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (base_ != nullptr) ::munmap(base_, mapped_);
  }

  std::span<std::byte> bytes() const { return {front_.data() + front_.size(), bytes_}; }
  void fill(std::byte value) const { std::memset(bytes().data(), std::to_integer<int>(value), bytes_); }
  void check() const {
    const bool intact = front_.empty() ||
                        (front_[0] == pattern && std::memcmp(front_.data(), front_.data() + 1, front_.size() - 1) == 0);
    require(intact, "memory in front of a block is untouched");
  }

 private:
  static constexpr std::byte pattern{0xc3};
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t mapped_ = 0;
  std::span<std::byte> front_;
};

}  // namespace fuzz
