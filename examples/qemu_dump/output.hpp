// SPDX-License-Identifier: MIT
//
// What a dump is written to, in one of the formats: the steps that all of them have, in the order of the calls.
#pragma once

#include <multifd/qemu/main_stream.hpp>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

#include "common/stacks.hpp"

namespace dump {

/// A failure, or a second signal, before keep() removes all files.
///
/// `receiver` of all calls: who takes the channels; null where there are none.
///
/// Threads: one; progress() from any. Errors: every call throws program::Failure.
class Output {
 public:
  Output() = default;
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  virtual ~Output() = default;

  /// What the user named.
  virtual const std::string& path() const noexcept = 0;

  /// The source has announced its blocks: adds all of them to `ram`, in their order, with memory or without.
  virtual void open(const multifd::qemu::MainStreamParser& stream, multifd::RamMap& ram) = 0;
  /// Takes the packets' pages. Empty: they go to the memory of the map. Threads of the hook: all channels.
  virtual multifd::PacketHook packets() { return {}; }
  /// A page of the main stream; no bytes: a zero page.
  virtual multifd::Result<void> page(program::AnyReceiver* receiver, multifd::BlockId block, std::uint64_t offset,
                                     std::span<const std::byte> bytes) = 0;
  /// A page of the main stream as it is now, for a source that says what changes of it. Only without channels.
  virtual multifd::Result<void> read_page(multifd::BlockId block, std::uint64_t offset, std::span<std::byte> to) = 0;
  /// How many pages of a block have come, counting none twice where that is known.
  virtual std::uint64_t received_pages(const program::AnyReceiver* receiver, multifd::BlockId block) const = 0;
  /// A piece of what stands behind RAM: the devices' sections, end mark, VM description.
  virtual void devices(std::span<const std::byte> bytes) = 0;

  // Behind the last page and the last piece:

  /// Brings the files into their last shape. Returns what the manifest says of each block.
  virtual nlohmann::json finish(const program::AnyReceiver* receiver) = 0;
  /// Writes the manifest, where the format has one, and everything to the disk.
  virtual void write(const nlohmann::json& manifest) = 0;
  /// Gives all files their names. Failure when a name is taken: the files stay then, because they are whole.
  virtual void keep() = 0;
  /// Behind the answer to the source: what may take its time. A failure deletes nothing that keep() has kept.
  virtual void convert() {}

  struct Progress {
    std::size_t files;
    std::size_t looked_through;  ///< by finish()
    std::size_t synced;          ///< by write()
  };
  /// Behind open().
  virtual Progress progress() const noexcept = 0;
};

}  // namespace dump
