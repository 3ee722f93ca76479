// SPDX-License-Identifier: MIT
#include "common/out_memory.hpp"

#include <CLI/CLI.hpp>

#include "multifd/memory/main_memory.hpp"

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
  const multifd::MainMemory main_memory(ram.blocks(), &RamBlock::bytes);
  std::vector<bool> fresh;
  for (const RamBlock& block : ram.blocks()) fresh.push_back(memory == OutMemory::fresh && main_memory.holds(block));
  return fresh;
}

}  // namespace program
