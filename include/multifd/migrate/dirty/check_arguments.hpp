// SPDX-License-Identifier: MIT
//
// What every DirtySource checks of its arguments, for models of your own, too: they come from a driver, and a wrong one
// would write past a bitmap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// What fetch() of every model checks of its arguments. Errors: Errc::bad_range.
[[nodiscard]] inline Result<void> check_fetch(const RamMap& ram, BlockId block,
                                              std::span<const std::uint64_t> bitmap) noexcept {
  if (!ram.contains(block))
    return fail(Errc::bad_range, Stage::none, "fetch dirty bitmap: no such block", index(block), ram.blocks().size());
  const std::size_t needed = bitmap_words(ram.pages(block));
  if (bitmap.size() < needed)
    return fail(Errc::bad_range, Stage::none, "fetch dirty bitmap: too few words", bitmap.size(), needed,
                ram.block(block).idstr);
  return {};
}

/// What rearm() of every model checks of its arguments. Errors: Errc::bad_range.
[[nodiscard]] inline Result<void> check_rearm(const RamMap& ram, BlockId block, std::uint64_t first_page,
                                              std::span<const std::uint64_t> bitmap) noexcept {
  if (!ram.contains(block))
    return fail(Errc::bad_range, Stage::none, "re-arm dirty log: no such block", index(block), ram.blocks().size());
  const std::uint64_t words = bitmap_words(ram.pages(block));
  if (first_page % 64 != 0 || first_page / 64 > words || bitmap.size() > words - first_page / 64)
    return fail(Errc::bad_range, Stage::none,
                "re-arm dirty log: chunk past its block, or not at a multiple of 64 pages", first_page,
                ram.pages(block), ram.block(block).idstr);
  return {};
}

/// fetch() and rearm() of a source that is off. Errors: Errc::already_closed.
[[nodiscard]] inline Result<void> check_on(bool on) noexcept {
  if (!on) return fail(Errc::already_closed, Stage::none, "dirty log that is off");
  return {};
}

}  // namespace multifd::migrate
