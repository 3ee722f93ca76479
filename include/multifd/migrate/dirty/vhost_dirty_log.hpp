// SPDX-License-Identifier: MIT
//
// The log in which vhost devices (in the kernel, or behind vhost-user) mark what they write: memory that the VMM shares
// with them, one bit for each 4 KiB of guest-physical addresses. KVM's log has none of these writes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty/detail/kvm_slots.hpp"
#include "multifd/migrate/dirty/detail/log_pages.hpp"
#include "multifd/migrate/dirty/kvm_memory_slot.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// What vhost devices write. A model of DirtySource, for a DirtyUnion with KVM's log.
///
/// Speaking to the devices is the VMM's: VHOST_SET_LOG_BASE with this memory (or VHOST_USER_SET_LOG_BASE with its
/// descriptor) and VHOST_F_LOG_ALL before start(); both off after stop(). For the last fetch() the devices have stopped: a
/// device writes first and marks afterwards. One log may serve all devices.
///
/// Cost: fetch() is one load a word of 64 pages, and one atomic operation a word that has marks. No system calls.
/// Threads, Errors: as DirtySource; the devices mark all the time.
/// Lifetime: the log's memory stays mapped as long as the object.
class VhostDirtyLog {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  /// Words of a log for these slots: what to share with the devices, zeroed.
  static std::size_t log_words(std::span<const KvmMemorySlot> slots) noexcept {
    std::uint64_t end = 0;
    for (const KvmMemorySlot& slot : slots)
      end = std::max<std::uint64_t>(end, slot.region.guest_phys_addr + slot.region.memory_size);
    return bitmap_words((end + page - 1) / page);
  }

  /// Params: `log`: the shared memory; `slots`: all that map blocks of `ram`, for the guest-physical addresses; `unmapped`:
  ///   parts of blocks that are in no slot, which no device can reach.
  /// Errors: Errc::bad_option (the log is shorter than log_words(); slots with one number), and as KvmDirtyLog::create() of
  ///   slots that do not fit; ENOMEM.
  [[nodiscard]] static Result<VhostDirtyLog> create(std::span<std::uint64_t> log, const RamMap& ram,
                                                    std::span<const KvmMemorySlot> slots,
                                                    std::span<const KvmUnmappedRange> unmapped = {}) {
    MULTIFD_TRY_ASSIGN(auto checked, detail::KvmSlots::create(-1, ram, slots, unmapped));
    if (log.size() < log_words(slots))
      return fail(Errc::bad_option, Stage::setup, "VhostDirtyLog: words of the log", log.size(), log_words(slots));
    return VhostDirtyLog(log, std::move(checked));
  }

  [[nodiscard]] Result<void> start() noexcept {
    for (const detail::KvmSlot& slot : slots_.all()) take(slot, [](std::uint64_t, std::uint64_t) {});
    on_ = true;
    return {};
  }

  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    MULTIFD_TRY(check_fetch(slots_.ram(), block, bitmap));
    for (const detail::KvmSlot& slot : slots_.all())
      if (slot.block == block)
        take(slot, [&](std::uint64_t first, std::uint64_t end) {
          pages_.report_bytes(slot.at + first * page, slot.at + end * page, bitmap);
        });
    return {};
  }

  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    return check_rearm(slots_.ram(), block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return false; }
  [[nodiscard]] Result<void> stop() noexcept {
    on_ = false;
    return {};
  }
  std::size_t page_bytes() const noexcept { return page; }

 private:
  static constexpr std::size_t page = 4096;  // vhost's, whatever the host's is

  VhostDirtyLog(std::span<std::uint64_t> log, detail::KvmSlots slots) noexcept
      : log_(log), slots_(std::move(slots)), pages_(slots_.ram().page_bytes(), page) {}

  /// Clears the marks of a slot's pages and of no others: slots meet within a word of the log. Calls on_run(first, end) for
  /// each run of them, in pages of the slot.
  template <class OnRun>
  void take(const detail::KvmSlot& slot, OnRun&& on_run) noexcept {
    const std::uint64_t begin = slot.region.guest_phys_addr / page;
    const std::uint64_t end = begin + slot.region.memory_size / page;
    for (std::uint64_t at = begin; at < end;) {
      const std::uint64_t run = std::min(64 - at % 64, end - at);
      std::uint64_t& word = log_[at / 64];
      const std::uint64_t mine = ~std::uint64_t{0} >> (64 - run) << at % 64;
      if ((__atomic_load_n(&word, __ATOMIC_RELAXED) & mine) != 0) {
        // The other side is a device in the kernel or in another process, which marks after it has written.
        const std::uint64_t bits[1] = {(__atomic_fetch_and(&word, ~mine, __ATOMIC_ACQUIRE) & mine) >> at % 64};
        for (std::uint64_t first = detail::next_set(bits, 0, run), last = 0; first < run;
             first = detail::next_set(bits, last, run)) {
          last = detail::next_clear(bits, first, run);
          on_run(at - begin + first, at - begin + last);
        }
      }
      at += run;
    }
  }

  std::span<std::uint64_t> log_;
  detail::KvmSlots slots_;
  detail::LogPages pages_;
  bool on_ = false;
};
static_assert(check_dirty_source<VhostDirtyLog>());

}  // namespace multifd::migrate
