// SPDX-License-Identifier: MIT
//
// A source's part of format/extension.md section 19.12: the destination's digests of its older copy come in the order of the
// pages, this side's are computed beside them, and what is equal need not be sent.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/format/base_digests.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/detail/digest_crew.hpp"
#include "multifd/qemu/block_list.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd::migrate::detail {

/// The digest of a page of zeros. Errors: the digest's.
[[nodiscard]] inline Result<Digest128> digest_of_zero_page(KeyedDigest& digest, std::size_t page_bytes) {
  const std::vector<std::byte> zeros(page_bytes);
  return digest.of(zeros);
}

/// Threads: the migration's. For one migration.
class BaseComparison {
 public:
  /// Params: all outlive this object. `blocks`: of the map, as START has them. `zeros`: pages that are zero, and are not read.
  ///   `taken`: counts the pages whose digests have come.
  BaseComparison(const RamMap& ram, const std::vector<qemu::BlockInfo>& blocks, const DirtyBitmaps& zeros,
                 const KeyedDigests& digests, std::atomic<std::uint64_t>& taken)
      : ram_(ram), zeros_(zeros), digests_(digests), equal_(ram), taken_(taken) {
    for (const qemu::BlockInfo& block : blocks)
      if (const auto id = ram.find(block.idstr)) blocks_.push_back(*id);
  }
  BaseComparison(const BaseComparison&) = delete;
  BaseComparison& operator=(const BaseComparison&) = delete;

  /// Takes the destination's next message. Errors: Errc::bad_extension_message, unexpected_extension_message: not the next
  ///   pages, or more than there are; those of the digests, and of threads.
  [[nodiscard]] Result<void> take(const wire::ExtensionMessage& message) {
    bytes_ += message.body.size() + 6;
    if (message.kind == wire::ExtensionKind::base_key) return begin(wire::base_key_of(message));
    MULTIFD_TRY_ASSIGN(const wire::BasePages pages, wire::parse_base_pages(message));
    MULTIFD_TRY(check(pages, message));
    for (std::uint64_t done = 0; done < pages.pages;) {
      if (piece_ == nullptr) {
        MULTIFD_TRY(next_piece());
      }
      const std::uint64_t now = std::min(pages.pages - done, piece_->pages - piece_->theirs.size());
      if (pages.digests.empty()) piece_->theirs.resize(piece_->theirs.size() + now, of_zeros_);
      for (std::uint64_t i = 0; i < now && !pages.digests.empty(); ++i)
        piece_->theirs.push_back(pages.digest(done + i));
      done += now;
      page_ += now;
      if (piece_->theirs.size() < piece_->pages) continue;
      crew_->give();
      piece_ = nullptr;
      if (page_ < ram_.pages(blocks_[block_])) continue;
      ++block_;
      page_ = 0;
    }
    taken_.fetch_add(pages.pages, std::memory_order_relaxed);
    return {};
  }

  /// Whether all pages have been taken.
  bool whole() const noexcept { return crew_ != nullptr && block_ == blocks_.size(); }
  /// Pages that have been taken.
  std::uint64_t taken() const noexcept { return taken_.load(std::memory_order_relaxed); }
  /// Bytes of the messages that have been taken.
  std::uint64_t bytes() const noexcept { return bytes_; }

  /// Once whole(): a bit for each page that is equal at both ends. Errors: those of the digests.
  [[nodiscard]] Result<const DirtyBitmaps*> finish() {
    for (std::size_t i = 0; i < DigestCrew<Piece>::pieces; ++i) {
      MULTIFD_TRY(crew_->next(i));
    }
    return &equal_;
  }

 private:
  struct Piece {
    std::span<const std::byte> memory;  ///< of all pages of the piece
    std::size_t page_bytes = 0;
    std::uint64_t pages = 0;
    std::vector<Digest128> theirs;  ///< one for each page, once it is given
    Digest128 of_zeros;
    std::span<const std::uint64_t> zeros;  ///< from the piece's first page on
    std::span<std::uint64_t> equal;

    [[nodiscard]] Result<void> run(KeyedDigest& digest) noexcept {
      for (std::uint64_t i = 0; i < pages; ++i) {
        MULTIFD_TRY_ASSIGN(const bool is_equal, compare(digest, i));
        if (is_equal) equal[i / 64] |= std::uint64_t{1} << i % 64;
      }
      return {};
    }
    [[nodiscard]] Result<bool> compare(KeyedDigest& digest, std::uint64_t page) const noexcept {
      const bool zero_there = theirs[page] == of_zeros;
      if (has_page(zeros, page)) return zero_there;
      const auto bytes = memory.subspan(page * page_bytes, page_bytes);
      if (zero_there) return buffer_is_zero(bytes.data(), bytes.size());
      MULTIFD_TRY_ASSIGN(const Digest128 own, digest.of(bytes));
      return own == theirs[page];
    }
  };

  [[nodiscard]] Result<void> begin(const DigestKey& key) {
    MULTIFD_TRY_ASSIGN(const auto digest, digests_(key));
    MULTIFD_TRY_ASSIGN(of_zeros_, digest_of_zero_page(*digest, ram_.page_bytes()));
    MULTIFD_TRY_ASSIGN(crew_, DigestCrew<Piece>::create(digests_, key));
    return {};
  }

  /// Pages come one after the other: so none comes twice, and none is left out.
  [[nodiscard]] Result<void> check(const wire::BasePages& pages, const wire::ExtensionMessage& message) const {
    const auto name = wire::extension_name(message.kind);
    if (crew_ == nullptr || block_ == blocks_.size())
      return fail(Errc::unexpected_extension_message, Stage::parse, "pages of the older copy behind the last one",
                  pages.block, 0, name);
    if (pages.block != block_)
      return fail(Errc::bad_extension_message, Stage::parse, "older copy: block", pages.block, block_, name);
    if (pages.offset != page_ * ram_.page_bytes())
      return fail(Errc::bad_extension_message, Stage::parse, "older copy: offset", pages.offset,
                  page_ * ram_.page_bytes(), name);
    const std::uint64_t left = ram_.pages(blocks_[block_]) - page_;
    if (pages.pages > left)
      return fail(Errc::bad_extension_message, Stage::parse, "older copy: pages", pages.pages, left, name);
    return {};
  }

  [[nodiscard]] Result<void> next_piece() {
    MULTIFD_TRY_ASSIGN(piece_, crew_->next());
    const BlockId id = blocks_[block_];
    const std::size_t page_bytes = ram_.page_bytes();
    piece_->page_bytes = page_bytes;
    piece_->pages = std::min(ram_.pages(id) - page_, pages_in_piece(page_bytes));
    piece_->memory = ram_.block(id).host.subspan(page_ * page_bytes, piece_->pages * page_bytes);
    piece_->theirs.clear();
    piece_->of_zeros = of_zeros_;
    piece_->zeros = zeros_[id].subspan(page_ / 64);
    piece_->equal = equal_[id].subspan(page_ / 64);
    return {};
  }

  const RamMap& ram_;
  std::vector<BlockId> blocks_;  ///< in START's order
  const DirtyBitmaps& zeros_;
  const KeyedDigests& digests_;
  DirtyBitmaps equal_;
  Digest128 of_zeros_;
  std::size_t block_ = 0;   ///< of the page that comes next
  std::uint64_t page_ = 0;  ///< that page's number in it
  std::uint64_t bytes_ = 0;
  std::atomic<std::uint64_t>& taken_;
  Piece* piece_ = nullptr;  ///< that is being filled
  std::unique_ptr<DigestCrew<Piece>> crew_;
};

/// Asks the destination, and takes all that it says. Params `writer`: a MainStreamWriter, between sections. `path`: a
/// ReturnPath. `timeout`: for each message. Errors: those of all four.
template <class Writer, class Path>
[[nodiscard]] Result<void> ask_for_base(Writer& writer, Path& path, BaseComparison& comparison,
                                        std::chrono::milliseconds timeout, const Interrupt& interrupt) {
  const auto ask = [&]() -> Result<void> {
    MULTIFD_TRY(writer.base_wanted());
    MULTIFD_TRY(writer.push_out());
    while (!comparison.whole()) {
      MULTIFD_TRY(path.await_base(timeout, &interrupt));
    }
    return {};
  };
  path.on_base = [&](const wire::ExtensionMessage& message) { return comparison.take(message); };
  const auto done = ask();
  path.on_base = {};
  // A side that gives up still wants to hear why, behind what is under way.
  if (!done) path.on_base = [](const wire::ExtensionMessage&) -> Result<void> { return {}; };
  return done;
}

}  // namespace multifd::migrate::detail
