// SPDX-License-Identifier: MIT
//
// The small types of the public interface: what options take, what hooks get, what calls return. The option structs
// themselves stand beside their classes: SenderOptions, ReceiverOptions, SocketOptions, TlsOptions.
#pragma once

#include <array>
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

/// What one packet carries of a device. The bytes are opaque; packets are not ordered by SYNC.
struct DeviceState {
  std::string_view idstr;  ///< 1 to 255 bytes
  std::uint32_t instance_id = 0;
  std::span<const std::byte> bytes;  ///< at least one
};

/// What a thread hook learns about the thread it runs in.
struct ThreadInfo {
  const char* role;       ///< "send", "recv", or "populate": the helper of Populate::ahead
  std::uint32_t channel;  ///< for a receiver the order of the links, since the hello is not read yet
};

/// Called in each new worker before its first packet: placement, priority, accounting. Must not throw.
using ThreadHook = std::function<void(const ThreadInfo&)>;

/// Called once, with the first error, by the thread that met it (also cancel()'s): to wake a caller that waits for
/// something else, its main stream for instance. Must return soon, must not throw, and must not call the object back.
using ErrorHook = std::function<void(const Error&)>;

// ---- Sender

/// Whether packets carry a digest of their page data (own extension, see wire::digest_offset).
enum class Digest : std::uint8_t { off, on };

/// What queue_page() did with a page.
enum class Queued : std::uint8_t {
  queued,        ///< it will travel on a channel
  zero_on_main,  ///< it is zero, and the caller has to say so on its main stream (only with ZeroPagesLegacy)
};

/// What a bulk call did with its pages.
struct QueuedPages {
  std::uint64_t queued = 0;
  std::uint64_t zero_on_main = 0;
};

// ---- Receiver

/// What the receiver's memory holds before the first page arrives.
enum class DestinationMemory : std::uint8_t {
  unknown,  ///< anything: a zero page is written, unless the page is found to be zero already
  zeroed,   ///< fresh memory: a zero page where no bytes have come is not even looked at, so it stays untouched
};

/// Whether data may come before the first SYNC.
enum class FirstPacket : std::uint8_t {
  any,
  sync,  ///< QEMU's sources open with a SYNC (format/packets.md section 6.5); data before it is refused
};

/// Who opens the barrier.
enum class Barrier : std::uint8_t {
  automatic,  ///< the last channel to arrive: for users without a main stream
  manual,     ///< the caller, by Receiver::release_epoch(), when its main stream closes the epoch
};

/// Which uuid a receiver lets in. A uuid is no secret and no authentication (format/hardening.md section 16, row 23).
struct UuidCheck {
  enum class Kind : std::uint8_t {
    any,
    same_on_all,  ///< whatever it is, all channels must agree
    exact,        ///< `uuid`, byte for byte, as QEMU does
  };
  Kind kind = Kind::same_on_all;
  Uuid uuid{};
};

/// Whether a receiver takes the page faults of fresh memory in front of the data.
enum class Populate : std::uint8_t {
  off,    ///< the memory is warm, or sparse on purpose
  ahead,  ///< asks for huge pages, and a helper thread populates ahead of the data
};

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
