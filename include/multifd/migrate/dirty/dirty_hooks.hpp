// SPDX-License-Identifier: MIT
//
// A dirty source made of the caller's functions: for a bitmap that somebody else keeps (VFIO, an emulator, another
// hypervisor), and for a VMM that has its own way to KVM's.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/migrate/dirty/check_arguments.hpp"
#include "multifd/migrate/dirty_source.hpp"

namespace multifd::migrate {

/// The functions behind a DirtyFromHooks: what DirtySource says of the member of the same name holds for each. They get
/// arguments that have been checked, and must not throw.
struct DirtyHooks {
  /// Default: empty, for a log that is always on. Older marks in it cost one page each, so clearing it here pays.
  std::function<Result<void>()> start{};
  /// Takes the marks: ORs them into the bitmap, which is in pages of the map, and clears them in the log, in one atomic
  /// step for each word (an exchange), because what is read and then cleared loses what was set in between. Not empty.
  std::function<Result<void>(BlockId, std::span<std::uint64_t>)> fetch{};
  /// Default: empty, for a log whose fetch() watches pages again. Set it where reading and clearing are separate.
  std::function<Result<void>(BlockId, std::uint64_t first_page, std::span<const std::uint64_t>)> rearm{};
  /// Default: empty, for a log that costs nothing while nobody reads it.
  std::function<Result<void>()> stop{};
  /// The log's own page.
  std::size_t page_bytes = 4096;
};

/// The hooks as a source. A model of DirtySource, which holds when the hooks hold it.
///
/// Threads: as DirtySource. Lifetime: what the hooks refer to outlives this object.
class DirtyFromHooks {
 public:
  static constexpr DirtyFetch fetches = DirtyFetch::complete;

  /// Errors: Errc::bad_option (no fetch, a page size that is no power of two); ENOMEM. Cost: copies the map, not the memory.
  [[nodiscard]] static Result<DirtyFromHooks> create(const RamMap& ram, DirtyHooks hooks) {
    if (!hooks.fetch) return fail(Errc::bad_option, Stage::setup, "DirtyHooks::fetch is empty");
    if (!std::has_single_bit(hooks.page_bytes))
      return fail(Errc::bad_option, Stage::setup, "DirtyHooks::page_bytes", hooks.page_bytes);
    return catch_bad_alloc(Stage::setup, "DirtyFromHooks",
                           [&]() -> Result<DirtyFromHooks> { return DirtyFromHooks(ram, std::move(hooks)); });
  }
  DirtyFromHooks(DirtyFromHooks&& other) noexcept
      : ram_(std::move(other.ram_)), hooks_(std::move(other.hooks_)), on_(std::exchange(other.on_, false)) {}
  DirtyFromHooks& operator=(DirtyFromHooks&&) = delete;
  ~DirtyFromHooks() { static_cast<void>(stop()); }

  [[nodiscard]] Result<void> start() noexcept {
    MULTIFD_TRY(stop());
    if (hooks_.start) {
      MULTIFD_TRY(hooks_.start());
    }
    on_ = true;
    return {};
  }
  [[nodiscard]] Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    MULTIFD_TRY(check_fetch(ram_, block, bitmap));
    return hooks_.fetch(block, bitmap.first(bitmap_words(ram_.pages(block))));
  }
  [[nodiscard]] Result<void> rearm(BlockId block, std::uint64_t first_page,
                                   std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(check_on(on_));
    MULTIFD_TRY(check_rearm(ram_, block, first_page, bitmap));
    return hooks_.rearm ? hooks_.rearm(block, first_page, bitmap) : Result<void>{};
  }
  bool needs_rearm() const noexcept { return hooks_.rearm != nullptr; }
  [[nodiscard]] Result<void> stop() noexcept {
    if (!std::exchange(on_, false) || !hooks_.stop) return {};
    return hooks_.stop();
  }
  std::size_t page_bytes() const noexcept { return hooks_.page_bytes; }

 private:
  DirtyFromHooks(const RamMap& ram, DirtyHooks hooks) : ram_(ram), hooks_(std::move(hooks)) {}

  RamMap ram_;
  DirtyHooks hooks_;
  bool on_ = false;
};
static_assert(check_dirty_source<DirtyFromHooks>());

}  // namespace multifd::migrate
