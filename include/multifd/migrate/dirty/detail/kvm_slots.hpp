// SPDX-License-Identifier: MIT
//
// The memory slots of a VM, checked against the blocks of a map, and their dirty logging switched on and off. Every byte
// of a block is in a slot, or said to be in none: a page that nobody watches would be lost without a word.
#pragma once

#include <linux/kvm.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/detail/log_pages.hpp"
#include "multifd/migrate/dirty/kvm_memory_slot.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate::detail {

/// An ioctl that goes on after a signal. Returns what ioctl() returns; errno is set.
template <class Argument>
int retry_ioctl(int fd, unsigned long request, Argument argument) noexcept {
  int result;
  do result = ::ioctl(fd, request, argument);
  while (result < 0 && errno == EINTR);
  return result;
}

/// What KVM says of a capability of this VM: 0 when it has none. Errors: errno of KVM_CHECK_EXTENSION.
[[nodiscard]] inline Result<unsigned> kvm_capability(int vm_fd, unsigned long capability) noexcept {
  const int value = retry_ioctl(vm_fd, KVM_CHECK_EXTENSION, capability);
  if (value < 0) return fail_errno(Stage::setup, "KVM_CHECK_EXTENSION");
  return static_cast<unsigned>(value);
}

/// Says whether KVM_GET_DIRTY_LOG leaves clearing to KVM_CLEAR_DIRTY_LOG: `flags` is 0, or KVM_DIRTY_LOG_*. The setting
/// is the whole VM's. Errors: errno of KVM_ENABLE_CAP.
[[nodiscard]] inline Result<void> set_manual_protect(int vm_fd, unsigned flags) noexcept {
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  enable.args[0] = flags;
  if (retry_ioctl(vm_fd, KVM_ENABLE_CAP, &enable) < 0)
    return fail_errno(Stage::setup, "KVM_ENABLE_CAP(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)");
  return {};
}

struct KvmSlot {
  kvm_userspace_memory_region region;
  BlockId block;
  std::uint64_t at;     ///< where in the block it begins, bytes
  std::uint64_t pages;  ///< of the log
};

/// Threads: one at a time for set_logging(), any for the rest.
class KvmSlots {
 public:
  /// Errors: Errc::bad_range (a slot that is not inside its block or not made of whole pages; a part of a block that is in
  ///   no slot), bad_option (two slots of one number), block_without_memory; ENOMEM.
  [[nodiscard]] static Result<KvmSlots> create(int vm_fd, const RamMap& ram, std::span<const KvmMemorySlot> slots,
                                               std::span<const KvmUnmappedRange> unmapped) {
    return catch_bad_alloc(Stage::setup, "KvmMemorySlot", [&]() -> Result<KvmSlots> {
      KvmSlots made(vm_fd, ram);
      for (const KvmMemorySlot& slot : slots) MULTIFD_TRY(made.add(slot));
      for (const KvmUnmappedRange& range : unmapped) MULTIFD_TRY(made.check_unmapped(range));
      for (std::uint32_t id = 0; id < ram.blocks().size(); ++id) MULTIFD_TRY(made.check_covered(BlockId{id}, unmapped));
      std::ranges::sort(made.slots_, {}, [](const KvmSlot& slot) { return slot.region.slot; });
      return made;
    });
  }

  int vm_fd() const noexcept { return vm_fd_; }
  const RamMap& ram() const noexcept { return ram_; }
  const LogPages& log_pages() const noexcept { return log_pages_; }
  /// In the order of their numbers.
  std::span<const KvmSlot> all() const noexcept { return slots_; }

  /// Null: not one of ours. Cost: logarithmic in the slots.
  const KvmSlot* find(std::uint32_t number) const noexcept {
    const auto at = std::ranges::lower_bound(slots_, number, {}, [](const KvmSlot& slot) { return slot.region.slot; });
    return at != slots_.end() && at->region.slot == number ? &*at : nullptr;
  }

  /// Sets KVM_MEM_LOG_DIRTY_PAGES at every slot; where one fails, no slot has it afterwards.
  /// Errors: errno of KVM_SET_USER_MEMORY_REGION. Cost: one system call a slot.
  [[nodiscard]] Result<void> log_on() const noexcept {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      auto done = set_flags(slots_[i], slots_[i].region.flags | KVM_MEM_LOG_DIRTY_PAGES);
      if (done) continue;
      while (i-- > 0) static_cast<void>(set_flags(slots_[i], slots_[i].region.flags));
      return done;
    }
    return {};
  }

  /// Gives every slot the flags that the VMM had given it. Errors: the first one's errno, after all were tried.
  [[nodiscard]] Result<void> log_off() const noexcept {
    Result<void> first;
    for (const KvmSlot& slot : slots_)
      if (auto done = set_flags(slot, slot.region.flags); !done && first) first = std::move(done);
    return first;
  }

  /// The errno of a call that is about a slot.
  [[nodiscard]] std::unexpected<Error> fail_slot(const char* op, const KvmSlot& slot) const noexcept {
    auto failed = fail_errno(Stage::none, op);
    char digits[16];
    const auto end = std::to_chars(digits, digits + sizeof digits, slot.region.slot).ptr;
    failed.error().subject = ram_.block(slot.block).idstr;
    failed.error().subject.append(", slot ").append({digits, static_cast<std::size_t>(end - digits)});
    return failed;
  }

 private:
  KvmSlots(int vm_fd, const RamMap& ram) : vm_fd_(vm_fd), ram_(ram), log_pages_(ram.page_bytes()) {}

  [[nodiscard]] Result<void> add(const KvmMemorySlot& slot) {
    const kvm_userspace_memory_region& region = slot.region;
    if (!ram_.contains(slot.block))
      return fail(Errc::bad_range, Stage::setup, "KvmMemorySlot: no such block", index(slot.block),
                  ram_.blocks().size());
    const RamBlock& block = ram_.block(slot.block);
    if (block.access == Access::none)
      return fail(Errc::block_without_memory, Stage::setup, "KvmMemorySlot", 0, 0, block.idstr);
    const auto host = reinterpret_cast<std::uintptr_t>(block.host.data());
    const std::uint64_t at = region.userspace_addr - host;
    if (region.userspace_addr < host || at > block.bytes || region.memory_size > block.bytes - at)
      return fail(Errc::bad_range, Stage::setup, "KvmMemorySlot: its memory is not inside its block", at, block.bytes,
                  block.idstr);
    const std::uint64_t page_bytes = log_pages_.bytes();
    if (region.memory_size == 0 || region.memory_size % page_bytes != 0 || at % page_bytes != 0)
      return fail(Errc::bad_range, Stage::setup, "KvmMemorySlot: no whole pages of the host within its block", at,
                  block.bytes, block.idstr);
    if (std::ranges::find(slots_, region.slot, [](const KvmSlot& each) { return each.region.slot; }) != slots_.end())
      return fail(Errc::bad_option, Stage::setup, "KvmMemorySlot: two of one number", region.slot, 0, block.idstr);
    slots_.push_back({region, slot.block, at, log_pages_.in(region.memory_size)});
    return {};
  }

  [[nodiscard]] Result<void> check_unmapped(const KvmUnmappedRange& range) const noexcept {
    if (!ram_.contains(range.block))
      return fail(Errc::bad_range, Stage::setup, "KvmUnmappedRange: no such block", index(range.block),
                  ram_.blocks().size());
    const RamBlock& block = ram_.block(range.block);
    if (range.offset > block.bytes || range.bytes > block.bytes - range.offset)
      return fail(Errc::bad_range, Stage::setup, "KvmUnmappedRange: not inside its block", range.offset, block.bytes,
                  block.idstr);
    return {};
  }

  [[nodiscard]] Result<void> check_covered(BlockId id, std::span<const KvmUnmappedRange> unmapped) const {
    std::vector<std::pair<std::uint64_t, std::uint64_t>> parts;
    for (const KvmSlot& slot : slots_)
      if (slot.block == id) parts.emplace_back(slot.at, slot.at + slot.region.memory_size);
    for (const KvmUnmappedRange& range : unmapped)
      if (range.block == id) parts.emplace_back(range.offset, range.offset + range.bytes);
    std::ranges::sort(parts);
    std::uint64_t covered = 0;
    for (const auto& [begin, end] : parts)
      if (begin <= covered) covered = std::max(covered, end);
    if (covered == ram_.block(id).bytes) return {};
    return fail(Errc::bad_range, Stage::setup,
                "RAM block is larger than its KvmMemorySlots: name the rest as KvmUnmappedRange", covered,
                ram_.block(id).bytes, ram_.block(id).idstr);
  }

  [[nodiscard]] Result<void> set_flags(const KvmSlot& slot, std::uint32_t flags) const noexcept {
    kvm_userspace_memory_region region = slot.region;
    region.flags = flags;
    if (retry_ioctl(vm_fd_, KVM_SET_USER_MEMORY_REGION, &region) < 0)
      return fail_slot("KVM_SET_USER_MEMORY_REGION", slot);
    return {};
  }

  int vm_fd_;
  RamMap ram_;
  LogPages log_pages_;
  std::vector<KvmSlot> slots_;
};

}  // namespace multifd::migrate::detail
