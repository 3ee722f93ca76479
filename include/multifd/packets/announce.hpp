// SPDX-License-Identifier: MIT
//
// This side's settings as an announcement: a sender writes it into its hellos, a receiver compares those with its own.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "multifd/format/announcement.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd::packets {

/// Makes the announcement. The order of the blocks plays no part, because packets name their block.
inline wire::Announcement announcement_of(const RamMap& ram, unsigned channels, std::uint32_t method) noexcept {
  wire::Announcement own{.channels = channels,
                         .page_bytes = ram.page_bytes(),
                         .method = method,
                         .blocks = static_cast<std::uint32_t>(ram.blocks().size()),
                         .bytes = ram.total_bytes()};
  for (const RamBlock& block : ram.blocks()) {
    std::array<std::byte, wire::idstr_bytes + 8> entry{};
    std::memcpy(entry.data(), block.idstr.data(), block.idstr.size());
    wire::store_be<std::uint64_t>(&entry[wire::idstr_bytes], block.bytes);
    own.digest += digest_of(entry);  // a sum, so that the order plays no part
  }
  return own;
}

/// Compares a peer's announcement with this side's; the parser has compared the number of channels already.
/// Errors (stage hello; detail: the peer's, expected: this side's): Errc::page_size_mismatch, wrong_compression,
///   block_list_mismatch.
[[nodiscard]] inline Result<void> compare_announcement(const wire::Announcement& peers,
                                                       const wire::Announcement& own) noexcept {
  constexpr auto stage = Stage::hello;
  if (peers.page_bytes != own.page_bytes)
    return fail(Errc::page_size_mismatch, stage, "initial packet", peers.page_bytes, own.page_bytes);
  if (peers.method != own.method) {
    Subject both("the peer: ");
    both.append(wire::method_name(peers.method)).append(", this side: ").append(wire::method_name(own.method));
    return fail(Errc::wrong_compression, stage, "initial packet", peers.method, own.method, both);
  }
  if (peers.blocks != own.blocks)
    return fail(Errc::block_list_mismatch, stage, "number of RAM blocks", peers.blocks, own.blocks);
  if (peers.bytes != own.bytes)
    return fail(Errc::block_list_mismatch, stage, "bytes of all RAM blocks", peers.bytes, own.bytes);
  if (peers.digest != own.digest)
    return fail(Errc::block_list_mismatch, stage, "names and sizes of the RAM blocks, whose number and sum agree");
  return {};
}

}  // namespace multifd::packets
