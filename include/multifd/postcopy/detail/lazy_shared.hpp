// SPDX-License-Identifier: MIT
//
// What all threads of a LazyMemory share, and how it ends.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "multifd/engine/first_error.hpp"
#include "multifd/engine/monitor.hpp"
#include "multifd/engine/sleepers.hpp"
#include "multifd/postcopy/detail/fault_queues.hpp"
#include "multifd/postcopy/detail/fetch_pipe.hpp"
#include "multifd/postcopy/detail/fetch_plan.hpp"
#include "multifd/postcopy/detail/latency_counters.hpp"
#include "multifd/postcopy/detail/lazy_counters.hpp"
#include "multifd/postcopy/detail/lazy_layout.hpp"
#include "multifd/postcopy/lazy_memory_options.hpp"
#include "multifd/postcopy/page_states.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/postcopy/placement_gate.hpp"
#include "multifd/postcopy/userfaultfd.hpp"

namespace multifd::postcopy::detail {

/// Keeps the status, and tells the hook of its changes in their order. Threads: any.
class StatusKeeper {
 public:
  explicit StatusKeeper(LazyMemoryHook hook) : hook_(std::move(hook)) {}

  LazyMemoryStatus status() const noexcept { return status_.load(std::memory_order_relaxed); }

  void fetcher_opened() noexcept {
    const std::lock_guard held(mutex_);
    if (++fetchers_ == 1) change(LazyMemoryStatus::active, nullptr);
  }
  void fetcher_lost(const Error& error) noexcept {
    const std::lock_guard held(mutex_);
    if (--fetchers_ == 0) change(LazyMemoryStatus::paused, &error);
  }
  /// The last change.
  void end(LazyMemoryStatus status, const Error* error) noexcept {
    const std::lock_guard held(mutex_);
    change(status, error);
    ended_ = true;
  }

 private:
  void change(LazyMemoryStatus status, const Error* error) noexcept {
    if (ended_) return;
    status_.store(status, std::memory_order_relaxed);  // for show
    if (hook_) hook_({status, error});
  }

  std::mutex mutex_;
  const LazyMemoryHook hook_;
  std::atomic<LazyMemoryStatus> status_{LazyMemoryStatus::opened};
  unsigned fetchers_ = 0;
  bool ended_ = false;
};

/// Threads: any, all methods.
class LazyShared {
 public:
  LazyShared(Userfaultfd fd, LazyLayout units, PageStates known, PageStore& pages, LazyMemoryOptions&& wanted)
      : options(std::move(wanted)),
        userfaultfd(std::move(fd)),
        layout(std::move(units)),
        states(std::move(known)),
        store(pages),
        plan(layout, states, options.neighbours),
        record(options.record ? layout.units() : 0),
        status(options.on_event),
        error([this] { stop(); }) {}
  LazyShared(const LazyShared&) = delete;
  LazyShared& operator=(const LazyShared&) = delete;

  const LazyMemoryOptions options;
  const Userfaultfd userfaultfd;
  const LazyLayout layout;
  PageStates states;
  PageStore& store;
  FetchPlan plan;
  PlacementGate placement;  ///< in use where the userfaultfd tells of removals
  std::mutex reading;       ///< the same: one thread at a time reads
  UrgentGate urgent;
  LazyCounters counters;
  LatencyCounters latency;
  FaultRecord record;
  StatusKeeper status;
  engine::Monitor monitor;  ///< guards what is said of it below
  engine::FirstError error;

  /// Whether memory can be given back, moved or unmapped with an event.
  bool tells_removals() const noexcept {
    return (userfaultfd.features() & (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)) != 0;
  }

  // ---- How it ends
  enum class Phase : std::uint8_t {
    running,
    all_known,  ///< nothing has to be fetched any more; the userfaultfd lets go of the regions
    over,
  };
  Phase phase() const noexcept { return phase_.load(std::memory_order_acquire); }  // meets all_known(), set_over()
  bool running() const noexcept { return phase() == Phase::running; }
  bool over() const noexcept { return phase() == Phase::over; }

  /// All pages are placed or known to be zero: nobody has to fetch any more.
  void all_known() noexcept {
    Phase expected = Phase::running;
    // Release: meets phase(); acquire: meets set_over().
    if (!phase_.compare_exchange_strong(expected, Phase::all_known, std::memory_order_acq_rel)) return;
    end_fetching();
  }
  /// The regions are let go.
  void complete() noexcept {
    set_over();
    status.end(LazyMemoryStatus::complete, nullptr);
    monitor.update([this] { complete_ = true; });
  }
  bool completed(const engine::Monitor::Lock&) const noexcept { return complete_; }
  /// An error has stopped everything, and has been told.
  bool failed(const engine::Monitor::Lock&) const noexcept { return failed_; }
  bool completed() const noexcept {
    const auto held = monitor.lock();
    return complete_;
  }

  // ---- Threads that sleep
  /// Before there are threads. Errors: ENOMEM, EMFILE.
  [[nodiscard]] Result<void> add_sleepers() {
    return catch_bad_alloc(Stage::setup, "LazyMemory", [&]() -> Result<void> {
      lanes = std::vector<FetcherSlot>(options.fault_threads);
      fetchers = std::vector<FetcherSlot>(options.workers);
      worker_signals = std::vector<engine::Signal>(options.workers);
      fault_wakes.reserve(options.fault_threads);
      for (unsigned i = 0; i < options.fault_threads; ++i) {
        auto wake = FaultWake::create();
        if (!wake) return std::unexpected(wake.error());
        fault_wakes.push_back(std::move(*wake));
      }
      return {};
    });
  }
  /// There is something for who fetches what others have asked for: workers; where there are none, fault threads.
  void wake_fetchers() noexcept {
    for (engine::Signal& signal : worker_signals) signal.send();
    if (options.workers == 0)
      for (FaultWake& wake : fault_wakes) wake.send();
  }
  /// Asks the opener for a lane's fetcher.
  void want_lane(unsigned fault_thread) noexcept {
    monitor.update([&] { wanted_lanes |= std::uint64_t{1} << fault_thread; });
  }

  /// An eventfd that a fault thread polls beside the userfaultfd.
  class FaultWake {
   public:
    [[nodiscard]] static Result<FaultWake> create() noexcept {
      FaultWake made(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      if (made.fd_ < 0) return fail_errno(Stage::setup, "eventfd");
      return made;
    }
    FaultWake(FaultWake&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    FaultWake& operator=(FaultWake&&) = delete;
    ~FaultWake() {
      if (fd_ >= 0) ::close(fd_);
    }
    void send() noexcept {
      const std::uint64_t one = 1;
      // Fails only when the count is full, and then there is something to read.
      [[maybe_unused]] const ssize_t written = ::write(fd_, &one, sizeof one);
    }
    /// Takes all that were sent.
    void clear() noexcept {
      std::uint64_t count = 0;
      [[maybe_unused]] const ssize_t got = ::read(fd_, &count, sizeof count);
    }
    int native_handle() const noexcept { return fd_; }

   private:
    explicit FaultWake(int fd) noexcept : fd_(fd) {}
    int fd_;
  };
  std::vector<FaultWake> fault_wakes;
  std::vector<FetcherSlot> lanes;     ///< of fault threads
  std::vector<FetcherSlot> fetchers;  ///< of workers
  std::vector<engine::Signal> worker_signals;
  std::uint64_t wanted_lanes = 0;  ///< by the monitor: a bit for each fault thread

 private:
  void end_fetching() noexcept {
    store.cancel();
    for (FetcherSlot& lane : lanes) lane.cancel();
    for (FetcherSlot& fetcher : fetchers) fetcher.cancel();
    wake_fetchers();
    monitor.notify();
  }
  void set_over() noexcept {
    phase_.store(Phase::over, std::memory_order_release);  // meets phase()
    for (FaultWake& wake : fault_wakes) wake.send();
  }
  /// What the first error does.
  void stop() noexcept {
    set_over();
    end_fetching();
    const Error why = error.get();
    const bool cancelled = why.code == Errc::cancelled;
    status.end(cancelled ? LazyMemoryStatus::cancelled : LazyMemoryStatus::failed, &why);
    monitor.update([this] { failed_ = true; });
  }

  std::atomic<Phase> phase_{Phase::running};
  bool complete_ = false;  ///< by the monitor, both
  bool failed_ = false;
};

}  // namespace multifd::postcopy::detail
