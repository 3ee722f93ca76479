// SPDX-License-Identifier: MIT
#include "multifd_pager/memory_file.hpp"

#include <fmt/format.h>
#include <unistd.h>
#include <multifd/memory/main_memory.hpp>

#include <algorithm>

#include "common/program.hpp"

namespace pager {
namespace {

using namespace multifd;
using postcopy::LazyRegion;
using postcopy::StoreBlock;
using program::Failure;

}  // namespace

MemoryFile::MemoryFile(std::span<const StoreBlock> blocks) : blocks_(blocks) {
  const MainMemory main(blocks, &StoreBlock::bytes);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (!main.holds(blocks[i]) && blocks.size() > 1) continue;
    parts_.push_back({static_cast<BlockId>(i), bytes_, blocks[i].bytes});
    bytes_ += blocks[i].bytes;
  }
}

BlockId MemoryFile::block_of(const std::string& idstr) const {
  const auto found = std::ranges::find(blocks_, idstr, &StoreBlock::idstr);
  if (found == blocks_.end()) throw Failure(fmt::format("handshake: the image has no RAM block \"{}\"", idstr));
  return static_cast<BlockId>(found - blocks_.begin());
}

std::vector<MemoryFile::Piece> MemoryFile::pieces_of(const std::string& idstr, std::uint64_t offset,
                                                     std::uint64_t bytes) const {
  const std::uint64_t size = idstr.empty() ? bytes_ : blocks_[index(block_of(idstr))].bytes;
  if (bytes == 0 || offset > size || bytes > size - offset)
    throw Failure(fmt::format("handshake: {} bytes at offset {}, where the {} has {}", bytes, offset,
                              idstr.empty() ? "memory file" : "RAM block", size));
  if (!idstr.empty()) return {{block_of(idstr), offset, bytes}};
  std::vector<Piece> pieces;
  for (const Part& part : parts_) {
    const std::uint64_t first = std::max(offset, part.begin);
    const std::uint64_t last = std::min(offset + bytes, part.begin + part.bytes);
    if (first < last) pieces.push_back({part.block, first - part.begin, last - first});
  }
  return pieces;
}

std::vector<LazyRegion> MemoryFile::regions_of(const Region& region) const {
  const auto host_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  std::vector<LazyRegion> regions;
  std::uint64_t done = 0;
  for (const Piece& piece : pieces_of(region.idstr, region.offset, region.bytes)) {
    regions.push_back({.address = region.address + done,
                       .bytes = piece.bytes,
                       .block = piece.block,
                       .offset = piece.offset,
                       .unit_bytes = region.unit_bytes == 0 ? host_page : region.unit_bytes});
    done += piece.bytes;
  }
  return regions;
}

void MemoryFile::drop(const Dropped& dropped, std::uint64_t page_bytes,
                      std::vector<std::vector<std::uint64_t>>& missing) const {
  if (dropped.offset % page_bytes != 0 || dropped.bytes % page_bytes != 0)
    throw Failure(
        fmt::format("handshake: dropped: {} bytes at offset {} are no whole pages", dropped.bytes, dropped.offset));
  missing.resize(blocks_.size());
  for (const Piece& piece : pieces_of(dropped.idstr, dropped.offset, dropped.bytes)) {
    auto& words = missing[index(piece.block)];
    if (words.empty()) words.assign(blocks_[index(piece.block)].bytes / page_bytes / 64 + 1, ~std::uint64_t{0});
    for (std::uint64_t page = piece.offset / page_bytes; page < (piece.offset + piece.bytes) / page_bytes; ++page)
      words[page / 64] &= ~(std::uint64_t{1} << page % 64);
  }
}

}  // namespace pager
