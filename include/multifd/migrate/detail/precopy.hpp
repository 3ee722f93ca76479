// SPDX-License-Identifier: MIT
//
// The rounds of a source: what is dirty is re-armed and queued, chunk by chunk, then waited for, then the dirty bitmap is
// fetched, and Convergence decides. The last round has the guest stopped.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/detail/reporter.hpp"
#include "multifd/migrate/detail/source_stream.hpp"
#include "multifd/migrate/detail/unchanged_pages.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/thread.hpp"

namespace multifd::migrate::detail {

/// Threads: one, but for the last fetch. For one migration.
template <class Stacks, SourceGuest G>
class Precopy {
 public:
  /// Params: all outlive this object.
  Precopy(G& guest, const RamMap& ram, const SourceOptions& options, MigrationReporter& reporter,
          SourceStream<Stacks>& stream, MigrationReport& report)
      : guest_(guest),
        ram_(ram),
        options_(options),
        reporter_(reporter),
        stream_(stream),
        report_(report),
        dirty_(ram),
        other_(ram) {}
  Precopy(const Precopy&) = delete;
  Precopy& operator=(const Precopy&) = delete;

  /// Sends round by round with the guest running, until it is to be stopped: MigrationReport::switchover says for what.
  /// Errors: Errc::did_not_converge; those of Sender, DirtySource, MainStreamWriter and the return path.
  [[nodiscard]] Result<void> run() {
    MULTIFD_TRY_ASSIGN(Rounds convergence, create_convergence());
    MULTIFD_TRY(start_tracking());
    for (Time sync{};;) {
      other_ = dirty_;
      MULTIFD_TRY_ASSIGN(Round round, send_round(convergence));
      round.sync = sync;
      const Time fetching = reporter_.now();
      MULTIFD_TRY(fetch_all(guest_.dirty_source(), dirty_));
      sync = reporter_.now() - fetching;
      take_lost();
      const std::uint64_t pages = dirty_.count();
      if (reporter_.switchover_asked()) convergence.ask_for_switchover();
      const Decision decision = convergence.round_ended(with_bytes(round), round.send, sync, pages, reporter_.now());
      round.pages_per_s = convergence.bandwidth().pages_per_s();
      round.dirty_pages_per_s = convergence.dirty_rate().pages_per_s();
      round.again_pages = dirty_.in_both(other_);
      round.predicted_downtime = decision.downtime.total();
      report_.rounds.push_back(round);
      reporter_.round_ended(round, decision);
      throttle(decision.throttle_percent);
      report_.switchover = decision;
      if (decision.action == Action::switch_now || decision.action == Action::memory_on_demand) {
        other_.clear();  // for the last fetch, and now, because the guest still runs
        return {};
      }
      if (decision.action != Action::go_on)
        return fail(Errc::did_not_converge, Stage::produce, to_string(decision.reason), pages);
    }
  }

  /// Instead of rounds: says which pages are zero, as far as that is known without a look at them. Errors: as run().
  [[nodiscard]] Result<void> send_no_round() {
    MULTIFD_TRY(start_tracking());
    Round round{.begin = reporter_.now(), .dirty_pages = dirty_.count()};
    reporter_.round_begun(0, 0);
    const Moved before = stream_.moved();
    MULTIFD_TRY(begin_round(0));
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, stream_.close_epoch());
    MULTIFD_TRY(stream_.sender().wait(epoch));
    round.dirty_pages -= dirty_.count();
    round.send = reporter_.now() - round.begin;
    count(round, before);
    report_.rounds.push_back(round);
    report_.switchover = {.action = Action::memory_on_demand, .reason = Reason::at_once};
    reporter_.round_ended(round, report_.switchover);
    return {};
  }

  /// Ends RAM without the pages that are dirty, of a guest that stands still. Returns which these are: valid as long as this
  /// object. Errors: as run().
  [[nodiscard]] Result<const DirtyBitmaps*> send_no_last_round() {
    MULTIFD_TRY(stream_.writer.switchover_start());
    MULTIFD_TRY(stream_.writer.begin_end());
    const Time fetching = reporter_.now();
    MULTIFD_TRY(fetch_all(guest_.dirty_source(), dirty_));
    report_.downtime.sync = reporter_.now() - fetching;
    MULTIFD_TRY(stream_.settle());
    take_lost();
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, stream_.close_epoch());
    MULTIFD_TRY(stream_.sender().wait(epoch));
    return &dirty_;
  }

  /// Sends the rest of a guest that stands still. What is known to be dirty goes out while the bitmap is fetched once more:
  /// on a guest with much memory or many devices that takes as long as the pages do. Errors: as run().
  [[nodiscard]] Result<void> send_last_round() {
    Round round{.number = report_.rounds.size(), .begin = reporter_.now(), .dirty_pages = dirty_.count()};
    const Moved before = stream_.moved();
    LastFetch fetch{*this, other_};
    MULTIFD_TRY(stream_.writer.switchover_start());
    // Where connections return END has no page: what is lost of the last ones has to come ahead of it.
    MULTIFD_TRY(stream_.resumes() ? stream_.writer.begin_part() : stream_.writer.begin_end());
    {
      MULTIFD_TRY_ASSIGN(Thread fetching, Thread::start(fetch, no_hook_, {.role = "dirty", .channel = 0}));
      MULTIFD_TRY(queue_all());
      const Time queued = reporter_.now();
      fetching.join();
      report_.downtime.sync = reporter_.now() - queued;
    }
    MULTIFD_TRY(fetch.fetched);
    round.sync = fetch.time;
    // The guest stands still: what has gone out is what it is.
    other_.remove(dirty_);
    std::swap(dirty_, other_);
    round.dirty_pages += dirty_.count();
    reporter_.round_begun(round.number, round.dirty_pages);
    MULTIFD_TRY(queue_all());
    MULTIFD_TRY(close_and_wait());
    if (stream_.resumes()) {
      MULTIFD_TRY(send_lost());
    }
    round.send = reporter_.now() - round.begin;
    count(round, before);
    report_.rounds.push_back(round);
    return {};
  }

  /// The guest is as fast as before the migration.
  void release() noexcept {
    throttle(0);
    if (std::exchange(tracking_, false)) static_cast<void>(guest_.dirty_source().stop());
  }

 private:
  using Rounds = Convergence<AnySwitchRule, AnyThrottleRule>;

  [[nodiscard]] Result<void> close_and_wait() {
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, stream_.close_epoch());
    return stream_.sender().wait(epoch);
  }

  /// What was lost with connections is dirty again, whatever was sent of it.
  void take_lost() {
    if (!stream_.resumes()) return;
    DirtyBitmaps lost(ram_);
    stream_.take_lost(lost);
    if (unchanged_) unchanged_->forget(lost);
    dirty_.add(lost);
  }

  /// Sends what was lost of the last pages until nothing is, and then END.
  [[nodiscard]] Result<void> send_lost() {
    for (;;) {
      MULTIFD_TRY(stream_.settle());
      dirty_.clear();
      take_lost();
      const bool lost = dirty_.count() > 0;
      MULTIFD_TRY(lost ? stream_.writer.begin_part() : stream_.writer.begin_end());
      MULTIFD_TRY(queue_all());
      MULTIFD_TRY(close_and_wait());
      if (!lost) return {};
    }
  }

  /// The fetch behind pause(), in a thread of its own.
  struct LastFetch {
    Precopy& precopy;
    DirtyBitmaps& into;
    Result<void> fetched{};
    Time time{};

    void run() noexcept {
      const Time began = precopy.reporter_.now();
      fetched = fetch_all(precopy.guest_.dirty_source(), into);
      time = precopy.reporter_.now() - began;
    }
  };

  [[nodiscard]] Result<Rounds> create_convergence() const {
    const ConvergeOptions& converge = options_.converge;
    const bool on_demand = stream_.memory_may_follow();
    // To a destination that cannot do it, memory on demand is as if there was no strategy.
    const Action at_time_limit =
        converge.at_time_limit == Action::memory_on_demand && !on_demand ? Action::give_up : converge.at_time_limit;
    return Rounds::create({.time_limit = converge.time_limit,
                           .at_time_limit = at_time_limit,
                           .max_rounds = converge.max_rounds,
                           .device_state = converge.device_state,
                           .round_trip = std::chrono::ceil<std::chrono::microseconds>(2 * stream_.round_trip()),
                           .on_demand_above = on_demand ? std::optional(converge.max_downtime) : std::nullopt},
                          converge.rule.value_or(PricedDowntime({.price = {.max_downtime = converge.max_downtime}})),
                          converge.throttle);
  }

  /// From here on every write is reported, and every page is to be sent but those that are untouched.
  [[nodiscard]] Result<void> start_tracking() {
    auto& source = guest_.dirty_source();
    MULTIFD_TRY(source.start());
    tracking_ = true;
    dirty_.fill(ram_);
    if (options_.skip_unchanged) {
      MULTIFD_TRY_ASSIGN(unchanged_, UnchangedPages::create(ram_, is_capped()));
    }
    const bool knows_zeros = stream_.zero_pages() != wire::ZeroPagesMode::none;
    if (!knows_zeros && !stream_.has_base()) return {};
    // What is asked for zeros, and compared, from here on is watched: a write that comes later is reported.
    MULTIFD_TRY(rearm_all(source, dirty_, options_.rearm_pages));
    if (knows_zeros && options_.find_untouched) untouched_ = untouched_in(ram_);
    return stream_.has_base() ? leave_out_equal(knows_zeros) : Result<void>{};
  }

  /// What the destination's older copy has as it is here need not be sent.
  [[nodiscard]] Result<void> leave_out_equal(bool knows_zeros) {
    DirtyBitmaps zeros = untouched_ ? *untouched_ : DirtyBitmaps(ram_);
    if (knows_zeros) {
      MULTIFD_TRY(add_known_zeros(guest_, zeros));
    }
    MULTIFD_TRY_ASSIGN(report_.base, stream_.compare_with_base(zeros, dirty_));
    return {};
  }

  /// Sends what is dirty with the guest running, and waits until it is written. When the time limit passes meanwhile, the
  /// rest stays dirty.
  [[nodiscard]] Result<Round> send_round(const Rounds& convergence) {
    Round round{.number = report_.rounds.size(), .begin = reporter_.now(), .dirty_pages = dirty_.count()};
    reporter_.round_begun(round.number, round.dirty_pages);
    const Moved before = stream_.moved();
    MULTIFD_TRY(begin_round(round.number));
    bool late = false;
    for (std::uint32_t b = 0; b < dirty_.blocks() && !late; ++b) {
      const BlockId block{b};
      const auto on_chunk = [&](std::uint64_t first_page, std::span<const std::uint64_t> chunk) -> Result<void> {
        late = late || convergence.while_sending(reporter_.now()).action != Action::go_on;
        if (late) return {};
        MULTIFD_TRY(queue_chunk(block, first_page, chunk, round.number > 0 || is_capped()));
        std::ranges::fill(dirty_[block].subspan(first_page / 64, chunk.size()), 0);
        return stream_.return_path.poll(&reporter_.interrupt());
      };
      MULTIFD_TRY(rearm_chunks(guest_.dirty_source(), block, dirty_[block], options_.rearm_pages, on_chunk));
    }
    MULTIFD_TRY_ASSIGN(const std::uint64_t epoch, stream_.close_epoch());
    MULTIFD_TRY(stream_.sender().wait(epoch));
    if (unchanged_) unchanged_->round_ended();
    round.dirty_pages -= dirty_.count();
    round.send = reporter_.now() - round.begin;
    count(round, before);
    return round;
  }

  /// The pages of a round by which the bandwidth for the pages that the guest dirties is told. Most of a guest's memory may be
  /// zero, and zero pages take no time; what it dirties is not, and in later rounds is what it was in those before.
  static std::uint64_t with_bytes(const Round& round) noexcept {
    return round.number == 0 && round.normal_pages > 0 ? round.normal_pages : round.dirty_pages;
  }

  /// Whether the cap leaves the producer time. Then a page is hashed when it is first sent, and need not be sent twice to be known.
  bool is_capped() const noexcept {
    constexpr std::uint64_t producer_bytes_per_s = 1'000'000'000;  // a few times as much are copied and hashed
    return options_.bandwidth != 0 && options_.bandwidth <= producer_bytes_per_s;
  }

  /// Queues a chunk; where connections return in pieces, with epochs that end between them.
  [[nodiscard]] Result<void> queue_chunk(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> chunk,
                                         bool hashed) {
    constexpr std::size_t piece_words = 32;
    while (stream_.resumes() && chunk.size() > piece_words) {
      MULTIFD_TRY(queue(block, first_page, chunk.first(piece_words), hashed));
      chunk = chunk.subspan(piece_words);
      first_page += 64 * piece_words;
      MULTIFD_TRY(stream_.return_path.poll(&reporter_.interrupt()));
      if (!stream_.should_close_epoch()) continue;
      MULTIFD_TRY(stream_.close_epoch());
      MULTIFD_TRY(stream_.writer.begin_part());
    }
    return queue(block, first_page, chunk, hashed);
  }

  /// Queues the pages of a chunk. Params `hashed`: those that are as they were last
  /// sent are left out, where that was asked for.
  [[nodiscard]] Result<void> queue(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> chunk,
                                   bool hashed) {
    if (unchanged_ && hashed) {
      MULTIFD_TRY(unchanged_->queue(stream_.sender(), block, first_page, chunk, stream_.zero_record(block)));
    } else {
      MULTIFD_TRY(stream_.sender().queue_dirty(block, chunk, first_page, stream_.zero_record(block)));
    }
    if (unchanged_) stream_.unchanged_pages.store(unchanged_->skipped(), std::memory_order_relaxed);
    return {};
  }

  /// Queues all that is dirty, of a guest that stands still: nothing is re-armed, nothing copied.
  [[nodiscard]] Result<void> queue_all() {
    for (std::uint32_t b = 0; b < dirty_.blocks(); ++b) {
      const BlockId block{b};
      const std::span<const std::uint64_t> dirty = dirty_[block];
      MULTIFD_TRY(queue(block, 0, unchanged_ ? unchanged_->changed(block, dirty) : dirty, false));
    }
    return {};
  }

  /// Whether it is asked which pages are zero without reading them. Behind the first round only the guest can say it, and not
  /// with a log that is re-armed later, which would report those pages for ever.
  bool may_know_zeros(std::uint64_t round) const noexcept {
    if (stream_.zero_pages() == wire::ZeroPagesMode::none) return false;
    return round == 0 || (HasKnownZeros<G> && !guest_.dirty_source().needs_rearm());
  }

  /// Begins a round's section. What is known to be zero goes out first, without a look at it, and is dirty no more: all that
  /// was never touched, or what the guest says. Such a page stays armed since start_tracking(): a write to it is reported.
  [[nodiscard]] Result<void> begin_round(std::uint64_t number) {
    if (!may_know_zeros(number)) return stream_.writer.begin_part();
    DirtyBitmaps zeros = untouched_ ? *std::exchange(untouched_, std::nullopt) : DirtyBitmaps(ram_);
    MULTIFD_TRY(add_known_zeros(guest_, zeros));
    zeros.keep(dirty_);
    if (unchanged_) unchanged_->forget(zeros);
    const bool by_bitmap = stream_.takes_known_zeros();
    for (std::uint32_t b = 0; b < zeros.blocks() && by_bitmap; ++b) {
      MULTIFD_TRY(stream_.say_zeros(BlockId{b}, zeros[BlockId{b}]));
    }
    MULTIFD_TRY(stream_.writer.begin_part());
    for (std::uint32_t b = 0; b < zeros.blocks() && !by_bitmap; ++b) {
      const BlockId block{b};
      MULTIFD_TRY(for_each_run_in_both(zeros[block], zeros[block], [&](std::uint64_t page, std::uint64_t pages) {
        return stream_.sender().queue_zeros(block, page * ram_.page_bytes(), pages * ram_.page_bytes(),
                                            stream_.zero_record(block));
      }));
    }
    dirty_.remove(zeros);
    return {};
  }

  void throttle(unsigned percent) noexcept {
    if (percent == throttled_) return;
    throttled_ = percent;
    if constexpr (HasThrottle<G>) guest_.throttle(percent);
  }

  void count(Round& round, const Moved& before) const {
    const Moved now = stream_.moved();
    round.normal_pages = now.normal_pages - before.normal_pages;
    round.zero_pages = now.zero_pages - before.zero_pages;
    round.wire_bytes = now.wire_bytes - before.wire_bytes;
    round.unchanged_pages = now.unchanged_pages - before.unchanged_pages;
    round.bound = bounded_by(stream_.sender().stats());
  }

  G& guest_;
  const RamMap& ram_;
  const SourceOptions& options_;
  MigrationReporter& reporter_;
  SourceStream<Stacks>& stream_;
  MigrationReport& report_;
  DirtyBitmaps dirty_;  ///< what is to be sent
  DirtyBitmaps other_;  ///< what was to be sent in this round; in the last one, what the last fetch finds beside that
  std::optional<DirtyBitmaps> untouched_;  ///< ahead of the first round; stale with the next one
  std::optional<UnchangedPages> unchanged_;
  const ThreadHook no_hook_{};  ///< SourceOptions::thread_hook is for the channels
  bool tracking_ = false;
  unsigned throttled_ = 0;
};

}  // namespace multifd::migrate::detail
