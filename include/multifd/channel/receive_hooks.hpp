// SPDX-License-Identifier: MIT
//
// What a receiver's channels hand to the caller beside guest memory: whole packets for a relay, and device state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "multifd/memory/page_buffer.hpp"
#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"
#include "multifd/wire/device_state.hpp"

namespace multifd {

/// One packet's pages, checked and decoded, for a receiver that hands pages on instead of putting them into memory.
struct ReceivedPacket {
  std::uint32_t channel = no_channel;
  BlockId block{};
  std::span<const std::uint64_t> offsets;  ///< normal pages first, zero pages after; no page twice
  std::size_t normal_pages = 0;
  PageBuffer& pages;  ///< the normal pages one after the other; may be swapped for another buffer
};

/// Takes each packet that has pages. Runs on the channel's thread: several at once, those of one epoch in any order,
/// none of an epoch before the barrier has let its channel in. Blocking holds that channel back. An error that it
/// returns is the migration's.
using PacketHook = std::function<Result<void>(ReceivedPacket&)>;

/// Takes each device-state packet (format/packets.md section 13); in other respects as PacketHook. These packets are
/// not ordered by SYNC. The bytes are gone when it returns.
struct DeviceStateHook {
  std::function<Result<void>(const DeviceState&)> take{};  ///< empty: such a packet is an error
  std::size_t limit_bytes = 16 * 1024 * 1024;              ///< of one packet; bounds the memory of each channel
};

}  // namespace multifd
