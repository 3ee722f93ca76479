// SPDX-License-Identifier: MIT
//
// KVM's dirty log: a bitmap for each memory slot, read by KVM_GET_DIRTY_LOG, and cleared by the same call or, with manual
// protect (Linux 5.1), by KVM_CLEAR_DIRTY_LOG, which is cheaper for the guest:
//
//   at_fetch    KVM write-protects all of memory at start(), and at fetch() all that was dirty, with its lock held
//   at_rearm    nothing at start(); each chunk right before it is sent, so fewer pages come twice
#pragma once

#include <linux/kvm.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty/detail/kvm_slots.hpp"
#include "multifd/migrate/dirty/detail/log_pages.hpp"
#include "multifd/migrate/dirty/kvm_memory_slot.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// When pages that were dirty are watched again.
enum class WriteProtect : std::uint8_t {
  best,      ///< at_rearm where KVM can, else at_fetch
  at_fetch,  ///< by fetch()
  at_rearm,  ///< by rearm()
};

/// Settings of KvmDirtyLog::create().
struct KvmDirtyLogOptions {
  /// Default: best. `at_rearm` fails where KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. The setting is the VM's from
  /// start() to stop(): a VMM that reads the dirty log of a slot of its own meanwhile (a display's) gets pages again until
  /// it clears them itself, and sets `at_fetch` if it cannot.
  WriteProtect write_protect = WriteProtect::best;
  /// Parts of blocks that are in no slot. Default: none, and every byte of every block has to be in a slot.
  std::span<const KvmUnmappedRange> unmapped{};
};

/// The dirty log of a VM's memory slots. A model of DirtySource.
///
/// Not for a VM whose dirty ring is enabled (KvmDirtyRing). KVM's log has what vCPUs write and what KVM itself writes for
/// them, not what the VMM or a device writes: see DirtyPages, VhostDirtyLog and DirtyFromHooks.
///
/// Cost: fetch() is one system call a slot, which copies one bit a page and, with at_fetch, write-protects under KVM's MMU
///   lock what was dirty; rearm() is one system call a slot that the chunk has dirty pages of. start() with at_fetch
///   write-protects all memory. Each first write to a page that is watched costs the guest an exit, and splits a huge page.
///   The object has one bit for each page of the largest slot.
/// Threads, Errors: as DirtySource.
/// Lifetime: `vm_fd` is the caller's and stays open until the destructor, which stops.
class KvmDirtyLog {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  /// Params: `vm_fd`: from KVM_CREATE_VM; `slots`: all that map blocks of `ram`.
  /// Errors: Errc::bad_range (a slot that is not inside its block or not made of whole pages; a part of a block that is in
  ///   no slot and no KvmUnmappedRange), bad_option (two slots of one number), block_without_memory, not_supported
  ///   (at_rearm); errno of KVM_CHECK_EXTENSION; ENOMEM.
  [[nodiscard]] static Result<KvmDirtyLog> create(int vm_fd, const RamMap& ram, std::span<const KvmMemorySlot> slots,
                                                  const KvmDirtyLogOptions& options = {}) {
    MULTIFD_TRY_ASSIGN(auto checked, detail::KvmSlots::create(vm_fd, ram, slots, options.unmapped));
    MULTIFD_TRY_ASSIGN(const unsigned offered, detail::kvm_capability(vm_fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    if (options.write_protect == WriteProtect::at_rearm && offered == 0)
      return fail(Errc::not_supported, Stage::setup, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.1)");
    const unsigned wanted = options.write_protect == WriteProtect::at_fetch ? 0 : offered & manual_flags;
    return catch_bad_alloc(Stage::setup, "KvmDirtyLog", [&]() -> Result<KvmDirtyLog> {
      std::uint64_t largest = 0;
      for (const detail::KvmSlot& slot : checked.all()) largest = std::max(largest, slot.pages);
      return KvmDirtyLog(std::make_unique<State>(std::move(checked), offered, wanted,
                                                 std::vector<std::uint64_t>(bitmap_words(largest))));
    });
  }
  KvmDirtyLog(KvmDirtyLog&&) noexcept = default;
  KvmDirtyLog& operator=(KvmDirtyLog&&) = delete;
  ~KvmDirtyLog() { static_cast<void>(stop()); }

  [[nodiscard]] Result<void> start() noexcept {
    MULTIFD_TRY(stop());
    State& s = *state_;
    // Also to switch off what the VMM may have left on: KVM would not watch pages again in fetch().
    if (s.offered != 0) {
      MULTIFD_TRY(detail::set_manual_protect(s.slots.vm_fd(), s.manual));
    }
    if (auto on = s.slots.log_on(); !on) {
      static_cast<void>(s.plain_again());
      return on;
    }
    s.on = true;
    if (s.manual != 0) return {};
    // A slot whose log was on already has old marks.
    for (const detail::KvmSlot& slot : s.slots.all())
      if (auto read = s.read_log(slot); !read) {
        static_cast<void>(stop());
        return read;
      }
    return {};
  }

  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(state_->on));
    const detail::KvmSlots& slots = state_->slots;
    MULTIFD_TRY(check_fetch(slots.ram(), block, bitmap));
    for (const detail::KvmSlot& slot : slots.all()) {
      if (slot.block != block) continue;
      MULTIFD_TRY(state_->read_log(slot));
      slots.log_pages().report(state_->words, slot.pages, slot.at, bitmap);
    }
    return {};
  }

  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(state_->on));
    MULTIFD_TRY(check_rearm(state_->slots.ram(), block, first_page, bitmap));
    if (state_->manual == 0) return {};
    for (const detail::KvmSlot& slot : state_->slots.all()) {
      if (slot.block != block) continue;
      MULTIFD_TRY(state_->clear_log(slot, first_page, bitmap));
    }
    return {};
  }
  bool needs_rearm() const noexcept { return state_->manual != 0; }

  [[nodiscard]] Result<void> stop() noexcept {
    if (state_ == nullptr || !std::exchange(state_->on, false)) return {};
    auto off = state_->slots.log_off();
    auto plain = state_->plain_again();
    return off ? plain : off;
  }
  std::size_t page_bytes() const noexcept { return state_->slots.log_pages().bytes(); }

 private:
  static constexpr unsigned manual_flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

  struct State {
    detail::KvmSlots slots;
    unsigned offered;                  ///< flags of manual protect that KVM has
    unsigned manual;                   ///< those that are used; 0: KVM_GET_DIRTY_LOG clears
    std::vector<std::uint64_t> words;  ///< for one slot
    bool on = false;

    State(detail::KvmSlots of, unsigned has, unsigned uses, std::vector<std::uint64_t> room) noexcept
        : slots(std::move(of)), offered(has), manual(uses), words(std::move(room)) {}

    [[nodiscard]] Result<void> plain_again() const noexcept {
      return manual == 0 ? Result<void>{} : detail::set_manual_protect(slots.vm_fd(), 0);
    }

    /// KVM overwrites `words`; with at_fetch it watches the pages again before it returns.
    [[nodiscard]] Result<void> read_log(const detail::KvmSlot& slot) noexcept {
      kvm_dirty_log log{};
      log.slot = slot.region.slot;
      log.dirty_bitmap = words.data();
      if (detail::retry_ioctl(slots.vm_fd(), KVM_GET_DIRTY_LOG, &log) < 0)
        return slots.fail_slot("KVM_GET_DIRTY_LOG", slot);
      return {};
    }

    /// Only the bits of the chunk go to KVM: a page that was dirtied after the fetch, and is not sent now, keeps its mark.
    [[nodiscard]] Result<void> clear_log(const detail::KvmSlot& slot, std::uint64_t first_page,
                                         std::span<const std::uint64_t> bitmap) noexcept {
      std::uint64_t first = slot.pages, end = 0;  // words of the slot's log that have bits
      slots.log_pages().for_each_covered_run(
          bitmap, first_page, slot.at, slot.region.memory_size, [&](std::uint64_t run, std::uint64_t run_end) {
            if (end == 0) first = end = run / 64;
            const std::uint64_t words_end = bitmap_words(run_end);
            std::fill(words.data() + end, words.data() + std::max(end, words_end), 0);
            end = std::max(end, words_end);
            detail::set_bits(words, run, run_end);
          });
      if (end == 0) return {};
      // First page and number of pages are multiples of 64, but for the slot's end.
      kvm_clear_dirty_log clear{};
      clear.slot = slot.region.slot;
      clear.first_page = first * 64;
      clear.num_pages = static_cast<std::uint32_t>(std::min(end * 64, slot.pages) - first * 64);
      clear.dirty_bitmap = words.data() + first;
      if (detail::retry_ioctl(slots.vm_fd(), KVM_CLEAR_DIRTY_LOG, &clear) < 0)
        return slots.fail_slot("KVM_CLEAR_DIRTY_LOG", slot);
      return {};
    }
  };

  explicit KvmDirtyLog(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  std::unique_ptr<State> state_;
};
static_assert(check_dirty_source<KvmDirtyLog>());

}  // namespace multifd::migrate
