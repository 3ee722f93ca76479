// SPDX-License-Identifier: MIT
//
// ReceiverOptions: the run-time settings of a Receiver.
#pragma once

#include <chrono>

#include "multifd/compress/policy.hpp"
#include "multifd/ends/into_memory.hpp"
#include "multifd/options.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd {

/// Run-time settings of a Receiver. Everything has a default: most callers set `barrier`, and `into` where the memory
/// is fresh. Time limits: 0 is none (time_limit.hpp).
template <Compressor C, PageSink Into = IntoMemory>
struct ReceiverOptions {
  // ---- The stream, and where its pages go

  /// Limits of the decoder (Zstd::max_window_log); the level is the sender's choice. Most callers leave this alone.
  C compressor{};
  /// Which uuid the hellos must have. Default: the same on all channels. Set `exact` where you know the VM's uuid.
  UuidCheck uuid{};
  /// What opens the barrier between epochs. Default: the last channel. Set `manual` where you read a main stream, as
  /// with every QEMU source: without it the channels run ahead of the main stream's zero pages.
  Barrier barrier = Barrier::automatic;
  /// Where the pages go, and how: `{.destination = DestinationMemory::zeroed, .populate = Populate::ahead}`.
  Into into{};
  /// Whether data may come before the first SYNC. Most callers leave this alone; `sync` refuses more senders that are
  /// no QEMU.
  FirstPacket first_packet = FirstPacket::any;

  // ---- Opening

  /// How long open() waits for the hellos of all channels together. Longer is needed only where a source connects its
  /// channels slowly.
  std::chrono::milliseconds hello_timeout{10'000};
  /// Where the links were accepted. With it, a channel more than the links, which waits there to be accepted, is
  /// too_many_channels; without it the pages of that channel are lost unnoticed. Set it for QEMU's sources, which do
  /// not announce their number of channels as ours do. open(), release_epoch() and finish() look; a look that fails (no
  /// descriptor left, for instance) fails none of them. Plain sockets only. Not owned, may be null.
  Listener* listener = nullptr;
  /// Cancels from outside: open(), where there is nobody to cancel() yet, and later whatever release_epoch() and finish()
  /// wait for; noticed within 250 ms. Not owned, may be null.
  const Interrupt* interrupt = nullptr;

  // ---- Time limits of the rest

  /// How long channels wait at the barrier for others while no byte arrives anywhere. Longer survives longer outages of
  /// the network; shorter notices a dead source sooner.
  std::chrono::milliseconds barrier_timeout{60'000};
  /// How long finish() waits while no byte arrives anywhere. Long, because a source may be silent while its operator
  /// holds it before the switchover. A host that is gone is noticed sooner (SocketOptions::user_timeout, keepalive).
  std::chrono::milliseconds progress_timeout{300'000};

  // ---- Hooks

  /// Takes device-state packets. Default: none, and such a packet is an error.
  DeviceStateHook on_device_state{};
  ThreadHook thread_hook{};  ///< runs in each worker before its first byte: for placement, priority. Default: none
  ErrorHook on_error{};      ///< called once, with the first error, by the thread that raised it. Default: none
};

}  // namespace multifd
