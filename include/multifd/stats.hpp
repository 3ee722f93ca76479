// SPDX-License-Identifier: MIT
//
// The counters of a running Sender or Receiver as plain snapshots, and which part of the work limits it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace multifd {

/// One channel's counters. Times are wall-clock nanoseconds of the channel's worker, summed up.
struct ChannelStats {
  std::uint32_t id = 0;             ///< the channel's, from the hello; no_channel before a receiver has read it
  std::uint64_t packets = 0;        ///< data packets; neither the hello nor SYNCs
  std::uint64_t syncs = 0;          ///< SYNC packets
  std::uint64_t normal_pages = 0;   ///< pages that travelled as bytes
  std::uint64_t zero_pages = 0;     ///< pages that travelled in zero lists
  std::uint64_t payload_bytes = 0;  ///< page data as it was on the wire
  std::uint64_t wire_bytes = 0;     ///< all bytes: hello, headers, payload
  std::uint64_t idle_ns = 0;        ///< sender: no batch to send; receiver: held at the barrier
  std::uint64_t check_ns = 0;       ///< looking for zero pages (receiver: writing them)
  std::uint64_t codec_ns = 0;       ///< compressing or decompressing, and digests
  std::uint64_t capped_ns = 0;      ///< held back by the bandwidth cap
  std::uint64_t io_ns = 0;          ///< inside the transport's reads and writes
  std::uint64_t cpu_ns = 0;         ///< CPU time of the worker, as of its last SYNC or its end

  /// Adds all but `id`.
  ChannelStats& operator+=(const ChannelStats& other) noexcept {
    packets += other.packets;
    syncs += other.syncs;
    normal_pages += other.normal_pages;
    zero_pages += other.zero_pages;
    payload_bytes += other.payload_bytes;
    wire_bytes += other.wire_bytes;
    idle_ns += other.idle_ns;
    check_ns += other.check_ns;
    codec_ns += other.codec_ns;
    capped_ns += other.capped_ns;
    io_ns += other.io_ns;
    cpu_ns += other.cpu_ns;
    return *this;
  }
};

/// What limits a transfer.
enum class Bound : std::uint8_t { nothing, producer, zero_check, compression, transport, bandwidth_cap };

constexpr const char* to_string(Bound bound) noexcept {
  constexpr const char* names[] = {"nothing", "producer", "zero check", "compression", "transport", "bandwidth cap"};
  return names[static_cast<std::size_t>(bound)];
}

/// The sum over channels. `id` of the sum has no meaning.
inline ChannelStats total(const std::vector<ChannelStats>& channels) noexcept {
  ChannelStats sum;
  for (const ChannelStats& each : channels) sum += each;
  return sum;
}

/// Which part of the work limits the transfer: the one that took most of the workers' time.
inline Bound bounded_by(const ChannelStats& sum) noexcept {
  struct Share {
    std::uint64_t ns;
    Bound bound;
  };
  const Share shares[] = {{sum.idle_ns, Bound::producer},
                          {sum.check_ns, Bound::zero_check},
                          {sum.codec_ns, Bound::compression},
                          {sum.capped_ns, Bound::bandwidth_cap},
                          {sum.io_ns, Bound::transport}};
  const Share largest = *std::ranges::max_element(shares, {}, &Share::ns);
  return largest.ns == 0 ? Bound::nothing : largest.bound;
}

/// A Sender's snapshot. Counters of different channels may be some packets apart.
struct SenderStats {
  std::vector<ChannelStats> channels;  ///< by id
  std::uint64_t zero_on_main = 0;      ///< zero pages reported to the caller (ZeroPagesLegacy)
  std::uint64_t queued_pages = 0;      ///< pages that the producer put into batches
  std::uint64_t epochs = 0;            ///< closed by close_epoch()
  std::uint64_t producer_waits = 0;    ///< times that every channel was full
  std::uint64_t producer_wait_ns = 0;  ///< how long the producer waited then, in all
};

/// Which part of the work limits a sender. A producer that had to wait for the channels is not the limit, even if some
/// channel was idle for long at the end.
inline Bound bounded_by(const SenderStats& stats) {
  ChannelStats sum = total(stats.channels);
  if (stats.producer_waits > 0) sum.idle_ns = 0;
  return bounded_by(sum);
}

/// A Receiver's snapshot.
struct ReceiverStats {
  std::vector<ChannelStats> channels;  ///< by id
  std::uint64_t epochs = 0;            ///< completed by all channels
  std::uint64_t zeros_written = 0;     ///< zero pages that had to be written to memory
  std::uint64_t pages_verified = 0;    ///< pages that came with a digest and matched it
};

}  // namespace multifd
