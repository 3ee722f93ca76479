// SPDX-License-Identifier: MIT
//
// What the channels of one receiver share: the map, the hellos, the barrier, counters, the first error.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "multifd/engine/counters.hpp"
#include "multifd/engine/first_error.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/options.hpp"
#include "multifd/packets/epoch_barrier.hpp"
#include "multifd/packets/hellos.hpp"

namespace multifd::packets {

struct InletShared {
  InletShared(const RamMap& ram, unsigned channel_count, std::uint32_t method, FirstPacket first,
              DeviceStateHook device, const UuidCheck& uuid_check, std::function<void()> stop, ErrorHook hook)
      : map(ram),
        channels(channel_count),
        first_packet(first),
        on_device_state(std::move(device)),
        counters(std::make_unique<engine::ChannelCounters[]>(channel_count)),
        hellos(channel_count, uuid_check, announcement_of(map, channel_count, method)),
        error(std::move(stop), std::move(hook)) {}

  /// A number that changes while bytes come on any channel, and while no channel has a connection: how long that may take is
  /// said by where new ones come from.
  std::uint64_t moved() noexcept {
    std::uint64_t sum = 0;
    // Relaxed: a number that has to be another one, and nothing else.
    if (barrier && barrier->away() == channels) sum += 1 + asked_while_away.fetch_add(1, std::memory_order_relaxed);
    for (unsigned i = 0; i < channels; ++i) sum += counters[i].progress();
    return sum;
  }

  const RamMap map;
  const unsigned channels;
  const FirstPacket first_packet;
  const DeviceStateHook on_device_state;
  const std::unique_ptr<engine::ChannelCounters[]> counters;  ///< by link
  Hellos hellos;
  std::unique_ptr<EpochBarrier> barrier;  ///< never null once the channels run
  std::atomic<std::uint64_t> asked_while_away{0};
  std::atomic<bool> epochs_ended = false;      ///< pages that come now are refused
  std::atomic<bool> peer_takes_answer{false};  ///< one of its hellos said so
  engine::FirstError error;
};

}  // namespace multifd::packets
