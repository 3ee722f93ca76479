// SPDX-License-Identifier: MIT
//
// The memory of a destination's guest that follows (format/extension.md section 19.9): from MEMORY_FOLLOWS, ahead of the
// devices, which may touch what is missing, until all pages are there.
#pragma once

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/missing_pages.hpp"
#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/detail/missing_memory.hpp"
#include "multifd/migrate/detail/page_arrivals.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/postcopy/lazy_memory.hpp"
#include "multifd/postcopy/remote_pages.hpp"
#include "multifd/postcopy/userfaultfd.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/policy.hpp"

namespace multifd::migrate::detail {

/// Threads: one, the migration's. For one migration.
template <Transport T>
class FollowingMemory {
 public:
  /// Params: all outlive this object. `main`: the main connection's descriptor.
  FollowingMemory(const RamMap& ram, const MissingMemory& missing, PageArrivals<T>& arrivals,
                  const DestinationOptions& options, MigrationReporter& reporter, int main)
      : ram_(ram), missing_(missing), arrivals_(arrivals), options_(options), reporter_(reporter), main_(main) {}
  FollowingMemory(const FollowingMemory&) = delete;
  FollowingMemory& operator=(const FollowingMemory&) = delete;
  ~FollowingMemory() { take_down(); }

  /// Drops what is there of the missing pages, and gets them from now on, first of all those that are touched.
  /// Errors: those of MissingMemory, Userfaultfd, LazyMemory and RemotePages.
  [[nodiscard]] Result<void> open(const wire::MemoryFollows& follows) {
    for (unsigned others = arrivals_.expect(follows.session); others > 0 && options_.on_stranger; --others)
      options_.on_stranger("a page connection of another migration");
    session_ = follows.session;
    for (int tries = 0;; ++tries) {
      MULTIFD_TRY_ASSIGN(remote_, open_remote());
      MULTIFD_TRY(missing_.drop());
      MULTIFD_TRY(open_lazy(follows.connections));
      MULTIFD_TRY_ASSIGN(const bool empty, missing_.is_empty());
      if (empty) break;
      lazy_.reset();  // which has cancelled its store
      held_.reset();  // as long as it is open, and nobody reads it, drop() waits for ever
      constexpr int most_tries = 5;
      if (tries == most_tries)
        return fail(Errc::not_supported, Stage::setup, "memory of the guest that does not let go of its pages");
    }
    MULTIFD_TRY(lazy_->start());
    MULTIFD_TRY_ASSIGN(watch_, Thread::start(*this, no_hook_, {.role = "watch", .channel = 0}));
    return {};
  }

  /// The guest is this side's from now on, whatever becomes of the source. Errors: what was lost before.
  [[nodiscard]] Result<void> own() {
    watching_.stop();
    watch_.join();
    // What has failed a moment ago has not been seen by the own thread yet.
    if (!released_ && lazy_->status() != postcopy::LazyMemoryStatus::failed) return {};
    return fail(Errc::memory_lost, Stage::read, "the source was lost before it had handed the guest over");
  }

  /// Waits until all pages are there. Errors: Errc::memory_lost: threads of the guest that touch what is missing stand still
  ///   as long as frozen() is open.
  [[nodiscard]] Result<void> wait() {
    const Time begin = reporter_.now();
    Time paused{};
    Time last_reached = begin;
    Result<void> done;
    for (unsigned cancels = reporter_.cancels();;) {
      done = lazy_->wait(std::chrono::milliseconds(20));
      if (done || done.error().code != Errc::timed_out) break;
      reporter_.missing(lazy_->stats().remaining_pages);
      const bool reached = reaches_source();
      const bool was_lost = reporter_.is(MigrationStatus::postcopy_paused);
      const Time now = reporter_.now();
      if (!reached && !was_lost && now - last_reached > a_moment) {
        reporter_.end_status(MigrationStatus::postcopy_paused);
      } else if (reached && was_lost) {
        paused += now - last_reached;
        reporter_.end_status(MigrationStatus::postcopy_recover);
        reporter_.end_status(MigrationStatus::postcopy_active);
      }
      if (reached) last_reached = now;
      if (!was_lost) cancels = reporter_.cancels();
      if (reporter_.cancels() == cancels) continue;
      done = fail(Errc::memory_lost, Stage::read, "cancelled while the source was out of reach");
      break;
    }
    report(begin, paused);
    if (done) {
      reporter_.missing(0);
      held_.reset();
      return done;
    }
    Error error = done.error();
    if (error.code != Errc::memory_lost) {
      error.peer_reason = error.code;
      error.code = Errc::memory_lost;
    }
    return std::unexpected(error);
  }

  /// Tells the source that all pages are there, and waits until it has heard it. Errors: those of RemotePages::finish().
  [[nodiscard]] Result<void> tell_source(std::chrono::milliseconds limit) {
    lazy_.reset();  // which has cancelled its store
    deadline_ = deadline_after(limit);
    MULTIFD_TRY_ASSIGN(remote_, open_remote());
    return remote_->finish(limit);
  }

  PostcopyReport report() const noexcept { return report_; }
  /// What keeps threads of the guest standing still that need what is lost.
  std::optional<postcopy::Userfaultfd> frozen() noexcept { return std::exchange(held_, std::nullopt); }
  /// Keeps them so as long as this process lives.
  void freeze_for_ever() noexcept {
    if (auto held = frozen()) held->release();
  }

  // ---- The own thread, up to own()

  /// DestinationGuest::load() touches memory whose source may be gone: nobody but this thread sees that then.
  void run() noexcept {
    constexpr std::chrono::milliseconds tick{50};
    const auto limit = as_timeout(options_.hand_over_timeout);
    auto deadline = deadline_after(limit);
    auto held = watching_.lock();
    while (!watching_.stopped(held)) {
      static_cast<void>(watching_.wait_until(held, deadline_after(tick), [] { return false; }));
      if (watching_.stopped(held)) return;
      pollfd main{.fd = main_, .events = POLLRDHUP, .revents = 0};
      const bool gone = ::poll(&main, 1, 0) == 1 && (main.revents & (POLLRDHUP | POLLERR | POLLHUP)) != 0;
      if (reaches_source()) deadline = deadline_after(limit);
      const bool failed = lazy_->status() == postcopy::LazyMemoryStatus::failed;
      if (!gone && !failed && !reporter_.interrupt().triggered() && std::chrono::steady_clock::now() < deadline)
        continue;
      // Who waits for a page sees an empty one, and so would the guest: it is not run any more.
      released_ = true;
      lazy_->cancel();
      release();
      return;
    }
  }

 private:
  using Remote = postcopy::RemotePages<T>;

  [[nodiscard]] Result<std::unique_ptr<Remote>> open_remote() {
    postcopy::RemotePagesOptions<> options;
    options.session = session_;
    for (const RamBlock& block : ram_.blocks()) options.blocks.push_back({block.idstr, block.bytes});
    options.page_bytes = ram_.page_bytes();
    const auto connect = [this](postcopy::FetchKind kind, const Interrupt& stop) {
      const bool background = kind == postcopy::FetchKind::background;
      without_.fetch_add(background);
      auto link = arrivals_.take(stop, deadline_);
      without_.fetch_sub(background);
      return link;
    };
    return Remote::open(connect, std::move(options));
  }

  /// Whether there is a connection. An urgent one that is lost is not noticed before it is needed; the others always are.
  bool reaches_source() const noexcept {
    return lazy_->status() != postcopy::LazyMemoryStatus::paused && without_.load() < workers_;
  }

  [[nodiscard]] Result<void> open_lazy(unsigned connections) {
    MULTIFD_TRY_ASSIGN(auto faults,
                       postcopy::Userfaultfd::create(postcopy::Userfaultfd::default_features, kernel_faults));
    const int copy = copy_of(faults);
    if (copy < 0) return fail_errno(Stage::setup, "userfaultfd");
    MULTIFD_TRY_ASSIGN(held_, postcopy::Userfaultfd::adopt(copy));
    const DestinationPostcopyOptions& wanted = options_.postcopy;
    postcopy::LazyMemoryOptions options;
    options.urgent_lane = wanted.urgent_lane && connections > 1;
    options.fault_threads = options.urgent_lane ? std::min(wanted.fault_threads, connections - 1) : 1;
    options.workers = std::min(connections - (options.urgent_lane ? options.fault_threads : 0), most_workers);
    workers_ = options.workers;
    options.neighbours = wanted.neighbours;
    options.missing = missing_.bitmaps();
    for (std::size_t b = 0; b < options.missing.size(); ++b)
      if (options.missing[b].empty()) options.missing[b].resize(1);  // none: all of its pages
    MULTIFD_TRY_ASSIGN(lazy_,
                       postcopy::LazyMemory::open(std::move(faults), missing_.regions(), *remote_, std::move(options)));
    return {};
  }

  static int copy_of(const postcopy::Userfaultfd& faults) noexcept {
    return ::fcntl(faults.native_handle(), F_DUPFD_CLOEXEC, 0);
  }

  void release() const noexcept {
    for (const postcopy::LazyRegion& region : missing_.regions())
      static_cast<void>(held_->unregister(region.address, region.bytes));
  }

  void report(Time begin, Time paused) noexcept {
    const postcopy::LazyMemoryStats stats = lazy_->stats();
    report_ = {.missing_pages = missing_.count(),
               .urgent_pages = stats.urgent_pages,
               .background_pages = stats.background_pages,
               .zero_pages = stats.zero_pages,
               .faults = stats.faults,
               .latency = lazy_->latency(),
               .lost_fetchers = stats.lost_fetchers,
               .wire_bytes = remote_->stats().wire_bytes,
               .time = reporter_.now() - begin,
               .paused = paused};
  }

  void take_down() noexcept {
    watching_.stop();
    watch_.join();
    if (remote_) remote_->cancel();
    lazy_.reset();
    remote_.reset();
  }

  static constexpr postcopy::KernelFaults kernel_faults = postcopy::KernelFaults::required;
  static constexpr unsigned most_workers = 64;
  /// Lost connections are made again; the first ones are waited for at the beginning.
  static constexpr std::chrono::milliseconds a_moment{250};

  const RamMap& ram_;
  const MissingMemory& missing_;
  PageArrivals<T>& arrivals_;
  const DestinationOptions& options_;
  MigrationReporter& reporter_;
  const int main_;
  const ThreadHook no_hook_{};
  Uuid session_{};
  std::chrono::steady_clock::time_point deadline_ = deadline_after(no_timeout);  ///< of waiting for a connection
  unsigned workers_ = 0;               ///< that fetch in the background, each with a connection
  std::atomic<unsigned> without_ = 0;  ///< of these, that wait for one
  PostcopyReport report_{};
  std::optional<postcopy::Userfaultfd> held_;  ///< the same as that of lazy_
  std::unique_ptr<Remote> remote_;
  std::unique_ptr<postcopy::LazyMemory> lazy_;
  engine::Monitor watching_;  ///< stopped once the guest is this side's
  std::atomic<bool> released_ = false;
  Thread watch_;
};

}  // namespace multifd::migrate::detail
