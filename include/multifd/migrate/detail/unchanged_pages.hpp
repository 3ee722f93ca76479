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
#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/page_buffer.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd::migrate::detail {

/// Remembers the XXH3-128 of each page as it was last sent.
///
/// A running guest may change a page between the moment at which it is hashed and that at which it is sent, and change it
/// back later; then the hash would be of bytes that never went out. So a page is copied, the copy is hashed, and the copy
/// is sent. That takes a third of what sending takes on a loopback. Where sending is not held back by a cap, copies slow it
/// down, and so only every eighth group of 64 pages is looked at until half of these are unchanged.
///
/// Threads: one. Cost: 16 bytes a page of the map, which become resident with the pages that are looked at.
class UnchangedPages {
 public:
  /// Params `capped`: copies do not slow down what is sent. Errors: ENOMEM.
  [[nodiscard]] static Result<UnchangedPages> create(const RamMap& ram, bool capped) {
    UnchangedPages made(ram, capped);
    std::uint64_t words = 0;
    for (std::uint32_t b = 0; b < ram.blocks().size(); ++b) {
      made.first_word_.push_back(words);
      words += bitmap_words(ram.pages(BlockId{b}));
    }
    made.hashed_.resize(words);
    MULTIFD_TRY(made.hashes_.map(words * 64));
    MULTIFD_TRY_ASSIGN(made.buffer_, PageBuffer::create());
    return made;
  }

  /// Queues those dirty pages of a chunk that are not as they were last sent. The guest may run. Params `first_page`: a
  /// multiple of 64. Errors: those of queue_copies() and queue_dirty().
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
    unlooked_.assign(chunk.begin(), chunk.end());
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      if (chunk[i] == 0) continue;
      const std::uint64_t word = first_word_[index(block)] + first_page / 64 + i;
      if (!all_ && !is_sample(word)) {
        forget(word);
        continue;
      }
      unlooked_[i] = 0;
      for (const std::uint64_t offset : dirty_offsets(chunk[i], (first_page + 64 * i) * page_bytes, page_bytes, room)) {
        std::byte* const copy = buffer_.data() + offsets_.size() * page_bytes;
        std::memcpy(copy, host + offset, page_bytes);
        if (is_as_sent(word, offset / page_bytes % 64, copy)) continue;
        offsets_.push_back(offset);
        if (offsets_.size() < ram_->batch_pages()) continue;
        MULTIFD_TRY(push_out());
      }
      hashed_[word] = true;
    }
    MULTIFD_TRY(push_out());
    if (all_) return {};
    MULTIFD_TRY(sender.queue_dirty(block, unlooked_, first_page, on_zero));
    return {};
  }

  /// A block's dirty pages without those that are as they were last sent; valid until the next call. For a guest that stands
  /// still: they are to be sent from its memory.
  std::span<const std::uint64_t> changed(BlockId block, std::span<const std::uint64_t> dirty) {
    unlooked_.assign(dirty.begin(), dirty.end());
    const std::byte* const host = ram_->block(block).host.data();
    for (std::size_t i = 0; i < dirty.size(); ++i) {
      const std::uint64_t word = first_word_[index(block)] + i;
      if (!hashed_[word]) continue;
      for (std::uint64_t bits = dirty[i]; bits != 0; bits &= bits - 1) {
        const unsigned bit = static_cast<unsigned>(std::countr_zero(bits));
        if (is_as_sent(word, bit, host + (64 * i + bit) * ram_->page_bytes()))
          unlooked_[i] &= ~(std::uint64_t{1} << bit);
      }
    }
    return unlooked_;
  }

  /// For pages that were sent without this object, or may not have arrived: at least these are not known any more.
  void forget(const DirtyBitmaps& pages) noexcept {
    for (std::uint32_t b = 0; b < pages.blocks(); ++b) {
      const std::span<const std::uint64_t> words = pages[BlockId{b}];
      for (std::size_t w = 0; w < words.size(); ++w)
        if (words[w] != 0) forget(first_word_[b] + w);
    }
  }

  /// Decides, behind a round, whether all pages are looked at in the next one.
  void round_ended() noexcept {
    if (!capped_ && compared_ > 0) all_ = 2 * unchanged_ >= compared_;
    compared_ = 0;
    unchanged_ = 0;
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

  UnchangedPages(const RamMap& ram, bool capped) : ram_(&ram), capped_(capped), all_(capped) {
    offsets_.reserve(ram.batch_pages());
  }

  static bool is_sample(std::uint64_t word) noexcept {
    return (word * 0x9e3779b97f4a7c15 >> 61) == 0;  // spread, because a working set may have a stride
  }

  /// Its pages are sent, and nobody knows as what.
  void forget(std::uint64_t word) noexcept {
    if (!hashed_[word]) return;
    for (unsigned i = 0; i < 64; ++i) hashes_[64 * word + i] = {};
    hashed_[word] = false;
  }

  /// If not, the page is taken for sent. A page that was never sent so has a hash of zeros: that a page has it is as likely as
  /// that two have the same.
  bool is_as_sent(std::uint64_t word, std::uint64_t bit, const std::byte* bytes) noexcept {
    Digest128& last = hashes_[64 * word + bit];
    const Digest128 now = digest128_of({bytes, ram_->page_bytes()});
    compared_ += last != Digest128{};
    if (now == last) {
      ++unchanged_;
      ++skipped_;
      return true;
    }
    last = now;
    return false;
  }

  const RamMap* ram_;
  bool capped_;
  bool all_;                               ///< are looked at in this round; else the samples
  std::vector<std::uint64_t> first_word_;  ///< of each block, among those of all blocks' bitmaps
  std::vector<bool> hashed_;               ///< words of which a page has a hash
  Hashes hashes_;                          ///< 64 for each word
  PageBuffer buffer_;
  std::vector<std::uint64_t> offsets_;   ///< of the copies in `buffer_`
  std::vector<std::uint64_t> unlooked_;  ///< pages of a bitmap that go out from where they are
  std::uint64_t compared_ = 0;           ///< in this round, pages that had a hash
  std::uint64_t unchanged_ = 0;          ///< of these
  std::uint64_t skipped_ = 0;
};

}  // namespace multifd::migrate::detail
