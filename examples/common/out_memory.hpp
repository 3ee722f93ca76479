// SPDX-License-Identifier: MIT
//
// What a program knows of the memory of a QEMU that it sends to: the first time that a page is listed in a packet as zero,
// a QEMU does not write it, because it assumes that its memory is zero there (format/packets.md section 5.2).
#pragma once

#include <multifd/memory/ram_map.hpp>

#include <string>
#include <vector>

#include "common/program.hpp"

namespace program {

/// What is known about the destination's memory before the first page.
enum class OutMemory : std::uint8_t {
  unknown,  ///< anything: firmware, a file that was in use, an nvdimm; every zero page is sent so that it is written
  fresh,    ///< the user says that main memory (see fresh_blocks()) is zero
};

/// Adds --out-memory or the like. `effect`: what fresh does for the program's user, for --help.
CLI::Option* add_out_memory(CLI::App& app, const std::string& name, std::string& memory, const std::string& effect);
OutMemory out_memory_of(const std::string& memory);

/// Which blocks count as zero at the destination if the user says so: multifd::MainMemory. ROMs and firmware never do.
std::vector<bool> fresh_blocks(const multifd::RamMap& ram, OutMemory memory);

}  // namespace program
