// SPDX-License-Identifier: MIT
//
// What a peer can do, by generation. The wire negotiates nothing (PROTOCOL.md section 1.3), so the caller says what
// stands on the other side. One table, one row per generation; receivers need no row, they accept every generation.
#pragma once

#include <array>
#include <string_view>

#include "multifd/result.hpp"

namespace multifd {

/// When a QEMU peer of that generation, with a machine type of its own, expects SYNCs (PROTOCOL.md section 6.1).
enum class SyncStyle : std::uint8_t {
  per_section,  ///< at the end of every RAM section of the main stream (up to 8.0)
  per_round,    ///< at each MULTIFD_FLUSH record (8.1 and later)
};

/// One generation of peers, as a sender and the writer of its main stream have to know it.
struct PeerProfile {
  std::string_view name;  ///< what people type: "qemu-9.0"
  unsigned major, minor;  ///< the first version of the generation; our own receiver: 0, 0
  bool zero_lists;        ///< reads zero pages listed in packets; older ones drop them silently (section 5.3)
  bool device_state;      ///< knows device-state packets (section 13)
  bool digests;           ///< verifies our digest extension
  SyncStyle sync_style;   ///< per_section: does not know the FLUSH record at all
};

/// Every known generation, oldest first (PROTOCOL.md section 15). A row holds until the next.
inline constexpr std::array<PeerProfile, 7> peer_profiles{{
    // name        version  zero_lists device_state digests sync_style
    {"qemu-7.2", 7, 2, false, false, false, SyncStyle::per_section},
    {"qemu-8.0", 8, 0, false, false, false, SyncStyle::per_section},
    {"qemu-8.1", 8, 1, false, false, false, SyncStyle::per_round},
    {"qemu-9.0", 9, 0, true, false, false, SyncStyle::per_round},
    {"qemu-10.0", 10, 0, true, true, false, SyncStyle::per_round},
    {"qemu-11.0", 11, 0, true, true, false, SyncStyle::per_round},
    {"multifd", 0, 0, true, true, true, SyncStyle::per_round},
}};

/// The row for our own receiver.
inline constexpr const PeerProfile& peer_multifd = peer_profiles.back();

/// Finds a row by its name. Errors: Errc::unknown_policy.
inline Result<PeerProfile> find_peer_profile(std::string_view name) noexcept {
  for (const PeerProfile& profile : peer_profiles)
    if (profile.name == name) return profile;
  return fail(Errc::unknown_policy, Stage::setup, "peer profile");
}

/// The oldest generation that can have a machine type, which source and destination share: "pc-q35-9.2" runs on QEMU
/// 9.2 and later, so its peer can do at least what "qemu-9.0" can. The first row for a name without a version.
inline PeerProfile peer_of_machine_type(std::string_view machine_type) noexcept {
  const auto number = [](std::string_view& text) {
    unsigned value = 0;
    while (!text.empty() && text.front() >= '0' && text.front() <= '9' && value < 1000) {
      value = value * 10 + static_cast<unsigned>(text.front() - '0');
      text.remove_prefix(1);
    }
    return value;
  };
  std::string_view version = machine_type.substr(machine_type.rfind('-') + 1);  // all of it without a '-'
  const unsigned major = number(version);
  if (!version.empty()) version.remove_prefix(1);  // the point
  const unsigned minor = number(version);
  PeerProfile found = peer_profiles.front();
  for (const PeerProfile& profile : peer_profiles) {
    const bool reached = major > profile.major || (major == profile.major && minor >= profile.minor);
    if (profile.major != 0 && reached) found = profile;
  }
  return found;
}

}  // namespace multifd
