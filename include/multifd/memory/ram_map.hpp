// SPDX-License-Identifier: MIT
//
// The memory map of a migration: RAM blocks by idstr, in pages of one size. resolve() is the only place in the
// library where an offset that a peer sent becomes an address.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/config.hpp"
#include "multifd/limits.hpp"
#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// RAM blocks of one VM. A plain value: Sender and Receiver take a copy at open(), so a map may be changed or
/// destroyed afterwards; the memory it names may not.
///
/// Threads: const methods from any thread.
class RamMap {
 public:
  /// `page_bytes`: the guest's page size on the wire (target page, not huge page), a power of two from 1024 to 65536.
  explicit RamMap(std::size_t page_bytes = 4096) noexcept : page_bytes_(page_bytes) {}

  /// Registers a block.
  ///
  /// Params: `idstr`: 1 to 255 bytes, no NUL; `host`: a whole number of pages, at least one.
  /// Errors: Errc::bad_page_size, bad_block_idstr, bad_block_size, block_without_memory (`host` is null),
  ///   duplicate_block; ENOMEM. The map is unchanged then.
  /// Threads: one, and no other call meanwhile. Cost: linear in the blocks; copies the name, not the memory.
  /// Wire: the idstr is that of format/packets.md section 3.1 and format/main_stream.md section 9.5.
  [[nodiscard]] Result<BlockId> add(std::string_view idstr, std::span<std::byte> host,
                                    Access access = Access::read_write) {
    return insert(idstr, host, host.size(), access);
  }

  /// Registers a block that only a Sender may use. Params, Errors: as add().
  [[nodiscard]] Result<BlockId> add_read_only(std::string_view idstr, std::span<const std::byte> host) {
    return add(idstr, std::span(const_cast<std::byte*>(host.data()), host.size()), Access::read_only);
  }

  /// Registers a block whose memory is not in this process: for a Receiver with a PacketHook, a Sender of copies.
  ///
  /// Params: `bytes`: its size, a whole number of pages. Errors: as add().
  [[nodiscard]] Result<BlockId> add_elsewhere(std::string_view idstr, std::uint64_t bytes) {
    return insert(idstr, {}, bytes, Access::none);
  }

  /// Finds a block by its name. Errors: Errc::unknown_block (subject: the name). Threads: any. Cost: linear in the
  /// blocks.
  [[nodiscard]] Result<BlockId> find(std::string_view idstr) const noexcept {
    // There are few blocks, and packets of one block come in a row: a linear search beats a map.
    for (std::size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].idstr == idstr) return BlockId{static_cast<std::uint32_t>(i)};
    return fail(Errc::unknown_block, Stage::parse, "ramblock", 0, 0, idstr);
  }

  /// Checks that an offset, from a caller or a peer, is that of one of the block's pages.
  ///
  /// Params: `id`: from this map (contract).
  /// Errors: Errc::offset_misaligned, offset_past_block (detail: the offset; expected: page size, block size).
  /// Threads: any. Wait-free. Wire: format/hardening.md section 16, row 6.
  [[nodiscard]] Result<void> check(BlockId id, std::uint64_t offset) const noexcept {
    const RamBlock& there = block(id);
    if (offset % page_bytes_ != 0)
      return fail(Errc::offset_misaligned, Stage::parse, "", offset, page_bytes_, there.idstr);
    // The block holds at least one page, so the subtraction cannot wrap.
    if (offset > there.bytes - page_bytes_)
      return fail(Errc::offset_past_block, Stage::parse, "", offset, there.bytes, there.idstr);
    return {};
  }

  /// Turns the offset of a page, from a caller or a peer, into the bytes of that page and the `pages` - 1 pages behind
  /// it.
  ///
  /// Params: `id`: from this map, with memory in this process (contract). `pages`: at least one (contract).
  /// Errors, Threads: as check(), for the first page that is not in the block.
  [[nodiscard]] Result<std::span<std::byte>> resolve(BlockId id, std::uint64_t offset,
                                                     std::size_t pages = 1) const noexcept {
    MULTIFD_ASSERT(block(id).access != Access::none && pages > 0);
    if (auto checked = check(id, offset); !checked) return std::unexpected(checked.error());
    const std::uint64_t there = (block(id).bytes - offset) / page_bytes_;
    if (pages > there) return std::unexpected(check(id, offset + there * page_bytes_).error());
    return block(id).host.subspan(offset, pages * page_bytes_);
  }

  const RamBlock& block(BlockId id) const noexcept {
    MULTIFD_ASSERT(index(id) < blocks_.size());
    return blocks_[index(id)];
  }
  std::span<const RamBlock> blocks() const noexcept { return blocks_; }
  bool contains(BlockId id) const noexcept { return index(id) < blocks_.size(); }
  std::size_t page_bytes() const noexcept { return page_bytes_; }
  std::size_t pages(BlockId id) const noexcept { return block(id).bytes / page_bytes_; }
  /// Pages of a full batch, and of a full packet, at this page size.
  std::size_t batch_pages() const noexcept {
    MULTIFD_ASSERT(!blocks_.empty());  // only add() has checked the page size
    return batch_bytes / page_bytes_;
  }
  std::uint64_t total_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const RamBlock& each : blocks_) sum += each.bytes;
    return sum;
  }

 private:
  [[nodiscard]] Result<BlockId> insert(std::string_view idstr, std::span<std::byte> host, std::uint64_t bytes,
                                       Access access) {
    constexpr auto stage = Stage::setup;
    if (!valid_page_bytes(page_bytes_)) return fail(Errc::bad_page_size, stage, "RamMap::add", page_bytes_);
    if (idstr.empty() || idstr.size() > max_idstr_length || idstr.contains('\0'))
      return fail(Errc::bad_block_idstr, stage, "RamMap::add", idstr.size());
    if (bytes == 0 || bytes % page_bytes_ != 0)
      return fail(Errc::bad_block_size, stage, "RamMap::add", bytes, page_bytes_, idstr);
    if (access != Access::none && host.data() == nullptr)
      return fail(Errc::block_without_memory, stage, "RamMap::add: null pointer", 0, 0, idstr);
    if (find(idstr)) return fail(Errc::duplicate_block, stage, "RamMap::add", 0, 0, idstr);
    return catch_bad_alloc(stage, "RamMap::add", [&]() -> Result<BlockId> {
      blocks_.push_back({.idstr = std::string(idstr), .host = host, .bytes = bytes, .access = access});
      return BlockId{static_cast<std::uint32_t>(blocks_.size() - 1)};
    });
  }

  std::size_t page_bytes_;
  std::vector<RamBlock> blocks_;
};

}  // namespace multifd
