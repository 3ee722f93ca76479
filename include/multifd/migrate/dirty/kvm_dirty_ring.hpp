// SPDX-License-Identifier: MIT
//
// KVM's dirty ring (Linux 5.11 on x86): each vCPU has a ring of the pages that it dirtied, so a fetch costs what was
// dirtied and not what there is. A full ring stops its vCPU until it is harvested, which the VMM's vCPU loop does:
//
//   case KVM_EXIT_DIRTY_RING_FULL:
//     if (auto done = dirty_ring.harvest(); !done) return stop_guest(done.error());
//     break;  // and KVM_RUN again
#pragma once

#include <linux/kvm.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty/detail/dirty_ring.hpp"
#include "multifd/migrate/dirty/detail/kvm_slots.hpp"
#include "multifd/migrate/dirty/detail/log_pages.hpp"
#include "multifd/migrate/dirty/kvm_memory_slot.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// The dirty rings of a VM's vCPUs. A model of DirtySource.
///
/// A VMM decides for the ring when it makes the VM: enable() comes before the first vCPU, and KVM_GET_DIRTY_LOG does not
/// work any more. Create this object when all vCPUs are there, and keep it as long as they run.
/// With KVM's page modification logging (Intel) what a vCPU dirtied may stay with the vCPU until it leaves the guest, which
/// is why `fetches` is complete_when_stopped. On arm64 KVM wants a bitmap beside the ring for what no vCPU writes;
/// enable() says not_supported there.
///
/// Cost: fetch() is one step for each page that was dirtied, one system call for all that was harvested, and one word a 64
///   pages of the block. rearm() does nothing. start() write-protects all memory, one system call a slot. The object has
///   one bit a page, KVM 16 bytes an entry and vCPU.
/// Threads: harvest() from any, also at once and beside all else; it may block while another thread is in a call. All else
///   as DirtySource.
/// Lifetime: `vm_fd` is the caller's and stays open until the destructor, which stops; the vCPUs' need not. No thread is in
///   harvest() when the object is destroyed.
class KvmDirtyRing {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete_when_stopped;

  /// Gives every vCPU that will be created a ring.
  ///
  /// Params: `entries`: pages that a vCPU can dirty until it is stopped, a power of two; 0: as many as KVM allows (65536,
  ///   1 MiB a vCPU). Few cost exits, many cost memory; KVM keeps some for itself.
  /// Returns: the entries, for create().
  /// Errors: Errc::not_supported, bad_option (entries; expected: the most); errno of KVM_CHECK_EXTENSION and
  ///   KVM_ENABLE_CAP: EINVAL when there is a vCPU or a ring already. Threads: any.
  [[nodiscard]] static Result<std::uint32_t> enable(int vm_fd, std::uint32_t entries = 0) noexcept {
    for (const unsigned long capability : capabilities) {
      MULTIFD_TRY_ASSIGN(const unsigned bytes, detail::kvm_capability(vm_fd, capability));
      const auto most = static_cast<std::uint32_t>(bytes / sizeof(kvm_dirty_gfn));
      if (most == 0) continue;
      if (entries == 0) entries = most;
      if (!std::has_single_bit(entries) || entries > most)
        return fail(Errc::bad_option, Stage::setup, "KvmDirtyRing: entries", entries, most);
      kvm_enable_cap enable{};
      enable.cap = static_cast<std::uint32_t>(capability);
      enable.args[0] = entries * sizeof(kvm_dirty_gfn);
      if (detail::retry_ioctl(vm_fd, KVM_ENABLE_CAP, &enable) < 0)
        return fail_errno(Stage::setup, "KVM_ENABLE_CAP(KVM_CAP_DIRTY_LOG_RING), which comes before the first vCPU");
      return entries;
    }
    return fail(Errc::not_supported, Stage::setup, "KVM_CAP_DIRTY_LOG_RING");
  }

  /// Params: `vcpu_fds`: of all vCPUs, from KVM_CREATE_VCPU; `entries`: what enable() returned; `slots`: all that map
  ///   blocks of `ram`; `unmapped`: parts of blocks that are in no slot.
  /// Errors: as KvmDirtyLog::create(); Errc::bad_option (entries); errno of KVM_RESET_DIRTY_RINGS (EINVAL: enable() was
  ///   not called) and of mmap.
  [[nodiscard]] static Result<KvmDirtyRing> create(int vm_fd, std::span<const int> vcpu_fds, std::uint32_t entries,
                                                   const RamMap& ram, std::span<const KvmMemorySlot> slots,
                                                   std::span<const KvmUnmappedRange> unmapped = {}) {
    if (!std::has_single_bit(entries))
      return fail(Errc::bad_option, Stage::setup, "KvmDirtyRing: entries is not what enable() returned", entries);
    MULTIFD_TRY_ASSIGN(auto checked, detail::KvmSlots::create(vm_fd, ram, slots, unmapped));
    // The mapping of a ring that is not there succeeds, and the first look at it would end the program.
    if (detail::retry_ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, 0) < 0)
      return fail_errno(Stage::setup, "KVM_RESET_DIRTY_RINGS, which works after KvmDirtyRing::enable()");
    return catch_bad_alloc(Stage::setup, "KvmDirtyRing", [&]() -> Result<KvmDirtyRing> {
      auto state = std::make_unique<State>(std::move(checked));
      const std::size_t bytes = entries * sizeof(kvm_dirty_gfn);
      const auto at = static_cast<off_t>(KVM_DIRTY_LOG_PAGE_OFFSET * detail::host_page_bytes());
      state->mappings.reserve(vcpu_fds.size());
      for (const int vcpu_fd : vcpu_fds) {
        void* const mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, at);
        if (mapped == MAP_FAILED) return fail_errno(Stage::setup, "map the dirty ring of a vCPU");
        state->mappings.emplace_back(mapped, bytes);
        state->rings.emplace_back(state->mappings.back().entries());
      }
      for (std::uint32_t id = 0; id < ram.blocks().size(); ++id)
        state->dirty.emplace_back(bitmap_words(ram.pages(BlockId{id})));
      return KvmDirtyRing(std::move(state));
    });
  }
  KvmDirtyRing(KvmDirtyRing&&) noexcept = default;
  KvmDirtyRing& operator=(KvmDirtyRing&&) = delete;
  ~KvmDirtyRing() { static_cast<void>(stop()); }

  /// Takes what is in all rings and gives the entries back to KVM, which watches their pages again: what a vCPU's thread
  /// does at KVM_EXIT_DIRTY_RING_FULL. The pages are reported by the next fetch(). Works whether the log is on or off.
  ///
  /// Errors: errno of KVM_RESET_DIRTY_RINGS: the vCPU cannot go on; EOVERFLOW: KVM has overwritten entries, as one does
  ///   that runs several instructions of a guest without a look at the ring (kvm_pvm); Errc::bad_range: a slot was changed
  ///   under the log. fetch() fails of the same, and after EOVERFLOW start() does.
  [[nodiscard]] Result<void> harvest() noexcept {
    const std::scoped_lock lock(state_->mutex);
    return state_->harvest();
  }

  [[nodiscard]] Result<void> start() noexcept {
    MULTIFD_TRY(stop());
    State& s = *state_;
    // With manual protect, which a VMM may have left on, KVM would not watch memory at first.
    MULTIFD_TRY_ASSIGN(const unsigned manual,
                       detail::kvm_capability(s.slots.vm_fd(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    if (manual != 0) {
      MULTIFD_TRY(detail::set_manual_protect(s.slots.vm_fd(), 0));
    }
    const std::scoped_lock lock(s.mutex);
    s.past_slot = false;
    MULTIFD_TRY(s.harvest());
    for (auto& words : s.dirty) std::ranges::fill(words, 0);
    MULTIFD_TRY(s.slots.log_on());
    s.on = true;
    return {};
  }

  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    State& s = *state_;
    const std::scoped_lock lock(s.mutex);
    MULTIFD_TRY(check_on(s.on));
    MULTIFD_TRY(check_fetch(s.slots.ram(), block, bitmap));
    MULTIFD_TRY(s.harvest());
    std::vector<std::uint64_t>& dirty = s.dirty[index(block)];
    for (std::size_t i = 0; i < dirty.size(); ++i) bitmap[i] |= std::exchange(dirty[i], 0);
    return {};
  }

  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(state_->on));
    return check_rearm(state_->slots.ram(), block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return false; }

  [[nodiscard]] Result<void> stop() noexcept {
    if (state_ == nullptr || !state_->on) return {};
    const std::scoped_lock lock(state_->mutex);
    state_->on = false;
    auto off = state_->slots.log_off();
    auto emptied = state_->harvest();  // no vCPU is left with a full ring
    return off ? emptied : off;
  }
  std::size_t page_bytes() const noexcept { return state_->slots.log_pages().bytes(); }

 private:
  static constexpr unsigned long capabilities[] = {
#if defined(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
      KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
#endif
      KVM_CAP_DIRTY_LOG_RING,
  };

  /// `on` changes in calls of the migration's thread only; all else is under `mutex`.
  struct State {
    detail::KvmSlots slots;
    std::mutex mutex{};
    std::vector<detail::RingMapping> mappings{};
    std::vector<detail::DirtyRing> rings{};
    std::vector<std::vector<std::uint64_t>> dirty{};  ///< of each block, in pages of the map
    bool on = false;
    bool reset_owed = false;  ///< entries were harvested, and KVM does not know yet
    bool past_slot = false;   ///< an entry lay past the end of its slot
    /// A ring was full to its last entry. KVM stops a vCPU while some are left; one that has run on has overwritten entries,
    /// and where the next one will be is not known any more.
    bool overrun = false;

    explicit State(detail::KvmSlots of) noexcept : slots(std::move(of)) {}

    /// First the reset, then the caller reads the pages: a write in between is seen by both, and one after it by KVM.
    [[nodiscard]] Result<void> harvest() noexcept {
      for (detail::DirtyRing& ring : rings) {
        const std::uint64_t count = ring.harvest([this](std::uint32_t slot, std::uint64_t page) { add(slot, page); });
        reset_owed = reset_owed || count != 0;
        overrun = overrun || count == ring.size();
      }
      if (reset_owed && detail::retry_ioctl(slots.vm_fd(), KVM_RESET_DIRTY_RINGS, 0) < 0)
        return fail_errno(Stage::none, "KVM_RESET_DIRTY_RINGS");
      reset_owed = false;
      if (overrun)
        return fail_errno(Stage::none, "KVM's dirty ring ran over, pages are missing: more entries, or KvmDirtyLog",
                          EOVERFLOW);
      if (past_slot)
        return fail(Errc::bad_range, Stage::none, "KVM's dirty ring has a page past its slot: was the slot changed?");
      return {};
    }

    void add(std::uint32_t number, std::uint64_t page) noexcept {
      const detail::KvmSlot* const slot = slots.find(number);
      if (slot == nullptr) return;  // a slot that maps no block of ours
      if (page >= slot->pages) {
        past_slot = true;
        return;
      }
      const std::uint64_t at = slot->at + page * slots.log_pages().bytes();
      slots.log_pages().report_bytes(at, at + slots.log_pages().bytes(), dirty[index(slot->block)]);
    }
  };

  explicit KvmDirtyRing(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  std::unique_ptr<State> state_;
};
static_assert(check_dirty_source<KvmDirtyRing>());

}  // namespace multifd::migrate
