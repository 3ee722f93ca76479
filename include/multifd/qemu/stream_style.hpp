// SPDX-License-Identifier: MIT
//
// What a source's machine type, and the generation of its peer, decide about the main stream that it writes
// (format/versions.md section 15, format/main_stream.md sections 9.2 to 9.5).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "multifd/options.hpp"
#include "multifd/peer_profile.hpp"

namespace multifd::qemu {

/// Options of MainStreamWriter. style_of() makes one from a machine type.
struct StreamStyle {
  std::size_t page_bytes = 4096;                ///< the guest's page size
  SyncStyle sync_style = SyncStyle::per_round;  ///< what ends an epoch; a wrong one makes the destination hang
  bool switchover_start =
      false;                  ///< SWITCHOVER_START ahead of RAM's END. Older QEMUs than 10.0 refuse it; newer ones do
                              ///< without it
  bool configuration = true;  ///< the configuration; off for machine types before 2.4
  bool footers = true;        ///< behind each section; off for machine types before 2.4
  bool gpa = false;           ///< in the block list; on with the capability x-ignore-shared
  bool mapped_ram = false;    ///< the block list has mapped-ram headers; on with that capability
};

/// The style of a QEMU with that machine type. A name without a version gets what every QEMU from 8.1 on takes.
///
/// Params `peer`: the destination's generation, which decides where the machine type says nothing.
constexpr StreamStyle style_of(std::string_view machine_type, const PeerProfile& peer = peer_multifd,
                               std::size_t page_bytes = 4096) noexcept {
  const auto version = version_of_machine_type(machine_type);
  StreamStyle style{.page_bytes = page_bytes, .sync_style = peer.sync_style};
  if (!version) return style;
  const bool old = *version < QemuVersion{8, 1};
  style.sync_style = old ? SyncStyle::per_section : SyncStyle::per_round;
  style.switchover_start = *version >= QemuVersion{10, 0};
  style.configuration = style.footers = *version >= QemuVersion{2, 4};
  return style;
}

/// The contents of the configuration (section 9.3). Names are the caller's.
struct StreamConfiguration {
  std::string_view machine_type;                     ///< 1 to 4096 bytes; a QEMU compares it with its own
  std::optional<std::uint32_t> page_bits{};          ///< target-page-bits; never on x86
  std::span<const std::string_view> capabilities{};  ///< that change the stream: x-ignore-shared, mapped-ram
  std::optional<Uuid> uuid{};                        ///< with the capability validate-uuid
};

}  // namespace multifd::qemu
