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

/// Run-time settings of a Sender. Everything has a default: most callers set `compressor`, and `peer` where a QEMU
/// receives.
/// Time limits: 0 is none (time_limit.hpp).
template <Compressor C, ZeroPagePolicy Z>
struct SenderOptions {
  // ---- The stack, and the peer that must understand it

  /// Parameters of the compressor: `{.level = 3}`. See the compressor.
  C compressor{};
  /// Parameters of the zero-page policy, where the policy has some (ResidencyAware). For what a QEMU does with listed
  /// zero pages see ZeroPagesMultifd.
  Z zero_pages{};
  /// The VM's uuid, for the hellos. Default: zeros. Set it where the peer checks the uuid, as a QEMU destination does.
  Uuid uuid{};
  /// Which generation receives. Default: this library's Receiver. Wrong values corrupt guests: see PeerProfile.
  PeerProfile peer = peer_multifd;

  // ---- Speed

  /// Cap in bytes per second over all channels; 0: no cap. What leaves at once is what the cap lets leave in a hundredth of a
  /// second, 512 bytes to 64 KiB; into a file a batch.
  std::uint64_t bandwidth = 0;
  /// Batches per channel between the producer and the channels, 2 to 16; 0: as many as make 64 in all. A batch is 1
  /// KiB; with FromCopies it has 512 KiB more, so choose fewer there. With few batches the producer must be woken more
  /// often, which costs as much as sending a batch. Most callers leave this alone.
  unsigned depth = 0;

  // ---- Time limits

  /// How long no channel may take a byte while a call waits for the channels: for room, an epoch, or the end. Longer
  /// survives longer outages of the network; shorter notices a dead peer sooner.
  std::chrono::milliseconds progress_timeout = default_send_progress_timeout;
  /// How long finish() waits for the receiver's confirmation behind the last byte. It must be as long as the receiver
  /// may need to take in what is under way, and to come to its own finish().
  std::chrono::milliseconds confirm_timeout{120'000};
  /// Cancels from outside, once the producer or a thread in wait() or at the end waits: noticed within 250 ms. For signal
  /// handlers, which may trigger an Interrupt but not call cancel(). Not owned, may be null.
  const Interrupt* interrupt = nullptr;

  // ---- Verification and hooks

  /// Whether packets carry a digest of their pages. On, every page is copied once more, and damage on the way is found.
  /// Only for peer_multifd. Set it where you do not trust the network or the memory.
  Digest digest = Digest::off;
  /// Called by the producer's thread, several times a second while it waits for the channels: for who has to look after another
  /// connection meanwhile. Its error is the transfer's. Keep it short. Default: none.
  std::function<Result<void>()> while_waiting{};
  ThreadHook thread_hook{};  ///< runs in each worker before its first packet: for placement, priority. Default: none
  ErrorHook on_error{};      ///< called once, with the first error, by the thread that raised it. Default: none
};

}  // namespace multifd
