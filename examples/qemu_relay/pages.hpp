// SPDX-License-Identifier: MIT
//
// The relay's pages: packets of the source's channels, and zero pages of its main stream, into the channels to the
// destination. Zero pages change their form on the way, as the destination wants them:
//
//   source              none (bytes)        legacy (records)       multifd (lists)
//   bytes               bytes               checked: record        checked: listed
//   record on main      bytes               record                 listed (1)
//   listed in a packet  bytes               record                 listed
//
//   (1) A destination takes the first zero page at a place for what its memory holds already, and does not write it.
//       That is wrong where its own firmware files lie (PROTOCOL.md section 5.2), so in small blocks, which ROMs are,
//       zero pages that the source did not list itself travel as bytes.
#pragma once

#include <multifd/qemu/element.hpp>

#include <memory>
#include <mutex>
#include <vector>

#include "common/stacks.hpp"
#include "qemu_relay/main_writer.hpp"

namespace relay {

/// One sender, fed by the source's channels and its main stream at once. Errors of the sender come back as Results.
class Pages {
 public:
  /// Opens the sender. Throws program::Failure.
  ///
  /// `ram`: the source's blocks, without memory.
  Pages(const multifd::RamMap& ram, const program::StackOptions& out, std::vector<program::Link> links);

  /// A packet of one of the source's channels. Threads: any. Blocks while every channel to the destination is full.
  multifd::Result<void> take(multifd::ReceivedPacket& packet);
  multifd::Result<void> take(const multifd::DeviceState& state);

  /// A ZERO record of the source's main stream. Returns whether it has to be forwarded there. Threads: the main one.
  multifd::Result<bool> take_zero(multifd::BlockId block, std::uint64_t offset);

  /// Closes the epoch; writes the zero pages that go by the main stream. Threads: the main one, while all channels of
  /// the source are held.
  multifd::Result<void> close_epoch(MainWriter& main);

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
  multifd::Result<void> queue_as_bytes(multifd::BlockId block, std::uint64_t offset);
  multifd::Result<void> flush_bytes();

  const multifd::RamMap ram_;
  const std::vector<bool> fresh_;  ///< by block: memory that a destination surely starts with zeros in
  const bool by_record_;
  const bool by_list_;
  std::unique_ptr<program::AnySender> sender_;
  // Many channels feed one producer; taken once a packet, beside half a megabyte of copying and compressing.
  mutable std::mutex mutex_;
  std::vector<ZeroRun> zero_runs_;  ///< of this epoch, for the main stream
  std::uint64_t zero_records_ = 0;
  // Zero pages that travel as bytes, for one packet.
  multifd::BlockId bytes_block_{};
  std::vector<std::uint64_t> bytes_offsets_;
  multifd::PageBuffer bytes_pages_;
};

}  // namespace relay
