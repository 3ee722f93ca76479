// SPDX-License-Identifier: MIT
//
// Puts what was fetched where it belongs: in runs of adjacent pages, whole units, each by one thread.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

#include "multifd/postcopy/detail/fetch_pipe.hpp"
#include "multifd/postcopy/detail/lazy_shared.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

/// `Thread` has layout_changes(): called, with nothing held, when the kernel refuses to place before an event has been read;
/// and before_placing(), called before each few pages.
/// Threads: one.
template <class Thread>
class PagePlacer {
 public:
  /// Errors: ENOMEM. Cost: one unit, where units are larger than pages.
  [[nodiscard]] static Result<PagePlacer> create(LazyShared& shared, Thread& thread) {
    return catch_bad_alloc(Stage::setup, "allocate a unit", [&]() -> Result<PagePlacer> {
      PagePlacer placer(shared, thread);
      if (shared.layout.largest_unit() > shared.store.page_bytes())
        placer.unit_ = std::make_unique_for_overwrite<std::byte[]>(shared.layout.largest_unit());
      return placer;
    });
  }

  /// Places an answer. Returns how many units this thread has placed; others were quicker with the rest.
  /// Errors: of Userfaultfd's placing.
  [[nodiscard]] Result<std::uint64_t> place(const FetchAnswer& answer) {
    const auto& part = shared_->layout.part_of(answer.job.run.first);
    const std::uint64_t unit_bytes = part.unit_bytes;
    const std::size_t page_bytes = shared_->store.page_bytes();
    const std::size_t unit_pages = unit_bytes / page_bytes;
    const PageRange all = part.range(answer.job.run);
    std::uint64_t placed = 0;
    std::size_t page = 0;  ///< of the answer's
    std::uint64_t unit = answer.job.run.first;
    while (unit < answer.job.run.end()) {
      // How many units from here on are whole in the answer, none of their pages zero.
      const std::uint64_t offset = all.offset + (unit - answer.job.run.first) * unit_bytes;
      std::uint64_t whole = 0;
      while (page + (whole + 1) * unit_pages <= answer.offsets.size() &&
             answer.offsets[page + whole * unit_pages] == offset + whole * unit_bytes &&
             answer.offsets[page + (whole + 1) * unit_pages - 1] == offset + (whole + 1) * unit_bytes - page_bytes)
        ++whole;
      if (whole > 0) {
        MULTIFD_TRY_ASSIGN(const std::uint64_t more,
                           place_run(part, {unit, whole}, &answer.bytes[page * page_bytes], answer.job.why));
        placed += more;
        page += whole * unit_pages;
        unit += whole;
        continue;
      }
      std::size_t end = page;
      while (end < answer.offsets.size() && answer.offsets[end] < offset + unit_bytes) ++end;
      Result<std::uint64_t> more = std::uint64_t{0};
      if (end == page) {
        more = zero_unit(part, unit, answer.job.why);
      } else {
        std::memset(unit_.get(), 0, unit_bytes);
        for (; page < end; ++page)
          std::memcpy(unit_.get() + (answer.offsets[page] - offset), &answer.bytes[page * page_bytes], page_bytes);
        more = place_run(part, {unit, 1}, unit_.get(), answer.job.why);
      }
      if (!more) return more;
      placed += *more;
      ++unit;
    }
    return placed;
  }

  /// Places zeros where a unit is known to be zero, or absent. Returns whether this thread has.
  [[nodiscard]] Result<std::uint64_t> place_zero(std::uint64_t unit) {
    return place_run(shared_->layout.part_of(unit), {unit, 1}, nullptr, FetchJob::Why::fault);
  }

 private:
  using From = PageStates::From;
  /// So many at most between two looks whether something is urgent, and so long a reader of events may have to wait.
  static constexpr std::uint64_t at_once = 16;

  PagePlacer(LazyShared& shared, Thread& thread) noexcept : shared_(&shared), thread_(&thread) {}

  [[nodiscard]] Result<std::uint64_t> zero_unit(const LazyLayout::Part& part, std::uint64_t unit, FetchJob::Why why) {
    if (why != FetchJob::Why::rest) return place_run(part, {unit, 1}, nullptr, why);
    const auto noted = shared_->states.note_zero(unit);
    if (noted.changed) shared_->counters.zero_pages.add();
    if (noted.all_known) shared_->all_known();
    if (noted.wanted) return place_run(part, {unit, 1}, nullptr, FetchJob::Why::fault);
    return std::uint64_t{0};
  }

  /// `bytes`: of all of the run; null: zeros.
  [[nodiscard]] Result<std::uint64_t> place_run(const LazyLayout::Part& part, UnitRun run, const std::byte* bytes,
                                                FetchJob::Why why) {
    std::uint64_t placed = 0;
    while (run.count > 0) {
      thread_->before_placing();
      const UnitRun some{run.first, std::min(run.count, at_once)};
      std::uint64_t done = 0;
      const bool gated = shared_->tells_removals();
      if (gated) shared_->placement.begin_place();
      auto more = place_some(part, some, bytes, why, done);
      if (gated) shared_->placement.end_place();
      if (!more) return more;
      placed += *more;
      if (done < some.count) {
        // Who gives memory back waits for its event's reader, and behind the end there is none.
        if (shared_->over()) return placed;
        thread_->layout_changes();
      }
      if (bytes != nullptr) bytes += done * part.unit_bytes;
      run = {run.first + done, run.count - done};
    }
    return placed;
  }

  /// `done`: how many units are dealt with: fewer than all when the layout is changing.
  [[nodiscard]] Result<std::uint64_t> place_some(const LazyLayout::Part& part, UnitRun run, const std::byte* bytes,
                                                 FetchJob::Why why, std::uint64_t& done) {
    // Zero units are begun only by who places them as such: others would have to put them back, and a fault that comes
    // meanwhile would be lost.
    const From most = why == FetchJob::Why::rest ? From::unknown : From::zero;
    std::array<From, at_once> from;
    for (std::uint64_t i = 0; i < run.count; ++i) from[i] = shared_->states.begin_place(run.first + i, most);
    std::uint64_t placed = 0;
    Result<void> failed;
    while (done < run.count) {
      std::uint64_t same = 1;
      while (done + same < run.count && from[done + same] == from[done]) ++same;
      if (from[done] == From::nowhere) {
        done += same;
        continue;
      }
      const bool zeros = bytes == nullptr || from[done] == From::zero;
      auto in = put(part, {run.first + done, same}, zeros ? nullptr : bytes + done * part.unit_bytes);
      if (!in) {
        failed = std::unexpected(in.error());
        break;
      }
      for (const std::uint64_t end = done + *in / part.unit_bytes; done < end; ++done, ++placed, --same)
        if (shared_->states.end_place(run.first + done, from[done])) shared_->all_known();
      if (same > 0) break;
    }
    for (std::uint64_t i = done; i < run.count; ++i)
      if (from[i] != From::nowhere) shared_->states.undo_place(run.first + i, from[i]);
    if (!failed && shared_->running()) return std::unexpected(failed.error());
    if (!failed) done = run.count;  // the regions have been let go meanwhile
    return placed;
  }

  /// Returns how many bytes are in.
  [[nodiscard]] Result<std::uint64_t> put(const LazyLayout::Part& part, UnitRun run, const std::byte* bytes) {
    const std::uint64_t address = part.address_of(run.first);
    const std::uint64_t size = run.count * part.unit_bytes;
    if (bytes == nullptr) return shared_->userfaultfd.zeropage(address, size, part.unit_bytes);
    if (part.mode == FaultMode::missing) return shared_->userfaultfd.copy(address, {bytes, size}, part.unit_bytes);
    std::memcpy(part.mapped(run.first), bytes, size);
    return shared_->userfaultfd.continue_(address, size, part.unit_bytes);
  }

  LazyShared* shared_;
  Thread* thread_;
  std::unique_ptr<std::byte[]> unit_;
};

}  // namespace multifd::postcopy::detail
