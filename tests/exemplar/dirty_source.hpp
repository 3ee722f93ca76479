// SPDX-License-Identifier: MIT
//
// The exemplar of a DirtySource: an emulator that sees each store of its guest itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace exemplar {

/// The emulator calls stored() behind each store. A lock makes taking a mark and clearing it one step.
class EmulatorLog {
 public:
  static constexpr auto fetches = multifd::migrate::DirtyFetch::complete;

  explicit EmulatorLog(const multifd::RamMap& ram) : ram_(ram), dirty_(ram.blocks().size()) {}

  void stored(multifd::BlockId block, std::uint64_t offset) {
    const std::scoped_lock lock(mutex_);
    if (!on_) return;
    const std::uint64_t page = offset / ram_.page_bytes();
    dirty_[index(block)][page / 64] |= std::uint64_t{1} << page % 64;
  }

  multifd::Result<void> start() noexcept {
    const std::scoped_lock lock(mutex_);
    for (std::uint32_t id = 0; id < dirty_.size(); ++id)
      dirty_[id].assign(multifd::bitmap_words(ram_.pages(multifd::BlockId{id})), 0);
    on_ = true;
    return {};
  }
  multifd::Result<void> fetch(multifd::BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    const std::scoped_lock lock(mutex_);
    MULTIFD_TRY(multifd::migrate::check_on(on_));
    MULTIFD_TRY(multifd::migrate::check_fetch(ram_, block, bitmap));
    for (std::size_t i = 0; i < dirty_[index(block)].size(); ++i)
      bitmap[i] |= std::exchange(dirty_[index(block)][i], 0);
    return {};
  }
  multifd::Result<void> rearm(multifd::BlockId block, std::uint64_t first_page,
                              std::span<const std::uint64_t> bitmap) noexcept {
    const std::scoped_lock lock(mutex_);
    MULTIFD_TRY(multifd::migrate::check_on(on_));
    return multifd::migrate::check_rearm(ram_, block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return false; }
  multifd::Result<void> stop() noexcept {
    const std::scoped_lock lock(mutex_);
    on_ = false;
    return {};
  }
  std::size_t page_bytes() const noexcept { return ram_.page_bytes(); }

 private:
  multifd::RamMap ram_;
  std::mutex mutex_;
  std::vector<std::vector<std::uint64_t>> dirty_;  // of each block
  bool on_ = false;
};
static_assert(multifd::migrate::check_dirty_source<EmulatorLog>());

}  // namespace exemplar
