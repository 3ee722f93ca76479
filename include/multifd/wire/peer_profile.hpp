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
  bool zero_lists;        ///< reads zero pages listed in packets; older ones drop them silently (section 5.3)
  bool device_state;      ///< knows device-state packets (section 13); for the main stream's writer
  bool digests;           ///< verifies our digest extension
  SyncStyle sync_style;
};

/// Every known generation, oldest first (PROTOCOL.md section 15). A row holds until the next.
inline constexpr std::array<PeerProfile, 7> peer_profiles{{
    {.name = "qemu-7.2",
     .zero_lists = false,
     .device_state = false,
     .digests = false,
     .sync_style = SyncStyle::per_section},
    {.name = "qemu-8.0",
     .zero_lists = false,
     .device_state = false,
     .digests = false,
     .sync_style = SyncStyle::per_section},
    {.name = "qemu-8.1",
     .zero_lists = false,
     .device_state = false,
     .digests = false,
     .sync_style = SyncStyle::per_round},
    {.name = "qemu-9.0",
     .zero_lists = true,
     .device_state = false,
     .digests = false,
     .sync_style = SyncStyle::per_round},
    {.name = "qemu-10.0",
     .zero_lists = true,
     .device_state = true,
     .digests = false,
     .sync_style = SyncStyle::per_round},
    {.name = "qemu-11.0",
     .zero_lists = true,
     .device_state = true,
     .digests = false,
     .sync_style = SyncStyle::per_round},
    {.name = "multifd", .zero_lists = true, .device_state = true, .digests = true, .sync_style = SyncStyle::per_round},
}};

/// The row for our own receiver.
inline constexpr const PeerProfile& peer_multifd = peer_profiles.back();

/// Finds a row by its name. Errors: Errc::unknown_policy.
inline Result<PeerProfile> find_peer_profile(std::string_view name) noexcept {
  for (const PeerProfile& profile : peer_profiles)
    if (profile.name == name) return profile;
  return fail(Errc::unknown_policy, Stage::setup, "peer profile");
}

}  // namespace multifd
