// SPDX-License-Identifier: MIT
//
// Device-state packets (format/packets.md section 13, since QEMU 10.0): a device's state on a multifd channel, with a
// header of its own that is shorter than a RAM packet's.
//
//   off  size  field             refused
//     0     4  magic             anything but 0x11223344
//     4     4  version           anything but 1
//     8     4  flags             without 0x40; with SYNC
//    12   256  idstr             empty, or no NUL inside
//   268     4  instance_id       nothing
//   272     4  next_packet_size  0; above the receiver's limit
#pragma once

#include <cstring>
#include <span>
#include <string_view>

#include "multifd/format/byte_order.hpp"
#include "multifd/format/constants.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"

namespace multifd {

namespace wire {

inline constexpr std::size_t device_state_header_bytes = 276;

/// The header's fields, checked. `idstr` points into the bytes that were parsed.
struct DeviceStateHeader {
  std::string_view idstr;
  std::uint32_t instance_id = 0;
  std::uint32_t payload_bytes = 0;
};

/// Writes a header. Params: `to`: device_state_header_bytes; `state.idstr`: at most 255 bytes; `state.bytes`: below 4
/// GiB.
inline void encode_device_state_header(std::byte* to, const DeviceState& state) noexcept {
  std::memset(to, 0, device_state_header_bytes);
  store_be<std::uint32_t>(to + 0, magic);
  store_be<std::uint32_t>(to + 4, version);
  store_be<std::uint32_t>(to + 8, flag_device_state);
  std::memcpy(to + 12, state.idstr.data(), state.idstr.size());
  store_be<std::uint32_t>(to + 268, state.instance_id);
  store_be<std::uint32_t>(to + 272, static_cast<std::uint32_t>(state.bytes.size()));
}

/// Parses and checks a header. Params: `limit_bytes`: the largest payload that is accepted.
/// Errors (stage parse): Errc::bad_magic, bad_version, bad_device_state (detail: the
/// refused value), payload_too_large
///   above `limit_bytes`.
[[nodiscard]] inline Result<DeviceStateHeader> parse_device_state_header(
    std::span<const std::byte, device_state_header_bytes> bytes, std::size_t limit_bytes) noexcept {
  constexpr auto stage = Stage::parse;
  const std::byte* const at = bytes.data();
  if (const auto got = load_be<std::uint32_t>(at); got != magic) return fail(Errc::bad_magic, stage, "header", got);
  if (const auto got = load_be<std::uint32_t>(at + 4); got != version)
    return fail(Errc::bad_version, stage, "header", got);
  const auto flags = load_be<std::uint32_t>(at + 8);
  if ((flags & flag_device_state) == 0 || (flags & flag_sync) != 0)
    return fail(Errc::bad_device_state, stage, "flags", flags);
  const char* const name = reinterpret_cast<const char*>(at + 12);
  const std::size_t name_length = ::strnlen(name, idstr_bytes);
  if (name_length == 0 || name_length == idstr_bytes)
    return fail(Errc::bad_device_state, stage, "device idstr", name_length);
  const DeviceStateHeader header{.idstr = {name, name_length},
                                 .instance_id = load_be<std::uint32_t>(at + 268),
                                 .payload_bytes = load_be<std::uint32_t>(at + 272)};
  if (header.payload_bytes == 0) return fail(Errc::bad_device_state, stage, "next_packet_size");
  if (header.payload_bytes > limit_bytes)
    return fail(Errc::payload_too_large, stage, "device state", header.payload_bytes);
  return header;
}

}  // namespace wire
}  // namespace multifd
