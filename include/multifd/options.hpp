// SPDX-License-Identifier: MIT
//
// The small types of the public interface: what options take, what hooks get, what calls return. The option structs
// themselves stand beside their classes: SenderOptions, ReceiverOptions, SocketOptions, TlsOptions.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "multifd/memory/page_buffer.hpp"
#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"

namespace multifd {

// ---- Both ends

/// A VM's uuid in textual byte order; all zero when the VM has none.
using Uuid = std::array<std::byte, 16>;

/// One packet's part of a device's state. The bytes are opaque. Such packets are not ordered by SYNC.
struct DeviceState {
  std::string_view idstr;  ///< the device's name, 1 to 255 bytes
  std::uint32_t instance_id = 0;
  std::span<const std::byte> bytes;  ///< at least one
};

/// What a thread hook learns about the thread in which it runs.
struct ThreadInfo {
  /// "send", "recv"; "populate": the helper thread of Populate::ahead; "page": of memory on demand.
  const char* role;
  std::uint32_t channel;  ///< a sender's channel id; a receiver's index of the link, because no hello is read yet
};

/// Called in each new worker before its first packet: for placement, priority, accounting. Must return soon, must not
/// throw.
using ThreadHook = std::function<void(const ThreadInfo&)>;

/// Called once, with the first error, by the thread that raised it (or the one that called cancel()). It wakes a caller
/// that waits elsewhere, for its main stream for instance. Must return soon, must not throw, and must not call the
/// Sender or Receiver.
using ErrorHook = std::function<void(const Error&)>;

// ---- Sender

/// The default of SenderOptions::progress_timeout.
inline constexpr std::chrono::milliseconds default_send_progress_timeout{120'000};

/// Whether packets carry a digest of their page data (an extension of our own, see wire::digest_offset).
enum class Digest : std::uint8_t {
  off,  ///< no digest
  on,   ///< XXH3-64 of the page data: our own receiver verifies it, a QEMU ignores it
};

/// What queue_page() did with a page.
enum class Queued : std::uint8_t {
  queued,        ///< the page will travel on a channel
  zero_on_main,  ///< the page is zero, and the caller must write it to its main stream (only with ZeroPagesLegacy)
};

/// What a bulk call did with its pages.
struct QueuedPages {
  std::uint64_t queued = 0;
  std::uint64_t zero_on_main = 0;
};

// ---- Receiver

/// What the receiver's memory holds before the first page arrives. Wrong values corrupt guests: `zeroed` leaves old
/// bytes where the source has a zero page.
enum class DestinationMemory : std::uint8_t {
  unknown,  ///< anything: a zero page is written, unless the memory is found to be zero there already
  zeroed,   ///< zeros: where no bytes have come, memory is neither read nor written for a zero page
};

/// Whether data may come before the first SYNC.
enum class FirstPacket : std::uint8_t {
  any,   ///< data or SYNC: right for our own senders and for every QEMU
  sync,  ///< only a SYNC, as every QEMU source sends first (format/packets.md section 6.5); others are refused
};

/// What opens the barrier between two epochs, at which every channel waits behind its SYNC.
enum class Barrier : std::uint8_t {
  automatic,  ///< the last channel that arrives: for receivers without a main stream
  manual,     ///< the caller's Receiver::release_epoch(), when its main stream closes the epoch
};

/// Which uuid a receiver accepts in the hellos. A uuid is no secret and no authentication (format/hardening.md section
/// 16, row 23): it keeps apart migrations that were started to one address by mistake.
struct UuidCheck {
  enum class Kind : std::uint8_t {
    any,          ///< every uuid, also different ones
    same_on_all,  ///< every uuid, but the same on all channels
    exact,        ///< `uuid`, byte for byte, as QEMU's destination demands
  };
  Kind kind = Kind::same_on_all;
  Uuid uuid{};  ///< for Kind::exact
};

/// Which threads take the page faults of fresh memory.
enum class Populate : std::uint8_t {
  off,    ///< the channels, while they receive: for memory that is warm, or sparse on purpose
  ahead,  ///< a helper thread, which asks for huge pages and populates up to 32 MiB ahead of the data
};

/// One packet's pages, checked and decoded, for a receiver that passes pages on instead of writing them to memory.
struct ReceivedPacket {
  std::uint32_t channel = no_channel;
  BlockId block{};
  std::span<const std::uint64_t> offsets;  ///< normal pages first, zero pages behind them; no page twice
  std::size_t normal_pages = 0;
  PageBuffer& pages;  ///< the normal pages, one after the other; may be swapped for another buffer
};

/// Takes each packet that has pages. An error that it returns ends the migration. It must not throw, and must leave a
/// buffer with memory in `pages`.
///
/// Threads: runs on the channel's thread, on several at once. Packets of one epoch come in any order; none comes before
///   the barrier has let its channel into the epoch. A call that blocks holds back its channel only.
using PacketHook = std::function<Result<void>(ReceivedPacket&)>;

/// Takes each device-state packet (format/packets.md section 13). These packets are not ordered by SYNC; apart from
/// that the hook is called as PacketHook. The bytes are valid until it returns.
struct DeviceStateHook {
  /// Default: empty, and a device-state packet is an error. Set it where the source's devices send their state on
  ///   channels.
  std::function<Result<void>(const DeviceState&)> take{};
  /// The largest packet, in bytes, which bounds the memory of each channel; a larger one is an error.
  std::size_t limit_bytes = 16 * 1024 * 1024;
};

}  // namespace multifd
