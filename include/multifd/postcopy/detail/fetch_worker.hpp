// SPDX-License-Identifier: MIT
//
// Fetches in the background what nobody waits for yet, and what faults wait for where fault threads cannot.
#pragma once

#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "multifd/postcopy/detail/fetch_pipe.hpp"
#include "multifd/postcopy/detail/lazy_shared.hpp"
#include "multifd/postcopy/detail/page_placer.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

/// How long an open() that has failed is not repeated.
inline constexpr std::chrono::milliseconds reopen_pause{20};

/// Threads: run() its own.
class FetchWorker {
 public:
  /// Errors: ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<FetchWorker>> create(LazyShared& shared, unsigned number) {
    MULTIFD_TRY_ASSIGN(auto pipe, FetchPipe::create(shared.layout, shared.store.page_bytes()));
    return catch_bad_alloc(Stage::setup, "allocate a worker", [&]() -> Result<std::unique_ptr<FetchWorker>> {
      std::unique_ptr<FetchWorker> made(new FetchWorker(shared, number, std::move(pipe)));
      auto placer = PagePlacer<FetchWorker>::create(shared, *made);
      if (!placer) return std::unexpected(placer.error());
      made->placer_.emplace(*std::move(placer));
      return made;
    });
  }

  void run() noexcept {
    // Of this thread alone: 0 is the caller. Where it is refused, it is no worse than without.
    if (shared_.options.worker_nice > 0)
      ::setpriority(PRIO_PROCESS, 0, ::getpriority(PRIO_PROCESS, 0) + static_cast<int>(shared_.options.worker_nice));
    auto done = work();
    if (!done && shared_.running()) shared_.error.raise(done.error());
  }

  // ---- for PagePlacer
  void before_placing() noexcept { let_urgent_pass(); }
  void layout_changes() const noexcept {
    // A fault thread reads the event, and who caused it has to run before pages can be placed again.
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }

 private:
  /// So long one step waits at most: with 64 KiB a step that is 32 MiB/s for each worker under a flood of faults.
  static constexpr std::chrono::milliseconds longest_gate_wait{2};
  /// The signals of what may come in the meantime may not be all there are: claims of others that come back.
  static constexpr std::chrono::milliseconds longest_idle{50};

  FetchWorker(LazyShared& shared, unsigned number, FetchPipe pipe) noexcept
      : shared_(shared), number_(number), pipe_(std::move(pipe)) {}

  [[nodiscard]] Result<void> work() {
    while (shared_.running()) {
      if (fetcher_ == nullptr) {
        MULTIFD_TRY(open());
        continue;
      }
      engine::Signal& signal = shared_.worker_signals[number_];
      const std::uint32_t ticket = signal.ticket();
      MULTIFD_TRY(ask());
      if (fetcher_ == nullptr) continue;
      if (pipe_.empty())
        signal.wait(ticket, longest_idle);
      else
        MULTIFD_TRY(take());
    }
    return {};
  }

  [[nodiscard]] Result<void> open() {
    auto opened = shared_.store.open(FetchKind::background);
    if (opened) {
      shared_.fetchers[number_].put(std::move(*opened));
      fetcher_ = shared_.fetchers[number_].get();
      shared_.status.fetcher_opened();
      return {};
    }
    if (!shared_.running()) return {};
    if (!shared_.store.may_return(opened.error())) return std::unexpected(opened.error());
    engine::Signal& signal = shared_.worker_signals[number_];
    signal.wait(signal.ticket(), reopen_pause);
    return {};
  }

  [[nodiscard]] Result<void> ask() {
    while (shared_.running() && pipe_.has_room(*fetcher_)) {
      // Pages that a fault waits for are for here only where there is no lane; they do not wait for those that have one.
      auto job = shared_.plan.next_demanded();
      if (!job) {
        if (shared_.urgent.closed() && !pipe_.empty()) return {};  // what was asked for comes meanwhile
        let_urgent_pass();
        job = shared_.plan.next();
      }
      if (!job) return {};
      if (auto done = pipe_.ask(*fetcher_, *job); !done) return lost(done.error());
    }
    return {};
  }

  [[nodiscard]] Result<void> take() {
    auto answer = pipe_.take(*fetcher_);
    if (!answer) return lost(answer.error());
    if (!*answer) return {};
    const FetchJob& job = (*answer)->job;
    MULTIFD_TRY_ASSIGN(const std::uint64_t placed, placer_->place(**answer));
    shared_.counters.background_pages.add(placed);
    if (job.why == FetchJob::Why::fault && placed > 0) shared_.latency.add(FaultClock::now() - job.since);
    return {};
  }

  [[nodiscard]] Result<void> lost(const Error& error) {
    if (!shared_.running()) {
      pipe_.drain([](const FetchJob&) {});  // nothing of it comes any more
      return {};
    }
    if (!shared_.store.may_return(error)) return std::unexpected(error);
    shared_.counters.lost_fetchers.add();
    fetcher_ = nullptr;
    shared_.fetchers[number_].drop();
    pipe_.drain([this](const FetchJob& job) {
      shared_.plan.give_back(job);
      if (job.why != FetchJob::Why::fault) return;
      // It is marked as wanted since it was first left to workers.
      const PageState state = shared_.states.want(job.run.first);
      if (state == PageState::absent || state == PageState::claimed)
        shared_.plan.demand().push({job.run.first, job.since});
    });
    shared_.status.fetcher_lost(error);
    shared_.wake_fetchers();
    return {};
  }

  void let_urgent_pass() noexcept {
    shared_.urgent.yield_if_recent();
    if (!shared_.urgent.closed()) return;
    const auto begin = FaultClock::now();
    shared_.urgent.wait(longest_gate_wait);
    shared_.counters.gate_waits.add();
    shared_.counters.gate_wait_ns.add(static_cast<std::uint64_t>((FaultClock::now() - begin).count()));
  }

  LazyShared& shared_;
  const unsigned number_;
  FetchPipe pipe_;
  std::optional<PagePlacer<FetchWorker>> placer_;
  PageFetcher* fetcher_ = nullptr;
};

}  // namespace multifd::postcopy::detail
