// SPDX-License-Identifier: MIT
//
// The unchanged-page filter: a page that was written, and yet is as it was last sent, is not sent again.
#pragma once

#include <sys/mman.h>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "multifd/any.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/page_buffer.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd::migrate::detail {

/// Remembers the XXH3-128 of each page as it was last sent.
///
/// A running guest may change a page between the moment at which it is hashed and that at which it is sent, and change it
/// back later; then the hash would be of bytes that never went out. So a page is copied, the copy is hashed, and the copy
/// is sent. Only pages that are sent for a second time are: a migration's first round costs nothing.
///
/// Threads: one. Cost: 16 bytes a page of the map, which become resident with the pages that are sent again; a copy and a
/// hash for each of these.
class UnchangedPages {
 public:
  /// Errors: ENOMEM.
  [[nodiscard]] static Result<UnchangedPages> create(const RamMap& ram) {
    UnchangedPages made(ram);
    std::uint64_t pages = 0;
    for (std::uint32_t b = 0; b < ram.blocks().size(); ++b) {
      made.first_.push_back(pages);
      pages += ram.pages(BlockId{b});
    }
    MULTIFD_TRY(made.hashes_.map(pages));
    MULTIFD_TRY_ASSIGN(made.buffer_, PageBuffer::create());
    return made;
  }

  /// Queues copies of those dirty pages of a chunk that are not as they were last sent. The guest may run.
  /// Errors: those of queue_copies().
  [[nodiscard]] Result<void> queue(AnySender& sender, BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> chunk, const AnySender::OnZero& on_zero) {
    const std::byte* const host = ram_->block(block).host.data();
    const std::size_t page_bytes = ram_->page_bytes();
    std::array<std::uint64_t, 64> room;
    const auto push_out = [&]() -> Result<void> {
      if (offsets_.empty()) return {};
      MULTIFD_TRY(sender.queue_copies(block, offsets_, offsets_.size(), buffer_, on_zero));
      offsets_.clear();
      return {};
    };
    for (std::size_t word = 0; word < chunk.size(); ++word) {
      if (chunk[word] == 0) continue;
      for (const std::uint64_t offset :
           dirty_offsets(chunk[word], (first_page + 64 * word) * page_bytes, page_bytes, room)) {
        std::byte* const copy = buffer_.data() + offsets_.size() * page_bytes;
        std::memcpy(copy, host + offset, page_bytes);
        if (is_as_sent(block, offset / page_bytes, copy)) continue;
        offsets_.push_back(offset);
        if (offsets_.size() < ram_->batch_pages()) continue;
        MULTIFD_TRY(push_out());
      }
    }
    return push_out();
  }

  /// Takes out of a block's dirty bitmap what is as it was last sent. For a guest that stands still: the rest is to be sent
  /// from its memory.
  void remove_from(BlockId block, std::span<std::uint64_t> dirty) noexcept {
    const std::byte* const host = ram_->block(block).host.data();
    for (std::size_t word = 0; word < dirty.size(); ++word)
      for (std::uint64_t bits = dirty[word]; bits != 0; bits &= bits - 1) {
        const unsigned bit = static_cast<unsigned>(std::countr_zero(bits));
        const std::uint64_t page = 64 * word + bit;
        if (is_as_sent(block, page, host + page * ram_->page_bytes())) dirty[word] &= ~(std::uint64_t{1} << bit);
      }
  }

  /// Pages that were not sent for it.
  std::uint64_t skipped() const noexcept { return skipped_; }

 private:
  /// Anonymous memory that is zero until it is written.
  class Hashes {
   public:
    Hashes() = default;
    Hashes(Hashes&& other) noexcept : hashes_(std::exchange(other.hashes_, {})) {}
    Hashes& operator=(Hashes&& other) noexcept {
      std::swap(hashes_, other.hashes_);
      return *this;
    }
    ~Hashes() {
      if (!hashes_.empty()) ::munmap(hashes_.data(), hashes_.size_bytes());
    }
    [[nodiscard]] Result<void> map(std::uint64_t pages) noexcept {
      if (pages == 0) return {};
      void* const memory = ::mmap(nullptr, pages * sizeof(Digest128), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return fail_errno(Stage::setup, "allocate hashes of pages");
      hashes_ = {static_cast<Digest128*>(memory), pages};
      return {};
    }
    Digest128& operator[](std::uint64_t page) noexcept { return hashes_[page]; }

   private:
    std::span<Digest128> hashes_;
  };

  explicit UnchangedPages(const RamMap& ram) : ram_(&ram) { offsets_.reserve(ram.batch_pages()); }

  /// If not, the page is taken for sent. A page that was never sent so has a hash of zeros: that a page has it is as likely as
  /// that two have the same.
  bool is_as_sent(BlockId block, std::uint64_t page, const std::byte* bytes) noexcept {
    Digest128& last = hashes_[first_[index(block)] + page];
    const Digest128 now = digest128_of({bytes, ram_->page_bytes()});
    if (now == last) {
      ++skipped_;
      return true;
    }
    last = now;
    return false;
  }

  const RamMap* ram_;
  std::vector<std::uint64_t> first_;  ///< the number of each block's first page in `hashes_`
  Hashes hashes_;
  PageBuffer buffer_;
  std::vector<std::uint64_t> offsets_;  ///< of the copies in `buffer_`
  std::uint64_t skipped_ = 0;
};

}  // namespace multifd::migrate::detail
