// SPDX-License-Identifier: MIT
//
// Main memory, told from the RAM blocks whose content a machine makes anew at each start: firmware, ROMs, tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <ranges>
#include <string_view>

namespace multifd {

/// Which RAM blocks are main memory: all over 64 MiB (a flash of arm's virt has 64 MiB), and one that is larger than all
/// others and no flash by its name. A machine fills only other blocks when it starts. Size and name are all that a stream
/// says of a block, so an nvdimm or ivshmem counts as main memory.
///
/// Params: `blocks`: with a member `idstr`. `bytes`: a block's size: a member or a function.
/// Threads: any. Cost: one walk; a call none.
template <std::ranges::forward_range Blocks, class Bytes>
class MainMemory {
 public:
  MainMemory(const Blocks& blocks, Bytes bytes) : bytes_(bytes) {
    for (const auto& block : blocks) largest_ = std::max(largest_, std::invoke(bytes_, block));
    // As large as another block: then size does not tell which one is main memory.
    alone_ = std::ranges::count(blocks, largest_, bytes_) == 1;
  }

  bool holds(const std::ranges::range_value_t<Blocks>& block) const {
    constexpr std::uint64_t largest_firmware = 64 * 1024 * 1024;
    const std::uint64_t bytes = std::invoke(bytes_, block);
    return bytes > largest_firmware ||
           (alone_ && bytes == largest_ && !std::string_view(block.idstr).contains("flash"));
  }

 private:
  Bytes bytes_;
  std::uint64_t largest_ = 0;
  bool alone_ = false;
};

}  // namespace multifd
