// SPDX-License-Identifier: MIT
//
// Compiled with -fno-exceptions -fno-rtti, never run: every source of dirty pages, whole.
#include "multifd/migrate/dirty/dirty_hooks.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/dirty/dirty_union.hpp"
#include "multifd/migrate/dirty/kvm_dirty_log.hpp"
#include "multifd/migrate/dirty/kvm_dirty_ring.hpp"
#include "multifd/migrate/dirty/rearm_chunks.hpp"
#include "multifd/migrate/dirty/userfaultfd_dirty_log.hpp"
#include "multifd/migrate/dirty/vhost_dirty_log.hpp"

namespace multifd::migrate {

template class DirtyUnion<KvmDirtyLog, VhostDirtyLog, DirtyPages, DirtyFromHooks>;
template class DirtyUnion<KvmDirtyRing, UserfaultfdDirtyLog>;

}  // namespace multifd::migrate
