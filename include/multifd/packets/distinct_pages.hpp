// SPDX-License-Identifier: MIT
//
// Refuses a packet that names a page twice (format/hardening.md section 16, row 9): two contents for one
// page, or zero and a content, have no order inside a packet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "multifd/result.hpp"

namespace multifd::packets {

/// One channel's check, and the memory for it.
class DistinctPages {
 public:
  [[nodiscard]] static Result<DistinctPages> create(std::size_t most_pages) noexcept {
    DistinctPages pages;
    pages.scratch_.reset(new (std::nothrow) std::uint64_t[most_pages]);
    if (!pages.scratch_) return fail_errno(Stage::setup, "allocate offsets", ENOMEM);
    return pages;
  }

  void clear() noexcept {
    count_ = 0;
    ascending_ = true;
  }

  void add(std::uint64_t offset) noexcept {
    if (count_ > 0 && offset <= scratch_[count_ - 1]) ascending_ = false;
    scratch_[count_++] = offset;
  }

  /// Errors: Errc::duplicate_page (detail: the offset, expected: `block_bytes`).
  /// Cost: nothing for ascending offsets, as every sender without zero lists writes them; otherwise one sort of a
  ///   packet's offsets.
  [[nodiscard]] Result<void> check(std::uint64_t block_bytes = 0) noexcept {
    if (ascending_) return {};
    const std::span<std::uint64_t> offsets(scratch_.get(), count_);
    std::ranges::sort(offsets);
    const auto twice = std::ranges::adjacent_find(offsets);
    if (twice == offsets.end()) return {};
    return fail(Errc::duplicate_page, Stage::parse, "", *twice, block_bytes);
  }

 private:
  std::unique_ptr<std::uint64_t[]> scratch_;
  std::size_t count_ = 0;
  bool ascending_ = true;
};

}  // namespace multifd::packets
