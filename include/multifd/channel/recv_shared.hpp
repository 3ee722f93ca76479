// SPDX-License-Identifier: MIT
//
// What the channels of one receiver share: settings, the hellos, the barrier, the first error.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "multifd/channel/first_error.hpp"
#include "multifd/channel/hello_desk.hpp"
#include "multifd/channel/receive_hooks.hpp"
#include "multifd/channel/sync_point.hpp"
#include "multifd/memory/populate_ahead.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/memory/received_pages.hpp"

namespace multifd {

/// What the receiver's memory holds before the first page arrives.
enum class DestinationMemory : std::uint8_t {
  unknown,  ///< anything: a zero page is written, unless the page is found to be zero already
  zeroed,   ///< fresh memory: a zero page where no bytes have come is not even looked at, so it stays untouched
};

/// As what a page arrives.
enum class Arrived : std::uint8_t { zero, bytes };

/// Whether data may come before the first SYNC.
enum class FirstPacket : std::uint8_t {
  any,
  sync,  ///< QEMU's sources open with a SYNC (format/packets.md section 6.5); data before it is refused
};

/// What all channels of one receiver share.
struct RecvShared {
  RecvShared(const RamMap& ram, DestinationMemory memory, FirstPacket first, PacketHook packet, DeviceStateHook device,
             unsigned channels, std::uint32_t method, const UuidCheck& uuid_check, std::function<void()> stop)
      : map(ram),
        destination(memory),
        first_packet(first),
        on_packet(std::move(packet)),
        on_device_state(std::move(device)),
        hellos(channels, uuid_check, announcement_of(map, channels, method)),
        error(std::move(stop)) {}

  /// Notes pages whose bytes are about to be put into memory.
  void note_bytes(BlockId block, std::uint64_t offset, std::size_t pages) noexcept {
    received.set(block, offset, pages);
    filled.set(block, offset, pages);
  }
  /// Notes a zero page, and says whether bytes have come for its place before: else fresh memory is zero there still,
  /// and a look would make a hole of a file resident.
  bool note_zero(BlockId block, std::uint64_t offset) noexcept {
    received.set(block, offset, 1);
    return filled.test(block, offset);
  }

  const RamMap map;
  const DestinationMemory destination;
  const FirstPacket first_packet;
  const PacketHook on_packet;
  const DeviceStateHook on_device_state;
  HelloDesk hellos;
  ReceivedPages received;                   ///< as bytes or as zero
  ReceivedPages filled;                     ///< as bytes
  std::unique_ptr<PopulateAhead> populate;  ///< null: nobody does
  std::unique_ptr<SyncPoint> barrier;
  std::atomic<bool> epochs_ended = false;  ///< no page is taken any more
  FirstError error;
  std::atomic<bool> peer_takes_answer{false};  ///< as one of its hellos said
  std::function<std::uint64_t()> progress;     ///< a number that changes while bytes move on any channel
};

}  // namespace multifd
