// SPDX-License-Identifier: MIT
//
// A channel's hello: the 64 bytes that open it (format/packets.md section 2).
//
//   off  size  field      refused
//     0     4  magic      anything but 0x11223344
//     4     4  version    anything but 1
//     8    16  uuid       by the receiver's policy, see UuidCheck
//    24     1  id         id >= channel count; an id seen before (packets/hellos.hpp)
//    25    39  reserved   nothing: zero from QEMU; our own senders announce their settings there (announcement.hpp)
#pragma once

#include <array>
#include <cstring>
#include <optional>
#include <span>

#include "multifd/format/announcement.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd {

namespace wire {

using InitPacketBytes = std::array<std::byte, init_packet_bytes>;

struct InitPacket {
  Uuid uuid{};
  std::uint8_t id = 0;
  std::optional<Announcement> announced{};  ///< only senders of ours announce
};

inline InitPacketBytes encode(const InitPacket& packet) noexcept {
  InitPacketBytes bytes{};
  store_be<std::uint32_t>(&bytes[0], magic);
  store_be<std::uint32_t>(&bytes[4], version);
  std::memcpy(&bytes[init_packet_uuid_offset], packet.uuid.data(), packet.uuid.size());
  bytes[init_packet_id_offset] = std::byte{packet.id};
  if (packet.announced) store_announcement(bytes, *packet.announced);
  return bytes;
}

/// Parses a hello for a receiver of `channels` channels.
///
/// Errors: Errc::bad_magic, bad_version (detail: the value), channel_count_mismatch (detail: the peer's),
///   channel_id_out_of_range (detail: the id). packets::Hellos compares the rest of the announcement.
/// Threads: any. Wire: format/packets.md section 2.
[[nodiscard]] inline Result<InitPacket> parse_init_packet(std::span<const std::byte, init_packet_bytes> bytes,
                                                          unsigned channels) noexcept {
  const auto got_magic = load_be<std::uint32_t>(&bytes[0]);
  if (got_magic != magic) return fail(Errc::bad_magic, Stage::hello, "initial packet", got_magic);
  const auto got_version = load_be<std::uint32_t>(&bytes[4]);
  if (got_version != version) return fail(Errc::bad_version, Stage::hello, "initial packet", got_version);
  InitPacket packet;
  std::memcpy(packet.uuid.data(), &bytes[init_packet_uuid_offset], packet.uuid.size());
  packet.id = std::to_integer<std::uint8_t>(bytes[init_packet_id_offset]);
  packet.announced = load_announcement(bytes);
  if (packet.announced && packet.announced->channels != channels)
    return fail(Errc::channel_count_mismatch, Stage::hello, "initial packet", packet.announced->channels, channels);
  if (packet.id >= channels)
    return fail(Errc::channel_id_out_of_range, Stage::hello, "initial packet", packet.id, channels);
  return packet;
}

/// The id of a channel too many: `first`, a connection's first bytes, is a hello of the VM `uuid` with an id past the
/// `channels` that were accepted. None for everything else: a lower id, or another VM's uuid, is a channel of the next
/// migration to that address, and a sender of ours announces its number of channels, which is compared anyway.
inline std::optional<std::uint8_t> id_of_channel_too_many(std::span<const std::byte> first, unsigned channels,
                                                          const Uuid& uuid) noexcept {
  if (first.size() < init_packet_bytes) return std::nullopt;
  const auto hello = parse_init_packet(first.first<init_packet_bytes>(), max_channels + 1);
  if (!hello || hello->announced || hello->id < channels || hello->uuid != uuid) return std::nullopt;
  return hello->id;
}

}  // namespace wire
}  // namespace multifd
