// SPDX-License-Identifier: MIT
//
// SenderOptions: the run-time settings of a Sender.
#pragma once

#include <chrono>
#include <cstdint>

#include "multifd/compress/policy.hpp"
#include "multifd/options.hpp"
#include "multifd/peer_profile.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd {

/// Run-time settings of a Sender. Everything has a default. Time limits: 0 is none (time_limit.hpp).
template <Compressor C, ZeroPagePolicy Z>
struct SenderOptions {
  C compressor{};                   ///< parameters: `{.level = 3}`
  Z zero_pages{};                   ///< what lists mean to a QEMU: see ZeroPagesMultifd
  Uuid uuid{};                      ///< the VM's, as the peer expects it
  PeerProfile peer = peer_multifd;  ///< who receives; wrong values corrupt guests, see PeerProfile
  /// Bytes per second over all channels; 0: no cap. A packet, up to 512 KiB, leaves in one piece: with less than that in
  /// the receiver's progress_timeout the receiver takes the pause for a stand-still.
  std::uint64_t bandwidth = 0;
  /// Batches per channel between the producer and the channels, 2 to 16; 0: as many as make 64 in all. Many, because
  /// waking the producer costs as much as sending a batch; one is 1 KiB, but 512 KiB more with FromCopies:
  /// choose fewer there.
  unsigned depth = 0;
  /// How long the channels may stand still while somebody waits for them: for room, for an epoch, for the end.
  std::chrono::milliseconds progress_timeout{120'000};
  /// How long finish() waits for the receiver's confirmation behind the last byte: as long as the receiver may need to
  /// take in what is under way, and to come to its own finish().
  std::chrono::milliseconds confirm_timeout{120'000};
  /// Cancels from outside, once the producer or a thread in wait() or at the end waits: noticed within 250 ms. For signal
  /// handlers, which may trigger an Interrupt but not call cancel(). Not owned, may be null.
  const Interrupt* interrupt = nullptr;
  Digest digest = Digest::off;  ///< costs a copy of each page; ignored by QEMU, checked by our Receiver
  ThreadHook thread_hook{};     ///< runs in each worker before its first packet
  ErrorHook on_error{};         ///< told of the first error, once, by the thread that met it
};

}  // namespace multifd
