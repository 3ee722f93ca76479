// SPDX-License-Identifier: MIT
//
// Reads what happens to the guest's memory, and gets the pages that its threads wait for: with a fetcher of its own, so that
// a fault costs this thread's waking and the guest's, and no other.
#pragma once

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <utility>

#include "multifd/postcopy/detail/fetch_pipe.hpp"
#include "multifd/postcopy/detail/lazy_shared.hpp"
#include "multifd/postcopy/detail/page_placer.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

/// Threads: run() its own.
class FaultThread {
 public:
  /// Errors: ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<FaultThread>> create(LazyShared& shared, unsigned number) {
    MULTIFD_TRY_ASSIGN(auto pipe, FetchPipe::create(shared.layout, shared.store.page_bytes()));
    return catch_bad_alloc(Stage::setup, "allocate a fault thread", [&]() -> Result<std::unique_ptr<FaultThread>> {
      std::unique_ptr<FaultThread> made(new FaultThread(shared, number, std::move(pipe)));
      auto placer = PagePlacer<FaultThread>::create(shared, *made);
      if (!placer) return std::unexpected(placer.error());
      made->placer_.emplace(*std::move(placer));
      return made;
    });
  }

  void run() noexcept {
    if (shared_.options.urgent_lane) shared_.want_lane(number_);
    auto done = serve();
    if (!done) shared_.error.raise(done.error());
    // Who gives memory back meanwhile waits until its event has been read. The kernel lets nobody place from before there is
    // one until then.
    const auto end = FaultClock::now() + longest_farewell;
    while (!shared_.error.failed() && FaultClock::now() < end &&
           (read_events().value_or(0) > 0 || shared_.userfaultfd.layout_changes()))
      std::this_thread::yield();
  }

  // ---- for PagePlacer
  void before_placing() noexcept {}
  void layout_changes() noexcept {
    // The event may have been read by another thread, and who caused it has to run before pages can be placed again.
    const auto got = read_events();
    if (got && *got == 0) std::this_thread::yield();
  }

 private:
  using Kind = UserfaultfdEvent::Kind;
  static constexpr std::size_t most_new = 4 * Userfaultfd::most_at_once;
  /// How many units are placed beside a fault's between two looks for the next one: as many as take about as long as
  /// decompressing them has. With fewer a guest that reads on waits again and again, and frames are decompressed twice.
  static constexpr std::uint64_t at_once = 64;
  /// So long at the end for who gives memory back just then, and may not run for a while.
  static constexpr std::chrono::seconds longest_farewell{1};

  FaultThread(LazyShared& shared, unsigned number, FetchPipe pipe) noexcept
      : shared_(shared), number_(number), pipe_(std::move(pipe)) {}

  [[nodiscard]] Result<void> serve() {
    while (!shared_.over()) {
      if (new_count_ == 0 && waiting_count_ == 0 && pipe_.empty()) MULTIFD_TRY(sleep());
      MULTIFD_TRY(read_events());
      MULTIFD_TRY(handle_new());
      MULTIFD_TRY(fetch());
    }
    return {};
  }

  /// Until there is something to read, or a wake.
  [[nodiscard]] Result<void> sleep() {
    auto& wake = shared_.fault_wakes[number_];
    std::array<pollfd, 3> entries{{{shared_.userfaultfd.native_handle(), POLLIN, 0},
                                   {wake.native_handle(), POLLIN, 0},
                                   {shared_.options.pidfd, POLLIN, 0}}};  // poll() passes over -1
    if (::poll(entries.data(), entries.size(), -1) < 0) {
      if (errno == EINTR) return {};
      return fail_errno(Stage::read, "poll a userfaultfd");
    }
    if (entries[1].revents != 0) wake.clear();
    if (entries[2].revents != 0 && shared_.running()) return fail(Errc::guest_gone, Stage::read, "pidfd");
    if ((entries[0].revents & (POLLERR | POLLNVAL)) != 0)
      return fail(Errc::not_userfaultfd, Stage::read, "poll a userfaultfd");
    return {};
  }

  /// Reads events: removals are noted at once, faults kept. Returns how many.
  [[nodiscard]] Result<std::size_t> read_events() {
    std::array<UserfaultfdEvent, Userfaultfd::most_at_once> events;
    if (!shared_.tells_removals()) return read_and_note(events);
    // A reader of removals waits for who is placing pages, which may be a thread that this one has just taken the processor
    // from. No fault is to wait for that. So whether there is a removal is asked first. Where there is none, poll() has told
    // of a fault, and the kernel gives faults first: what is read then is one, one at a time. Only when a worker has placed
    // that very page a moment ago, and a removal came in the same moment, it is read without the gate.
    const std::lock_guard held(shared_.reading);
    std::size_t sum = 0;
    while (sum < events.size()) {
      const bool removal = shared_.userfaultfd.layout_changes();
      if (removal) shared_.placement.begin_remove();
      const auto got = read_and_note(std::span(events).first(removal ? events.size() : 1));
      if (removal) shared_.placement.end_remove();
      if (!got) return got;
      sum += *got;
      if (*got == 0 || removal) break;
    }
    return sum;
  }

  [[nodiscard]] Result<std::size_t> read_and_note(std::span<UserfaultfdEvent> events) {
    MULTIFD_TRY_ASSIGN(const std::size_t got, shared_.userfaultfd.read(events));
    MULTIFD_TRY(note(events.first(got)));
    return got;
  }

  [[nodiscard]] Result<void> note(std::span<const UserfaultfdEvent> events) {
    for (const UserfaultfdEvent& event : events) {
      switch (event.kind) {
        case Kind::fault:
          shared_.counters.faults.add();
          if (new_count_ < new_.size())
            new_[new_count_++] = event;
          else  // it looks again, and faults again
            MULTIFD_TRY(shared_.userfaultfd.wake(event.address, 1));
          break;
        case Kind::removed:
        case Kind::unmapped:
          shared_.layout.for_addresses(event.address, event.address + event.bytes, [&](UnitRun run) {
            for (std::uint64_t unit = run.first; unit < run.end(); ++unit) {
              const auto was = shared_.states.remove(unit);
              // Who waits there faults again, and gets a zero page.
              if (was.wanted) wake(unit);
              if (was.all_known) shared_.all_known();
            }
            shared_.counters.removed_pages.add(run.count);
          });
          break;
        case Kind::remapped:
          return fail(Errc::not_supported, Stage::read, "guest memory whose pages are not there yet was moved (mremap)",
                      event.address);
        case Kind::forked: break;  // the child's memory is not ours
      }
    }
    return {};
  }

  void wake(std::uint64_t unit) const {
    const auto& part = shared_.layout.part_of(unit);
    // An error is the process' end, which the next call tells.
    static_cast<void>(shared_.userfaultfd.wake(part.address_of(unit), part.unit_bytes));
  }

  [[nodiscard]] Result<void> handle_new() {
    const auto now = FaultClock::now();
    // Handling may read more.
    for (std::size_t i = 0; i < new_count_; ++i) {
      const auto unit = shared_.layout.find(new_[i].address);
      if (!unit) return fail(Errc::bad_region, Stage::read, "fault outside of all regions", new_[i].address);
      MULTIFD_TRY(handle(*unit, new_[i].minor, now));
    }
    new_count_ = 0;
    return {};
  }

  [[nodiscard]] Result<void> handle(std::uint64_t unit, bool minor, FaultClock::time_point since) {
    for (;;) {
      switch (shared_.states.state(unit)) {
        case PageState::placed: shared_.counters.faults_there.add(); return again(unit, minor);
        case PageState::zero: {
          shared_.counters.faults_zero.add();
          shared_.record.add(unit);
          MULTIFD_TRY_ASSIGN(const std::uint64_t placed, placer_->place_zero(unit));
          if (placed > 0) {
            shared_.counters.urgent_pages.add();
            return {};
          }
          // Somebody else places it, or has; or the regions are being let go, which wakes everybody.
          if (!shared_.running()) return {};
          break;
        }
        case PageState::placing:
          // Who places it wakes whoever waits there; the mark is for the case that it has to begin anew.
          if (shared_.states.want(unit) != PageState::placing) break;
          shared_.counters.faults_there.add();
          return {};
        case PageState::absent:
        case PageState::claimed:
          if (!fetch_later({unit, since})) break;
          shared_.counters.faults_fetched.add();
          shared_.record.add(unit);
          shared_.plan.recent().push(unit);
          return {};
      }
    }
  }

  /// A page that is placed already, or was never missing: empty in the guest's memory, or not shown to it, or the event is an
  /// old one. None of the calls changes a page that is there, and each wakes.
  [[nodiscard]] Result<void> again(std::uint64_t unit, bool minor) {
    const auto& part = shared_.layout.part_of(unit);
    for (;;) {
      auto result = minor ? shared_.userfaultfd.continue_(part.address_of(unit), part.unit_bytes, part.unit_bytes)
                          : shared_.userfaultfd.zeropage(part.address_of(unit), part.unit_bytes, part.unit_bytes);
      if (!result && minor && result.error().code == std::errc::bad_address)
        return shared_.userfaultfd.wake(part.address_of(unit), part.unit_bytes);  // gone from memory meanwhile
      if (!result && !shared_.running()) return {};
      MULTIFD_TRY_ASSIGN(const std::uint64_t done, std::move(result));
      if (done > 0 || shared_.over()) break;
      layout_changes();
    }
    return {};
  }

  // ---- What has to be fetched

  /// With a lane this thread does, else the workers. False: what is known of the unit has changed.
  bool fetch_later(WaitingFault fault) noexcept {
    if (lane_ == nullptr) return leave_to_others(fault);
    if (waits_already(fault.unit)) return true;  // another thread of the guest waits there, too
    if (waiting_count_ == waiting_.size()) return leave_to_others(fault);
    add_waiting(fault);
    return true;
  }
  /// There has to be room (contract). From here on the background waits, until the fault's page is there.
  void add_waiting(WaitingFault fault) noexcept {
    waiting_[waiting_count_++] = fault;
    shared_.urgent.enter();
  }
  bool waits_already(std::uint64_t unit) const noexcept {
    const std::span<const WaitingFault> waiting(waiting_.data(), waiting_count_);
    return std::ranges::find(waiting, unit, &WaitingFault::unit) != waiting.end();
  }
  bool leave_to_others(WaitingFault fault) noexcept {
    const PageState state = shared_.states.want(fault.unit);
    if (state == PageState::zero || state == PageState::placed) return false;
    shared_.plan.demand().push(fault);
    shared_.wake_fetchers();
    return true;
  }

  /// Asks for all that faults wait for, as far as the fetcher takes it, and waits for one answer.
  [[nodiscard]] Result<void> fetch() {
    bool new_lane = false;
    if (lane_ == nullptr) {
      if (shared_.running()) lane_ = shared_.lanes[number_].get();
      if (lane_ == nullptr) return {};
      new_lane = true;
    }
    // What was left to others while there was no lane, by this thread and by others.
    while (waiting_count_ < waiting_.size() && shared_.plan.demand().pending()) {
      const auto job = shared_.plan.next_demanded();
      if (!job) break;
      add_waiting({job->run.first, job->since});
      if (job->claimed) static_cast<void>(shared_.states.give_back(job->run.first));
    }
    if (new_lane) ask_again();
    std::size_t asked = 0;
    while (asked < waiting_count_ && pipe_.has_room(*lane_)) {
      const WaitingFault& fault = waiting_[asked++];
      auto done = pipe_.ask(*lane_, {.run = {fault.unit, 1},
                                     .why = FetchJob::Why::fault,
                                     .claimed = shared_.states.claim(fault.unit),
                                     .since = fault.since});
      if (!done) {
        forget_waiting(asked);
        return lost(done.error());
      }
    }
    forget_waiting(asked);
    if (pipe_.empty()) return {};
    auto answer = pipe_.take(*lane_);
    if (!answer) return lost(answer.error());
    if (!*answer) return {};
    const FetchJob job = (*answer)->job;
    auto placed = placer_->place(**answer);
    shared_.urgent.leave();
    MULTIFD_TRY_ASSIGN(const std::uint64_t count, std::move(placed));
    shared_.latency.add(FaultClock::now() - job.since);
    shared_.counters.urgent_pages.add(count);
    shared_.counters.twice.add(1 - count);
    return place_fetched_together(job.run);
  }

  /// Places the pages that fetching one has brought near, while no fault waits: a frame that is decompressed for one page is
  /// for all of its pages then, and not once for each.
  [[nodiscard]] Result<void> place_fetched_together(UnitRun unit) {
    // Nothing but what is touched is wanted, or is to be noted.
    if (shared_.options.workers == 0 || shared_.options.record) return {};
    const PageRange page = shared_.layout.part_of(unit.first).range(unit);
    if (page.bytes > batch_bytes) return {};  // what it was cut into is several places
    const PageRange near = lane_->fetched_together(page);
    Result<void> done;
    if (near.bytes > page.bytes)
      shared_.layout.for_range(near, [&](UnitRun run) {
        if (shared_.layout.part_of(run.first).unit_bytes > batch_bytes) return true;
        while (done && lane_ != nullptr && new_count_ == 0 && waiting_count_ == 0 && pipe_.empty()) {
          const auto job = shared_.plan.claim(run, at_once);
          if (!job) return true;
          done = fetch_beside(*job);
        }
        return false;
      });
    return done;
  }
  [[nodiscard]] Result<void> fetch_beside(const FetchJob& job) {
    if (auto asked = pipe_.ask(*lane_, job); !asked) return lost(asked.error());
    auto answer = pipe_.take(*lane_);
    if (!answer) return lost(answer.error());
    if (!*answer) return {};
    MULTIFD_TRY_ASSIGN(const std::uint64_t count, placer_->place(**answer));
    shared_.counters.background_pages.add(count);
    MULTIFD_TRY(read_events());
    return {};
  }

  /// Behind the opening of a lane: what faults wait for may have been asked for in the background meanwhile, behind much else
  /// and under a cap. What comes twice is placed once.
  void ask_again() noexcept {
    const PageStates& states = shared_.states;
    for (std::uint64_t unit = 0; waiting_count_ < waiting_.size(); ++unit) {
      unit = states.next_wanted(unit, states.size());
      if (unit == states.size()) return;
      const PageState state = states.state(unit);
      if (state != PageState::absent && state != PageState::claimed) continue;
      if (waits_already(unit)) continue;
      add_waiting({unit, FaultClock::now()});
    }
  }

  void forget_waiting(std::size_t asked) noexcept {
    std::copy(waiting_.begin() + static_cast<std::ptrdiff_t>(asked),
              waiting_.begin() + static_cast<std::ptrdiff_t>(waiting_count_), waiting_.begin());
    waiting_count_ -= asked;
  }

  /// The lane's fetcher has failed: what faults wait for is left to the workers, until there is another one.
  [[nodiscard]] Result<void> lost(const Error& error) {
    const bool goes_on = shared_.running();
    if (goes_on && !shared_.store.may_return(error)) return std::unexpected(error);
    lane_ = nullptr;
    shared_.lanes[number_].drop();
    std::array<WaitingFault, 2 * most_new> left;
    std::size_t count = 0;
    pipe_.drain([&](const FetchJob& job) {
      shared_.plan.give_back(job);
      if (job.why == FetchJob::Why::fault) left[count++] = {job.run.first, job.since};
    });
    for (std::size_t i = 0; i < waiting_count_; ++i) left[count++] = waiting_[i];
    waiting_count_ = 0;
    shared_.urgent.leave(static_cast<std::uint32_t>(count));
    if (!goes_on) return {};  // nothing has to be fetched any more
    shared_.counters.lost_fetchers.add();
    shared_.status.fetcher_lost(error);
    shared_.want_lane(number_);
    for (const WaitingFault& fault : std::span(left).first(count))
      if (!leave_to_others(fault)) MULTIFD_TRY(handle(fault.unit, false, fault.since));
    return {};
  }

  LazyShared& shared_;
  const unsigned number_;
  FetchPipe pipe_;
  std::optional<PagePlacer<FaultThread>> placer_;
  PageFetcher* lane_ = nullptr;
  std::array<UserfaultfdEvent, most_new> new_{};  ///< faults that were read
  std::size_t new_count_ = 0;
  std::array<WaitingFault, most_new> waiting_{};  ///< that are not asked for
  std::size_t waiting_count_ = 0;
};

}  // namespace multifd::postcopy::detail
