// SPDX-License-Identifier: MIT
//
// What a sender of ours announces about its settings in the reserved bytes of its hellos (format/packets.md section 2).
// The channels are one-way, so nothing is negotiated: the receiver compares the settings with its own, and refuses a
// difference before any page comes.
//
//   off  size  field
//    28     4  tag        "mfAN"; anything else: nothing is announced (QEMU writes zeros)
//    32     1  version    1; any other: as if nothing were announced
//    33     1  channels   their number
//    34     1  page bits  log2 of the page size
//    35     1  flags      1: the sender reads an answer (answer.hpp)
//    36     4  method     compression bits
//    40     8  bytes      of all RAM blocks together
//    48     4  blocks     the number of RAM blocks
//    52     4  zero
//    56     8  digest     of the blocks' names and sizes, in any order
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/constants.hpp"

namespace multifd::wire {

/// The settings that sender and receiver must have in common, as a sender announces them.
struct Announcement {
  unsigned channels = 0;
  std::uint64_t page_bytes = 0;
  std::uint32_t method = flag_none;
  std::uint32_t blocks = 0;
  std::uint64_t bytes = 0;
  std::uint64_t digest = 0;
  bool takes_answer = false;

  friend bool operator==(const Announcement&, const Announcement&) = default;
};

/// Writes the announcement into an initial packet, whose reserved bytes are zero.
inline void store_announcement(std::span<std::byte, init_packet_bytes> packet, const Announcement& what) noexcept {
  std::byte* const at = packet.data() + announcement_offset;
  store_be<std::uint32_t>(at, announcement_tag);
  at[4] = std::byte{announcement_version};
  at[5] = static_cast<std::byte>(what.channels);
  at[6] = static_cast<std::byte>(std::countr_zero(what.page_bytes));
  at[7] = what.takes_answer ? std::byte{1} : std::byte{0};
  store_be<std::uint32_t>(at + 8, what.method);
  store_be<std::uint64_t>(at + 12, what.bytes);
  store_be<std::uint32_t>(at + 20, what.blocks);
  store_be<std::uint64_t>(at + 28, what.digest);
}

/// Reads the announcement in an initial packet. None: the sender is not ours, or has another announcement version.
inline std::optional<Announcement> load_announcement(std::span<const std::byte, init_packet_bytes> packet) noexcept {
  const std::byte* const at = packet.data() + announcement_offset;
  if (load_be<std::uint32_t>(at) != announcement_tag || at[4] != std::byte{announcement_version}) return std::nullopt;
  const auto page_bits = std::to_integer<unsigned>(at[6]);
  return Announcement{.channels = std::to_integer<unsigned>(at[5]),
                      .page_bytes = page_bits < 64 ? std::uint64_t{1} << page_bits : page_bits,
                      .method = load_be<std::uint32_t>(at + 8),
                      .blocks = load_be<std::uint32_t>(at + 20),
                      .bytes = load_be<std::uint64_t>(at + 12),
                      .digest = load_be<std::uint64_t>(at + 28),
                      .takes_answer = (at[7] & std::byte{1}) != std::byte{}};
}

}  // namespace multifd::wire
