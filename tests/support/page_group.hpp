// SPDX-License-Identifier: MIT
//
// A PageGroup of pages that lie in memory at their offsets.
#pragma once

#include <array>
#include <span>

#include "multifd/zero/policy.hpp"

namespace test {

class GroupAt {
 public:
  GroupAt(multifd::BlockId block, const std::byte* host, std::size_t page_bytes, std::span<const std::uint64_t> offsets)
      : group_{.block = block, .page_bytes = page_bytes, .offsets = offsets, .pages = pages_.data()} {
    for (std::size_t i = 0; i < offsets.size(); ++i) pages_[i] = host + offsets[i];
  }
  GroupAt(const GroupAt&) = delete;
  GroupAt& operator=(const GroupAt&) = delete;

  operator const multifd::PageGroup&() const { return group_; }

 private:
  std::array<const std::byte*, multifd::zero_mask_pages> pages_{};
  multifd::PageGroup group_;
};

}  // namespace test
