// SPDX-License-Identifier: MIT
//
// KVM's memory slots as a VMM has set them, which is what the KVM models of DirtySource are made from.
#pragma once

#include <linux/kvm.h>

#include <cstdint>

#include "multifd/memory/ram_block.hpp"

namespace multifd::migrate {

/// One memory slot: which block it maps, and the very struct that the VMM gave to KVM_SET_USER_MEMORY_REGION.
///
/// Its memory lies inside that block. Several slots may map one block, and the same part of it more than once. The
/// address space id, where a VMM has several, is in bits 16 to 31 of `region.slot`, as KVM has it.
/// While the log is on, the slot's flags are the log's: a VMM that changes, moves or deletes the slot meanwhile ends the
/// migration first.
struct KvmMemorySlot {
  BlockId block{};
  kvm_userspace_memory_region region{};
};

/// Part of a block that no slot maps, and that KVM's log therefore has nothing to say about: because the guest cannot
/// write there (the hole below 1 MiB of a PC), or because another source watches it.
struct KvmUnmappedRange {
  BlockId block{};
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

}  // namespace multifd::migrate
