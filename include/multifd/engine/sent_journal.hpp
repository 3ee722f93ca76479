// SPDX-License-Identifier: MIT
//
// Which pages each channel has carried in the epochs that the receiver has not confirmed yet: what has to be sent again when
// its connection is lost. At most two epochs are open at once: the one whose pages are sent, and the one before.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <utility>

#include "multifd/memory/dirty_bitmaps.hpp"
#include "multifd/memory/ram_map.hpp"

namespace multifd::engine {

/// Threads: note() and lose() by the channel's worker, the others by the producer; a channel's entry has a mutex, which
/// nearly always is free: it is taken once a packet.
/// Cost: memory: two bits for each page and channel. note() sets a bit for each page.
class SentJournal {
 public:
  /// Throws std::bad_alloc. Params `ram`: outlives this object.
  SentJournal(const RamMap& ram, unsigned channels)
      : page_shift_(static_cast<unsigned>(std::countr_zero(ram.page_bytes()))), lost_(ram) {
    for (unsigned i = 0; i < channels; ++i) entries_.emplace_back(ram);
  }

  /// A channel is about to send these pages. Params `offsets`: multiples of the page size, inside the block (contract).
  void note(unsigned channel, std::uint64_t epoch, BlockId block, std::span<const std::uint64_t> offsets) noexcept {
    Entry& entry = entries_[channel];
    const std::lock_guard held(entry.mutex);
    Open& open = entry.open[epoch % 2];
    open.any = true;
    const std::span<std::uint64_t> words = open.pages[block];
    for (const std::uint64_t offset : offsets) {
      const std::uint64_t page = offset >> page_shift_;
      words[page / 64] |= std::uint64_t{1} << page % 64;
    }
  }

  /// A channel's connection is lost: what it carried in the open epochs may have arrived or not.
  void lose(unsigned channel) noexcept {
    Entry& entry = entries_[channel];
    const std::lock_guard held(entry.mutex);
    for (Open& open : entry.open) lose(open);
  }

  /// An epoch is over at the receiver. Params `arrived(channel)`: whether all that the channel carried in it is there; if not,
  /// it is lost.
  template <class Arrived>
  void settle(std::uint64_t epoch, Arrived&& arrived) noexcept {
    for (unsigned channel = 0; channel < entries_.size(); ++channel) {
      Entry& entry = entries_[channel];
      const std::lock_guard held(entry.mutex);
      Open& open = entry.open[epoch % 2];
      if (!arrived(channel))
        lose(open);
      else if (std::exchange(open.any, false))
        open.pages.clear();
    }
  }

  /// Adds what is lost, and forgets it. Returns how many pages that were.
  std::uint64_t take_lost(DirtyBitmaps& into) noexcept {
    const std::lock_guard held(lost_mutex_);
    if (!std::exchange(any_lost_, false)) return 0;
    const std::uint64_t pages = lost_.count();
    into.add(lost_);
    lost_.clear();
    return pages;
  }

 private:
  struct Open {
    explicit Open(const RamMap& ram) : pages(ram) {}
    DirtyBitmaps pages;
    bool any = false;
  };
  struct Entry {
    explicit Entry(const RamMap& ram) : open{Open(ram), Open(ram)} {}
    std::mutex mutex;
    std::array<Open, 2> open;  ///< by the epoch's last bit
  };

  void lose(Open& open) noexcept {
    if (!std::exchange(open.any, false)) return;
    const std::lock_guard held(lost_mutex_);
    lost_.add(open.pages);
    any_lost_ = true;
    open.pages.clear();
  }

  const unsigned page_shift_;
  std::deque<Entry> entries_;
  std::mutex lost_mutex_;  ///< of all below
  DirtyBitmaps lost_;
  bool any_lost_ = false;
};

}  // namespace multifd::engine
