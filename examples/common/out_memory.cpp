// SPDX-License-Identifier: MIT
#include "common/out_memory.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>

namespace program {

using multifd::RamBlock;

CLI::Option* add_out_memory(CLI::App& app, const std::string& name, std::string& memory, const std::string& effect) {
  return app
      .add_option(
          name, memory,
          "What the destination's main memory holds before. unknown: anything, so each zero page is said in a way "
          "that writes it. fresh: zeros, so " +
              effect +
              " (faster with many zero pages, and nothing becomes "
              "resident), in all RAM blocks over 64 MiB and in one that is larger than all others; where that is not "
              "so, as in a file that was in use, an nvdimm or ivshmem, the guest is "
              "corrupted without a word")
      ->check(CLI::IsMember({"unknown", "fresh"}))
      ->capture_default_str();
}

OutMemory out_memory_of(const std::string& memory) { return memory == "fresh" ? OutMemory::fresh : OutMemory::unknown; }

std::vector<bool> fresh_blocks(const multifd::RamMap& ram, OutMemory memory) {
  constexpr std::uint64_t largest_firmware = 64 * 1024 * 1024;  // the flashes of arm's virt
  std::uint64_t largest = 0;
  for (const RamBlock& block : ram.blocks()) largest = std::max(largest, block.bytes);
  // As large as another block, or a flash by its name: then size does not tell which one is main memory.
  const bool alone = std::ranges::count(ram.blocks(), largest, &RamBlock::bytes) == 1;
  const auto is_main = [&](const RamBlock& block) {
    return block.bytes > largest_firmware || (alone && block.bytes == largest && !block.idstr.contains("flash"));
  };
  std::vector<bool> fresh;
  for (const RamBlock& block : ram.blocks()) fresh.push_back(memory == OutMemory::fresh && is_main(block));
  return fresh;
}

}  // namespace program
