// SPDX-License-Identifier: MIT
//
// One vCPU's dirty ring: entries that KVM fills and the VMM gives back, in order.
//
//   flags    00 free -- KVM: slot, offset, then DIRTY --> 01 -- harvest() --> 1x RESET -- KVM_RESET_DIRTY_RINGS --> 00
#pragma once

#include <linux/kvm.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace multifd::migrate::detail {

/// Reads a ring, which may be any memory. Threads: one at a time; KVM writes meanwhile.
class DirtyRing {
 public:
  /// Params: `entries`: a power of two.
  explicit DirtyRing(std::span<kvm_dirty_gfn> entries) noexcept : entries_(entries) {}

  std::uint64_t size() const noexcept { return entries_.size(); }

  /// Calls on_page(slot, offset) for each entry that KVM has filled, and marks the entry as to be reset. Returns how many:
  /// no more than the ring has, because KVM fills none of these again before the reset.
  template <class OnPage>
  std::uint64_t harvest(OnPage&& on_page) noexcept {
    for (std::uint64_t count = 0;; ++count, ++next_) {
      kvm_dirty_gfn& entry = entries_[next_ & (entries_.size() - 1)];
      // The other side of these two is in the kernel: KVM writes flags last, and reads them first.
      const std::uint32_t flags = __atomic_load_n(&entry.flags, __ATOMIC_ACQUIRE);
      if ((flags & KVM_DIRTY_GFN_F_MASK) != KVM_DIRTY_GFN_F_DIRTY) return count;
      on_page(entry.slot, entry.offset);
      __atomic_store_n(&entry.flags, static_cast<std::uint32_t>(KVM_DIRTY_GFN_F_RESET), __ATOMIC_RELEASE);
    }
  }

 private:
  std::span<kvm_dirty_gfn> entries_;
  std::uint64_t next_ = 0;
};

/// The mapping of a vCPU's ring. Lifetime: the destructor unmaps; the vCPU's descriptor may be closed before.
class RingMapping {
 public:
  RingMapping(void* at, std::size_t bytes) noexcept : at_(at), bytes_(bytes) {}
  RingMapping(RingMapping&& other) noexcept : at_(std::exchange(other.at_, MAP_FAILED)), bytes_(other.bytes_) {}
  RingMapping& operator=(RingMapping&&) = delete;
  ~RingMapping() {
    if (at_ != MAP_FAILED) ::munmap(at_, bytes_);
  }

  std::span<kvm_dirty_gfn> entries() const noexcept {
    return {static_cast<kvm_dirty_gfn*>(at_), bytes_ / sizeof(kvm_dirty_gfn)};
  }

 private:
  void* at_;
  std::size_t bytes_;
};

}  // namespace multifd::migrate::detail
