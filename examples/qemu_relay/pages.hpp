// SPDX-License-Identifier: MIT
//
// The relay's pages: packets of the source's channels, and zero pages of its main stream, into the channels to the
// destination. Zero pages change their form on the way, as the destination wants them:
//
//   source              none (bytes)    legacy (records)    multifd (lists), fresh    multifd, not known to be fresh
//   bytes               bytes           checked: record     checked: listed           bytes
//   record on main      bytes           record              listed                    record
//   listed in a packet  bytes           record              listed                    first: record; again: listed
//
// The first time that a page is listed, a QEMU does not write it, because it assumes that its memory is zero there. It
// always writes a record's page, and a listed page that it has received before in any form (format/packets.md section
// 5.2, seen on 10.0 and 11.1; 7.2 knows records only). So a list is right where the memory is fresh, or when the page
// has been sent before.
#pragma once

#include <multifd/memory/received_pages.hpp>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "qemu_relay/destination.hpp"

namespace relay {

/// One sender, fed by the source's channels and its main stream at once. Errors of the sender come back as Results.
class Pages {
 public:
  /// Opens the sender. Throws program::Failure.
  ///
  /// `ram`: the source's blocks, without memory; must outlive this object.
  Pages(const multifd::RamMap& ram, const program::StackOptions& out, program::OutMemory memory,
        std::vector<program::Link> links);

  /// Takes a packet of one of the source's channels. Threads: any. Blocks while every channel to the destination is
  /// full.
  multifd::Result<void> take(multifd::ReceivedPacket& packet);
  multifd::Result<void> take(const multifd::DeviceState& state);

  /// Takes a ZERO record of the source's main stream. Returns whether it must be forwarded on the main stream. Threads:
  /// the main one.
  multifd::Result<bool> take_zero(multifd::BlockId block, std::uint64_t offset);

  /// Writes the zero pages that go on the main stream and have come so far, so that the end of the epoch is not flooded
  /// with them. Only where a record is allowed: inside a RAM section. Threads: the main one.
  multifd::Result<void> write_zero_records(MainStreamWriter& main);

  /// Closes the epoch. The zero pages that go on the main stream must be written next. Threads: the main one, while
  /// all channels of the source are held.
  multifd::Result<void> close_epoch();

  program::AnySender& sender() noexcept { return *sender_; }
  /// Zero pages that left as records of the main stream.
  std::uint64_t zero_records() const;

 private:
  struct ZeroRun {
    multifd::BlockId block{};
    std::uint64_t offset = 0;
    std::uint64_t pages = 0;
  };
  bool note_zero(multifd::BlockId block, std::uint64_t offset);
  multifd::Result<void> take_lists(multifd::ReceivedPacket& packet);
  multifd::Result<void> queue_as_bytes(multifd::BlockId block, std::uint64_t offset);
  multifd::Result<void> flush_bytes();

  const multifd::RamMap& ram_;
  const std::vector<bool> fresh_;  ///< by block
  const bool by_record_;
  const bool by_list_;
  std::unique_ptr<program::AnySender> sender_;
  /// Guards the sender's producer calls, for many channels feed one producer, and all members below. Taken once a
  /// packet, beside half a megabyte of copying and compressing.
  mutable std::mutex mutex_;
  std::vector<ZeroRun> zero_runs_;  ///< of this epoch, for the main stream
  std::uint64_t zero_records_ = 0;
  std::optional<multifd::ReceivedPages> said_;  ///< pages that the destination has got; where lists depend on them
  std::vector<std::uint64_t> offsets_;          ///< a packet's, without the zero pages that go another way
  // Zero pages that travel as bytes, for one packet.
  multifd::BlockId bytes_block_{};
  std::vector<std::uint64_t> bytes_offsets_;
  multifd::PageBuffer bytes_pages_;
};

}  // namespace relay
