// SPDX-License-Identifier: MIT
//
// What a peer can do, by generation. Nothing is negotiated on the wire (format/README.md section 1.3), so the caller
// says which generation receives. One table, one row per generation. Receivers need no row, because they accept every
// generation.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string_view>

#include "multifd/result.hpp"

namespace multifd {

/// When a QEMU peer of that generation, with a machine type of its own, expects SYNCs (format/packets.md section 6.1).
enum class SyncStyle : std::uint8_t {
  per_section,  ///< at the end of every RAM section of the main stream (up to 8.0)
  per_round,    ///< at each MULTIFD_FLUSH record (8.1 and later)
};

/// One generation of receiving peers: what a sender, and the writer of its main stream, must know about it.
struct PeerProfile {
  std::string_view name;  ///< what users type: "qemu-9.0"
  unsigned major, minor;  ///< the first version of the generation; our own receiver: 0, 0
  bool zero_lists;        ///< reads zero pages listed in packets; older peers drop them silently (section 5.3). What a
                          ///< peer does when a page is listed for the first time: see ZeroPagesMultifd
  bool device_state;      ///< knows device-state packets (section 13)
  bool digests;           ///< verifies our digest extension
  SyncStyle sync_style;   ///< per_section: the peer does not know the FLUSH record
};

/// Every known generation, oldest first (format/versions.md section 15). A row holds for versions up to the next row.
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

/// The row for our own receiver. A source with a main stream can do better than believe it: ask_peer()
/// (qemu/peer_handshake.hpp) asks the destination.
inline constexpr const PeerProfile& peer_multifd = peer_profiles.back();

/// Finds a row by its name. Params: `name`: "qemu-9.0". Errors: Errc::unknown_policy. Threads: any.
[[nodiscard]] inline Result<PeerProfile> find_peer_profile(std::string_view name) noexcept {
  for (const PeerProfile& profile : peer_profiles)
    if (profile.name == name) return profile;
  return fail(Errc::unknown_policy, Stage::setup, "peer profile");
}

/// A version of QEMU, as machine types name it.
struct QemuVersion {
  unsigned major = 0, minor = 0;
  auto operator<=>(const QemuVersion&) const = default;
};

/// The machine types whose names end in the version of QEMU that they stand for.
inline constexpr std::array<std::string_view, 5> versioned_machine_types{"pc-i440fx-", "pc-q35-", "virt-", "pseries-",
                                                                         "s390-ccw-virtio-"};

/// Returns the version in a machine type's name. None for every other name, even one with digits ("SS-20", "raspi3b"),
/// and for a distribution's own names ("pc-q35-rhel9.6.0", "pc-i440fx-bionic").
///
/// Params: `machine_type`: as the stream's configuration has it; anything.
constexpr std::optional<QemuVersion> version_of_machine_type(std::string_view machine_type) noexcept {
  for (const std::string_view family : versioned_machine_types) {
    if (!machine_type.starts_with(family)) continue;
    const std::string_view version = machine_type.substr(family.size());
    const std::size_t point = version.find('.');
    if (point == version.npos) return std::nullopt;
    const auto number = [](std::string_view text) -> std::optional<unsigned> {
      if (text.empty() || text.size() > 3 || (text.size() > 1 && text.front() == '0')) return std::nullopt;
      unsigned value = 0;
      for (const char digit : text) {
        if (digit < '0' || digit > '9') return std::nullopt;
        value = value * 10 + static_cast<unsigned>(digit - '0');
      }
      return value;
    };
    const auto major = number(version.substr(0, point));
    const auto minor = number(version.substr(point + 1));
    if (!major || !minor || *major == 0) return std::nullopt;
    return QemuVersion{*major, *minor};
  }
  return std::nullopt;
}

/// Returns the oldest generation that has a machine type. Both sides have the same machine type, and "pc-q35-9.2"
/// runs on QEMU 9.2 and later, so that peer can do at least what "qemu-9.0" can. Where version_of_machine_type() finds
/// no version, the first row, which is safe with every peer.
constexpr PeerProfile peer_of_machine_type(std::string_view machine_type) noexcept {
  PeerProfile found = peer_profiles.front();
  const auto version = version_of_machine_type(machine_type);
  if (!version) return found;
  for (const PeerProfile& profile : peer_profiles)
    if (profile.major != 0 && *version >= QemuVersion{profile.major, profile.minor}) found = profile;
  return found;
}

}  // namespace multifd
