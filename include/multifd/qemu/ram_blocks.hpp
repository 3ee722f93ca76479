// SPDX-License-Identifier: MIT
//
// Between the block list of RAM's START (format/main_stream.md section 9.5) and the RAM blocks of this side: the list
// that a source announces, and the comparison at a destination that has registered its memory beforehand.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/qemu/element.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// The blocks of a map as a source announces them: largest first, as QEMU does.
///
/// Returns names that are valid as long as the map.
/// Errors: ENOMEM. Threads: any, while nobody adds a block. Cost: one allocation.
[[nodiscard]] inline Result<std::vector<BlockInfo>> announced_blocks(const RamMap& ram) {
  return catch_bad_alloc(Stage::setup, "block list", [&]() -> Result<std::vector<BlockInfo>> {
    std::vector<BlockInfo> blocks;
    blocks.reserve(ram.blocks().size());
    for (const RamBlock& block : ram.blocks()) blocks.push_back({.idstr = block.idstr, .used_length = block.bytes});
    std::ranges::sort(blocks, [](const BlockInfo& a, const BlockInfo& b) {
      return a.used_length != b.used_length ? a.used_length > b.used_length : a.idstr < b.idstr;
    });
    return blocks;
  });
}

/// Compares the list that a source has announced with this side's blocks; the order plays no part.
///
/// Errors (stage hello): Errc::block_list_mismatch. Subject: the first block that one side lacks, or whose sizes differ
///   (detail: the source's, expected: this side's; 0: there is none).
/// Threads: any. Cost: the product of the two numbers of blocks.
[[nodiscard]] inline Result<void> compare_blocks(std::span<const BlockInfo> sources, const RamMap& own) noexcept {
  constexpr auto differ = [](const char* how, std::uint64_t theirs, std::uint64_t ours, std::string_view idstr) {
    return fail(Errc::block_list_mismatch, Stage::hello, how, theirs, ours, idstr);
  };
  for (const BlockInfo& block : sources) {
    const auto here = own.find(block.idstr);
    if (!here) return differ("RAM block that only the source has", block.used_length, 0, block.idstr);
    if (const auto bytes = own.block(*here).bytes; bytes != block.used_length)
      return differ("RAM block of two sizes", block.used_length, bytes, block.idstr);
  }
  for (const RamBlock& block : own.blocks())
    if (std::ranges::find(sources, block.idstr, &BlockInfo::idstr) == sources.end())
      return differ("RAM block that only the destination has", 0, block.bytes, block.idstr);
  return {};
}

}  // namespace multifd::qemu
