// SPDX-License-Identifier: MIT
// WITHOUT_FETCHES: DirtySource: needs  static constexpr DirtyFetch fetches
// WITHOUT_START: DirtySource: needs  Result<void> start() noexcept
// WITHOUT_FETCH: DirtySource: needs  Result<void> fetch(BlockId, std::span<std::uint64_t>) noexcept
// WITHOUT_REARM: DirtySource: needs  Result<void> rearm(BlockId, std::uint64_t first_page,
// WITH_REARM_OF_ALL: DirtySource: needs  Result<void> rearm(BlockId, std::uint64_t first_page,
// WITHOUT_NEEDS_REARM: DirtySource: needs  bool needs_rearm() const noexcept
// WITHOUT_STOP: DirtySource: needs  Result<void> stop() noexcept
// WITH_SILENT_STOP: DirtySource: needs  Result<void> stop() noexcept
// WITHOUT_PAGE_BYTES: DirtySource: needs  std::size_t page_bytes() const noexcept
#include "multifd/migrate/dirty_source.hpp"

using multifd::Result;

struct Quiet {
#ifndef WITHOUT_FETCHES
  static constexpr auto fetches = multifd::migrate::DirtyFetch::complete;
#endif
#ifndef WITHOUT_START
  Result<void> start() noexcept { return {}; }
#endif
#ifndef WITHOUT_FETCH
  Result<void> fetch(multifd::BlockId, std::span<std::uint64_t>) noexcept { return {}; }
#endif
#if defined(WITH_REARM_OF_ALL)
  Result<void> rearm(multifd::BlockId) noexcept { return {}; }  // would clear what was dirtied since the fetch
#elif !defined(WITHOUT_REARM)
  Result<void> rearm(multifd::BlockId, std::uint64_t, std::span<const std::uint64_t>) noexcept { return {}; }
#endif
#ifndef WITHOUT_NEEDS_REARM
  bool needs_rearm() const noexcept { return false; }
#endif
#if defined(WITH_SILENT_STOP)
  void stop() noexcept {}  // a guest that stays slow, and nobody knows
#elif !defined(WITHOUT_STOP)
  Result<void> stop() noexcept { return {}; }
#endif
#ifndef WITHOUT_PAGE_BYTES
  std::size_t page_bytes() const noexcept { return 4096; }
#endif
};
static_assert(multifd::migrate::check_dirty_source<Quiet>());
