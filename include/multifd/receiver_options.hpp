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

/// Run-time settings of a Receiver. Everything has a default. Time limits: 0 is none (time_limit.hpp).
template <Compressor C, PageSink Into = IntoMemory>
struct ReceiverOptions {
  C compressor{};  ///< limits of the decoder; levels are the sender's matter
  UuidCheck uuid{};
  Barrier barrier = Barrier::automatic;
  Into into{};  ///< where the pages go, and how: `{.populate = Populate::ahead}`
  FirstPacket first_packet = FirstPacket::any;
  std::chrono::milliseconds hello_timeout{10'000};  ///< for all initial packets together
  /// Where the links were accepted: then a channel more than they are, which waits there for somebody to accept it, is
  /// too_many_channels; its pages would be missed. For sources that do not announce their number, as QEMU's: those of
  /// ours are compared anyway. Plain sockets only. Not owned, may be null.
  Listener* listener = nullptr;
  /// Cancels from outside: open(), where there is nobody to cancel() yet, and later whatever release_epoch() and finish()
  /// wait for; noticed within 250 ms. Not owned, may be null.
  const Interrupt* interrupt = nullptr;
  /// How long channels wait at a barrier for others while no header and no payload arrives anywhere.
  std::chrono::milliseconds barrier_timeout{60'000};
  /// How long finish() waits while no header and no payload arrives anywhere. Long, because a source may well be silent
  /// while its operator holds it before the switchover; a host that is gone is noticed sooner (SocketOptions).
  std::chrono::milliseconds progress_timeout{300'000};
  DeviceStateHook on_device_state{};
  ThreadHook thread_hook{};  ///< runs in each worker before its first byte
  ErrorHook on_error{};      ///< told of the first error, once, by the thread that met it
};

}  // namespace multifd
