// SPDX-License-Identifier: MIT
//
// A RAM block: named host memory that holds a part of the guest's memory, and references to it and its pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace multifd {

/// Which block of a RamMap. Values count from 0 in the order of RamMap::add().
enum class BlockId : std::uint32_t {};

constexpr std::uint32_t index(BlockId id) noexcept { return static_cast<std::uint32_t>(id); }

/// What this process has of a block's memory.
enum class Access : std::uint8_t {
  read_write,
  read_only,  ///< for a Sender only
  none,       ///< nothing: for a relay, which only needs names and sizes
};

/// One RAM block as the map holds it. The memory belongs to the caller and must outlive every user of the map.
struct RamBlock {
  std::string idstr;          ///< name on the wire, 1 to 255 bytes: "pc.ram"
  std::span<std::byte> host;  ///< all of the block, or nothing with Access::none
  std::uint64_t bytes = 0;    ///< size of the block, a whole number of pages
  Access access = Access::read_write;
};

/// One page of guest memory. The guest may change the bytes while they are read.
struct PageRef {
  BlockId block{};
  std::uint64_t offset = 0;          ///< bytes from the start of the block, a multiple of the page size
  std::span<const std::byte> bytes;  ///< exactly one page
};

}  // namespace multifd
