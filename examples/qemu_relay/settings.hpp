// SPDX-License-Identifier: MIT
//
// What the user says of a migration through the relay.
#pragma once

#include <optional>
#include <string>

#include "common/qemu_source.hpp"
#include "common/stacks.hpp"
#include "common/tls.hpp"

namespace relay {

/// --out-peer: from the machine type.
inline constexpr const char* peer_auto = "auto";

/// What is known about the destination's memory before the first page.
enum class OutMemory : std::uint8_t {
  unknown,  ///< anything: firmware, a file that was in use, an nvdimm; every zero page is sent so that it is written
  fresh,    ///< the user says that main memory (see fresh_blocks()) is zero
};

struct Settings {
  program::SourceOptions source;
  std::string connect;
  program::StackOptions out;
  program::Tls out_tls;
  std::optional<multifd::PeerProfile> out_peer;  ///< none: derived from the machine type
  bool choose_zero_pages = false;                ///< by the peer's profile
  OutMemory out_memory = OutMemory::unknown;
  std::string json_path;
};

}  // namespace relay
