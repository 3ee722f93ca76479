// SPDX-License-Identifier: MIT
//
// Memory on demand: serves the faults of a guest whose pages are still elsewhere, and fetches the rest in the background.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/postcopy/detail/fault_thread.hpp"
#include "multifd/postcopy/detail/fetch_worker.hpp"
#include "multifd/postcopy/detail/lane_opener.hpp"
#include "multifd/postcopy/detail/lazy_layout.hpp"
#include "multifd/postcopy/detail/lazy_shared.hpp"
#include "multifd/postcopy/fault_latency.hpp"
#include "multifd/postcopy/lazy_memory_options.hpp"
#include "multifd/postcopy/lazy_region.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/userfaultfd.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"

namespace multifd::postcopy {

/// Fills the memory of a guest that runs already. The guest is of this process or of one that has handed over its
/// userfaultfd; its addresses are never read here.
///
/// A thread that touches a page waits until the page is there. Zero pages are not placed before something touches them, and
/// become ordinary empty memory at the end, so memory grows by what was needed only. When all pages are there, the
/// userfaultfd lets go of the regions.
///
/// A fetcher that is lost (PageStore::may_return()) is opened anew, and nothing with it; the guest runs on what it has
/// meanwhile. After an error that is final, and after cancel(), threads that wait for a page go on waiting and never see
/// wrong bytes, as long as a userfaultfd is open: this object's, and any copy of the descriptor. So end the guest first, or
/// keep a copy (dup()).
///
/// Threads: any, all methods; start() once. Lifetime: the store outlives it, serves nothing else, and is cancelled at the
///   end. The destructor cancels and joins.
class LazyMemory {
 public:
  /// Registers the regions. From here on a thread that touches a missing page waits.
  ///
  /// Params: `regions`: copied; see LazyRegion for what the memory must look like.
  /// Errors: Errc::bad_option (op: its name), bad_region, unknown_block; errno of UFFDIO_REGISTER; ENOMEM, EMFILE.
  /// Cost: half a byte for each page; with `record` 8 more. A descriptor for each fault thread.
  [[nodiscard]] static Result<std::unique_ptr<LazyMemory>> open(Userfaultfd userfaultfd,
                                                                std::span<const LazyRegion> regions, PageStore& store,
                                                                LazyMemoryOptions options = {}) {
    MULTIFD_TRY(check_regions(regions, store));
    MULTIFD_TRY(check_options(options, store));
    return catch_bad_alloc(Stage::setup, "LazyMemory", [&]() -> Result<std::unique_ptr<LazyMemory>> {
      detail::LazyLayout layout(regions);
      auto states = PageStates::create(layout.units());
      if (!states) return std::unexpected(states.error());
      mark_missing(layout, *states, options, store);
      std::unique_ptr<LazyMemory> made(
          new LazyMemory(std::move(userfaultfd), std::move(layout), *std::move(states), store, std::move(options)));
      if (auto done = made->prepare(); !done) return std::unexpected(done.error());
      return made;
    });
  }
  LazyMemory(const LazyMemory&) = delete;
  LazyMemory& operator=(const LazyMemory&) = delete;
  ~LazyMemory() {
    if (!shared_.completed()) cancel();
  }

  /// Starts the threads. Once. Errors: errno of pthread_create(), ENOMEM; Errc::cancelled.
  [[nodiscard]] Result<void> start() {
    if (shared_.error.failed()) return std::unexpected(shared_.error.get());
    auto started = start_threads();
    if (!started) shared_.error.raise(started.error());
    return started;
  }

  /// Waits until all pages are there. May be called again.
  ///
  /// Errors: Errc::timed_out; cancelled; guest_gone (the process whose memory it is has ended); not_supported (memory whose
  ///   pages are not there yet was moved); bad_region (a fault outside of all regions); those of the store that are final;
  ///   errno of userfaultfd.
  [[nodiscard]] Result<void> wait(std::chrono::milliseconds timeout) {
    auto held = shared_.monitor.lock();
    const bool ended = shared_.monitor.wait_until(held, deadline_after(timeout),
                                                  [&] { return shared_.completed(held) || shared_.failed(held); });
    if (shared_.completed(held)) return {};
    if (ended) return std::unexpected(shared_.error.get());
    return fail(Errc::timed_out, Stage::none, "LazyMemory::wait");
  }

  /// Ends everything but the waiting of the guest's threads. Where all pages are there, it does nothing.
  void cancel() noexcept {
    if (shared_.completed()) return;
    shared_.error.raise(fail(Errc::cancelled, Stage::none, "LazyMemory").error());
  }

  LazyMemoryStatus status() const noexcept { return shared_.status.status(); }
  /// Cost: some loads.
  LazyMemoryStats stats() const noexcept { return shared_.counters.snapshot(shared_.states.remaining()); }
  /// Of faults whose page had to be fetched: from reading the fault to the page's being there. A fault that is asked for again
  /// behind a lost connection counts from then, and may count twice. Cost: some loads.
  FaultLatency latency() const noexcept { return shared_.latency.snapshot(); }

  /// What faults asked for, each page once, in that order, adjacent ones as one range: a later run's prefetch list. Nothing
  /// without LazyMemoryOptions::record.
  /// Errors: ENOMEM.
  [[nodiscard]] Result<std::vector<PageRange>> recorded() const {
    return catch_bad_alloc(Stage::none, "recorded faults", [&]() -> Result<std::vector<PageRange>> {
      std::vector<PageRange> ranges;
      shared_.record.for_each([&](std::uint64_t unit) {
        const PageRange page = shared_.layout.part_of(unit).range({unit, 1});
        const bool follows = !ranges.empty() && ranges.back().block == page.block &&
                             ranges.back().end() == page.offset && ranges.back().bytes + page.bytes <= batch_bytes;
        if (follows)
          ranges.back().bytes += page.bytes;
        else
          ranges.push_back(page);
      });
      return ranges;
    });
  }

  /// Marks the pages of a block that are neither there nor known to be zero: what a source that comes back has to have.
  /// Params: `bitmap`: as LazyMemoryOptions::missing, for all pages of the block (contract); no bit is cleared.
  void missing(BlockId block, std::span<std::uint64_t> bitmap) const noexcept {
    const std::size_t page_bytes = shared_.store.page_bytes();
    for (const auto& part : shared_.layout.parts()) {
      if (part.block != block) continue;
      for (std::uint64_t unit = part.first_unit; unit < part.end_unit(); ++unit) {
        const PageState state = shared_.states.state(unit);
        if (state == PageState::zero || state == PageState::placed) continue;
        const PageRange range = part.range({unit, 1});
        for (std::uint64_t page = range.offset / page_bytes; page < range.end() / page_bytes; ++page)
          bitmap[page / 64] |= std::uint64_t{1} << page % 64;
      }
    }
  }

 private:
  static constexpr unsigned most_threads = 64;

  LazyMemory(Userfaultfd userfaultfd, detail::LazyLayout layout, PageStates states, PageStore& store,
             LazyMemoryOptions&& options)
      : shared_(std::move(userfaultfd), std::move(layout), std::move(states), store, std::move(options)),
        opener_(shared_) {}

  [[nodiscard]] static Result<void> check_options(const LazyMemoryOptions& options, const PageStore& store) {
    const auto refuse = [](const char* name, std::uint64_t value, std::uint64_t most, std::string_view subject = {}) {
      return fail(Errc::bad_option, Stage::setup, name, value, most, subject);
    };
    if (options.fault_threads < 1 || options.fault_threads > most_threads)
      return refuse("fault_threads", options.fault_threads, most_threads);
    if (options.workers > most_threads) return refuse("workers", options.workers, most_threads);
    if (options.worker_nice > 19) return refuse("worker_nice", options.worker_nice, 19);
    if (!options.urgent_lane && options.workers == 0) return refuse("urgent_lane: needs workers without", 0, 0);
    if (options.missing.size() > store.blocks().size())
      return refuse("missing", options.missing.size(), store.blocks().size());
    for (std::size_t i = 0; i < options.missing.size(); ++i) {
      const std::size_t words = bitmap_words(store.blocks()[i].bytes / store.page_bytes());
      if (!options.missing[i].empty() && options.missing[i].size() < words)
        return refuse("missing", options.missing[i].size(), words, store.blocks()[i].idstr);
    }
    for (const PageRange& range : options.prefetch) {
      if (index(range.block) >= store.blocks().size())
        return refuse("prefetch", index(range.block), store.blocks().size());
      const StoreBlock& block = store.blocks()[index(range.block)];
      if (range.offset > block.bytes || range.bytes > block.bytes - range.offset || range.bytes == 0)
        return refuse("prefetch", range.offset, block.bytes, block.idstr);
    }
    return {};
  }

  static void mark_missing(const detail::LazyLayout& layout, PageStates& states, const LazyMemoryOptions& options,
                           const PageStore& store) {
    const std::size_t page_bytes = store.page_bytes();
    for (const auto& part : layout.parts()) {
      const std::size_t block = index(part.block);
      const bool all = block >= options.missing.size() || options.missing[block].empty();
      for (std::uint64_t unit = part.first_unit; unit < part.end_unit(); ++unit) {
        const PageRange range = part.range({unit, 1});
        bool missing = all;
        for (std::uint64_t page = range.offset / page_bytes; !missing && page < range.end() / page_bytes; ++page)
          missing = (options.missing[block][page / 64] >> page % 64 & 1) != 0;
        if (missing) states.mark_missing(unit);
      }
    }
  }

  [[nodiscard]] Result<void> prepare() {
    MULTIFD_TRY(shared_.add_sleepers());
    for (const PageRange& range : shared_.options.prefetch)
      shared_.layout.for_range(range, [this](detail::UnitRun run) {
        shared_.plan.add_prefetch(run);
        return true;
      });
    for (unsigned i = 0; i < shared_.options.fault_threads; ++i) {
      MULTIFD_TRY_ASSIGN(auto made, detail::FaultThread::create(shared_, i));
      fault_threads_.push_back(std::move(made));
    }
    for (unsigned i = 0; i < shared_.options.workers; ++i) {
      MULTIFD_TRY_ASSIGN(auto made, detail::FetchWorker::create(shared_, i));
      workers_.push_back(std::move(made));
    }
    threads_.reserve(1 + fault_threads_.size() + workers_.size());
    if (shared_.options.registration == RegionRegistration::here)
      for (const auto& part : shared_.layout.parts())
        MULTIFD_TRY(shared_.userfaultfd.register_range(part.address, part.bytes, part.mode));
    return {};
  }

  [[nodiscard]] Result<void> start_threads() {
    const ThreadHook& hook = shared_.options.thread_hook;
    for (std::uint32_t i = 0; i < fault_threads_.size(); ++i) {
      MULTIFD_TRY_ASSIGN(auto thread, Thread::start(*fault_threads_[i], hook, {.role = "fault", .channel = i}));
      threads_.push_back(std::move(thread));
    }
    MULTIFD_TRY_ASSIGN(auto opener, Thread::start(opener_, hook, {.role = "lazy", .channel = 0}));
    threads_.push_back(std::move(opener));
    for (std::uint32_t i = 0; i < workers_.size(); ++i) {
      MULTIFD_TRY_ASSIGN(auto thread, Thread::start(*workers_[i], hook, {.role = "page", .channel = i}));
      threads_.push_back(std::move(thread));
    }
    return {};
  }

  detail::LazyShared shared_;
  std::vector<std::unique_ptr<detail::FaultThread>> fault_threads_;
  std::vector<std::unique_ptr<detail::FetchWorker>> workers_;
  detail::LaneOpener opener_;
  std::vector<Thread> threads_;  ///< last: joined before what they use goes away
};

}  // namespace multifd::postcopy
