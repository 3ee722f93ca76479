// SPDX-License-Identifier: MIT
//
// What the user says of a migration through the relay.
#pragma once

#include <optional>
#include <string>

#include "common/out_memory.hpp"
#include "common/paths.hpp"
#include "common/qemu_source.hpp"
#include "common/stacks.hpp"
#include "common/tls.hpp"

namespace relay {

/// --out-peer: from the machine type.
inline constexpr const char* peer_auto = "auto";

struct Settings {
  program::SourceOptions source;
  std::string connect;
  program::PathOptions out_paths;
  program::StackOptions out;
  program::Tls out_tls;
  std::optional<multifd::PeerProfile> out_peer;  ///< none: derived from the machine type
  bool choose_zero_pages = false;                ///< by the peer's profile
  program::OutMemory out_memory = program::OutMemory::unknown;
  std::string json_path;
};

}  // namespace relay
