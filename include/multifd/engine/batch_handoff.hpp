// SPDX-License-Identifier: MIT
//
// How batches pass from the producer to the channels' workers and back.
//
//   producer --> one shared ring of full batches --> whichever worker is free       put() swaps a full batch
//            <-- one shared stack of empty ones <--                                 for an empty one
//
// A slow channel therefore holds one batch and delays no other channel. A SYNC takes no place in the ring. Epochs are
// numbered: every batch carries its epoch's number, and close_epoch() raises the count of closed epochs. A worker
// writes its SYNC for an epoch when that epoch is closed and the ring's first batch, if any, belongs to a later epoch.
// The order holds because the producer puts all batches of an epoch before it closes it, and a worker reads the count
// before the ring. Closing an epoch therefore never waits, however slow a channel is.
//
// Waking a sleeping thread costs 5 to 15 us, more than handing over a batch, so threads are woken seldom:
//   * The first worker is woken when two batches wait in the ring.
//   * One more worker is woken when half a queue (depth / 2 batches) waits for each worker that is awake.
//   * No worker is woken while another one is searching: awake, without a batch, and polling the ring.
//   * The producer sleeps when every batch is out, and is woken when half of all batches have come back.
// Where the workers want more cores than the machine has, the surplus workers rest in turns (core_demand.hpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>

#include "multifd/config.hpp"
#include "multifd/engine/core_demand.hpp"
#include "multifd/engine/shared_ring.hpp"
#include "multifd/engine/sleepers.hpp"
#include "multifd/engine/spin.hpp"
#include "multifd/limits.hpp"
#include "multifd/memory/page_batch.hpp"
#include "multifd/result.hpp"

namespace multifd::engine {

/// What a worker is to do next.
struct Work {
  enum class Kind : std::uint8_t {
    batch,        ///< send `batch`, then give_back() it
    close_epoch,  ///< close epoch `epoch`: a SYNC, on a multifd channel
    end,          ///< everything is sent: end the channel in order
    stopped,      ///< give up at once
    idle,         ///< there was nothing for as long as take() was to wait
  };
  Kind kind;
  PageBatch* batch = nullptr;
  std::uint64_t epoch = 0;
};

/// Hand-off between one producer and N workers.
///
/// Threads: put(), close_epoch(), push_out(), end() by the producer; take(c), give_back() by workers; stop() by any.
/// Progress: put() blocks when every channel is full; take() blocks when there is nothing to do; no other call blocks.
/// Cost: nothing is allocated after create(); one ring and one stack operation a batch; a system call only to wake a
///   sleeper.
class BatchHandoff {
 public:
  static constexpr unsigned max_depth = 16;

  /// How long a surplus worker rests (up to twice as long, by channel), and how long a producer that waits for room
  /// sleeps before it calls `check` and wakes one more worker.
  static constexpr std::chrono::nanoseconds longest_rest{250'000'000};

  /// Batches per channel when the caller asks for no number: 64 in all, but 2 to max_depth for each. 64 batches keep
  /// the channels busy while the producer is being woken.
  static constexpr unsigned default_depth(unsigned channels) noexcept {
    return std::clamp(64 / channels, 2u, max_depth);
  }

  /// Allocates everything: `depth` batches per channel (2 to max_depth), plus the one that the producer fills.
  ///
  /// Errors: Errc::bad_channel_count, bad_option; ENOMEM.
  [[nodiscard]] static Result<std::unique_ptr<BatchHandoff>> create(unsigned channels, unsigned depth,
                                                                    std::size_t batch_pages) {
    if (channels == 0 || channels > max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "hand-off", channels);
    if (depth < 2 || depth > max_depth) return fail(Errc::bad_option, Stage::setup, "queue depth", depth);
    auto ring = SharedRing::allocate(std::size_t{channels} * depth + 1);
    auto signals = Sleepers::allocate(channels);
    if (!ring || !signals) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    std::unique_ptr<BatchHandoff> handoff(new (std::nothrow)
                                              BatchHandoff(channels, depth, std::move(*ring), std::move(*signals)));
    if (!handoff || !handoff->allocate(batch_pages)) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    return handoff;
  }

  /// Gives every batch a buffer for copies of its pages. Before the first put(). Errors: ENOMEM.
  [[nodiscard]] Result<void> allocate_copies() noexcept {
    for (std::size_t i = 0; i < batch_count(); ++i) {
      auto buffer = PageBuffer::create();
      if (!buffer) return std::unexpected(buffer.error());
      batches_[i].copies = std::move(*buffer);
    }
    return {};
  }

  /// The batch that the producer starts with.
  PageBatch* first_batch() noexcept { return &batches_[0]; }

  /// Gives a full batch to the channels and takes an empty one; null when stopped.
  ///
  /// `waited` is called once before the producer goes to sleep, and once after it has slept; `check` every longest_rest
  /// in between. `check` may call stop().
  template <class Waited, class Check = decltype([] {})>
  PageBatch* put(PageBatch* full, Waited&& waited, Check&& check = {}) noexcept {
    if (stopped_.load(std::memory_order_acquire)) return nullptr;  // meets stop()
    // Own variable: the producer is its only writer.
    full->epoch = closed_.load(std::memory_order_relaxed);
    ring_.push(full, full->epoch);
    if (ring_.backlog() >= 2) wake_if_worth_it();
    if (free_ == nullptr && !collect()) {
      spin(producer_spin, [&] { return has_returned() && collect(); });
      for (bool slept = false; free_ == nullptr; slept = true) {
        if (stopped_.load(std::memory_order_acquire)) return nullptr;  // meets stop()
        if (!slept) waited();
        if (!sleep_until_room()) check();
        if (collect()) waited();
      }
    }
    return std::exchange(free_, free_->next);
  }

  /// Ends the current epoch; returns its number. The caller has put() all batches of it.
  std::uint64_t close_epoch() noexcept {
    // seq_cst: against a worker that goes to sleep meanwhile; also the release that has_work() and take() acquire.
    const std::uint64_t epoch = closed_.fetch_add(1, std::memory_order_seq_cst);
    wake_all();
    return epoch;
  }

  /// Wakes workers for batches in the ring for which none was woken yet.
  void push_out() noexcept {
    for (std::uint64_t waiting = ring_.backlog(); waiting > 0 && wake_one(); --waiting) {
    }
  }

  /// Says that no more batches and epochs come: workers drain the ring, then get Kind::end.
  void end() noexcept {
    ended_.store(true, std::memory_order_seq_cst);
    wake_all();
  }

  /// Makes put() and take() give up, in calls under way and in later ones.
  void stop() noexcept {
    stopped_.store(true, std::memory_order_seq_cst);
    wake_all();
    producer_signal_.send();
  }

  /// Returns what take() would if there is work already; std::nullopt where take() would wait.
  std::optional<Work> try_take(unsigned channel) noexcept {
    Channel& mine = channels_[channel];
    demand_.sample(mine.probe);
    if (is_one_too_many(mine)) return std::nullopt;
    return next_work(mine);
  }

  /// Waits for work, for about `limit`. Batches of an epoch come before the SYNC that ends it, in the order they were put.
  Work take(unsigned channel, std::chrono::nanoseconds limit = Signal::forever) noexcept {
    Channel& mine = channels_[channel];
    demand_.sample(mine.probe);
    for (;;) {
      if (is_one_too_many(mine)) rest(mine, channel);
      if (std::optional<Work> work = next_work(mine)) {
        if (mine.searching) stop_searching(mine);
        return *work;
      }
      // Only one worker at a time polls for work: more of them would take cores from workers that have a batch.
      std::uint32_t nobody = 0;
      if (!mine.searching) mine.searching = searching_.compare_exchange_strong(nobody, 1, std::memory_order_seq_cst);
      if (mine.searching && spin(worker_spin, [&] { return has_work(mine); })) continue;
      sleep(mine, channel, limit);
      if (limit != Signal::forever && !mine.searching && !has_work(mine)) return {.kind = Work::Kind::idle};
    }
  }

  /// Returns a batch that take() gave, to be filled again.
  void give_back(PageBatch* batch) noexcept {
    batch->clear();
    // Only collect() takes batches off, and then all of them, so a head that is unchanged still heads the same stack.
    batch->next = returned_stack_.load(std::memory_order_relaxed);
    while (!returned_stack_.compare_exchange_weak(batch->next, batch, std::memory_order_release,  // meets collect()
                                                  std::memory_order_relaxed)) {
    }
    // seq_cst: the return is counted before the check whether the producer sleeps (Dekker, with sleep_until_room()).
    const std::uint32_t returned = returned_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (producer_sleeping_.load(std::memory_order_seq_cst) &&
        static_cast<std::int32_t>(returned - wake_at_.load(std::memory_order_relaxed)) >= 0)
      producer_signal_.send();
  }

  /// A worker takes no more work until it comes back; what it was awake for is others' now.
  void leave() noexcept {
    sleepers_.leave();
    wake_all();
  }
  /// Params `epoch`: the worker's first: every batch of an earlier one was taken.
  void come_back(unsigned channel, std::uint64_t epoch) noexcept {
    channels_[channel].synced = epoch;
    sleepers_.come_back();
  }

  unsigned channels() const noexcept { return channel_count_; }
  /// Threads: any.
  std::uint64_t closed_epochs() const noexcept {
    return closed_.load(std::memory_order_acquire);  // meets close_epoch()
  }

 private:
  /// How long a worker polls for a batch before it sleeps: about as long as waking it takes (5 to 50 us).
  static constexpr std::chrono::nanoseconds worker_spin{10'000};
  /// How long the producer polls for a returned batch. Short: the workers that it waits for want its core.
  static constexpr std::chrono::nanoseconds producer_spin{3'000};

  /// Used by its worker alone.
  struct alignas(cache_line) Channel {
    std::uint64_t synced = 0;  ///< epochs whose SYNC this worker was told to write
    bool searching = false;    ///< this worker is counted in searching_
    CoreDemand::Probe probe;
  };

  BatchHandoff(unsigned channels, unsigned depth, SharedRing::Slots ring, std::unique_ptr<Signal[]> signals) noexcept
      : channel_count_(channels),
        depth_(depth),
        ring_(std::move(ring)),
        sleepers_(channels, std::move(signals)),
        demand_(channels) {}

  bool allocate(std::size_t batch_pages) noexcept {
    const std::size_t count = batch_count();
    channels_.reset(new (std::nothrow) Channel[channel_count_]);
    batches_.reset(new (std::nothrow) PageBatch[count]);
    slots_.reset(new (std::nothrow) std::uint64_t[count * batch_pages]);
    if (!channels_ || !batches_ || !slots_) return false;
    for (std::size_t i = 0; i < count; ++i)
      batches_[i] = PageBatch(std::span(slots_.get() + i * batch_pages, batch_pages));
    for (std::size_t i = count; i > 1; --i) batches_[i - 1].next = std::exchange(free_, &batches_[i - 1]);
    return true;
  }

  std::size_t batch_count() const noexcept { return std::size_t{channel_count_} * depth_ + 1; }

  std::optional<Work> next_work(Channel& mine) noexcept {
    if (stopped_.load(std::memory_order_acquire)) return Work{.kind = Work::Kind::stopped};  // meets stop()
    // The reads go against the order of the producer's writes, which is: batches, then the epoch's close, then the end.
    // So a worker that sees the end sees every close, and a worker that sees a close sees every batch of that epoch.
    const bool ended = ended_.load(std::memory_order_acquire);             // meets end()
    const std::uint64_t closed = closed_.load(std::memory_order_acquire);  // meets close_epoch()
    switch (const auto [first, batch] = ring_.take(mine.synced); first) {
      case SharedRing::First::taken: return Work{.kind = Work::Kind::batch, .batch = batch, .epoch = mine.synced};
      case SharedRing::First::later: return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
      case SharedRing::First::none: break;
    }
    if (closed > mine.synced) return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
    if (ended) return Work{.kind = Work::Kind::end};
    return std::nullopt;
  }

  bool has_work(const Channel& mine) const noexcept { return ring_.backlog() != 0 || has_more_than_batches(mine); }

  bool has_more_than_batches(const Channel& mine) const noexcept {
    return closed_.load(std::memory_order_seq_cst) > mine.synced || stopped_.load(std::memory_order_seq_cst) ||
           ended_.load(std::memory_order_seq_cst);
  }

  /// This worker has found work: if much more is waiting, another one is woken for it.
  void stop_searching(Channel& mine) noexcept {
    mine.searching = false;
    searching_.fetch_sub(1, std::memory_order_seq_cst);
    wake_if_worth_it();
  }

  void sleep(Channel& mine, unsigned channel, std::chrono::nanoseconds limit) noexcept {
    const auto stay_up = [&] {
      if (std::exchange(mine.searching, false)) searching_.fetch_sub(1, std::memory_order_seq_cst);
      return has_work(mine);
    };
    mine.searching = sleepers_.sleep(channel, limit, stay_up);  // the thread that wakes a worker counts it
  }

  /// Whether more workers are awake than the cores can run, and this one has only batches to do, which others can send.
  bool is_one_too_many(const Channel& mine) const noexcept {
    const unsigned limit = demand_.limit();
    return limit < channel_count_ && sleepers_.awake() > limit && !has_more_than_batches(mine);
  }

  /// Sleeps for a while and leaves the batches to the others. After its rest this worker takes work before it checks the
  /// limit again, so that another one rests next: batches wait for a channel that hangs no longer than one rest.
  void rest(Channel& mine, unsigned channel) noexcept {
    const auto stay_up = [&] {
      if (std::exchange(mine.searching, false)) searching_.fetch_sub(1, std::memory_order_seq_cst);
      return sleepers_.awake() < demand_.limit() || has_more_than_batches(mine);
    };
    // A time of its own for each: workers that begin to rest together would also come back together.
    mine.searching = sleepers_.sleep(channel, longest_rest + channel % 16 * (longest_rest / 16), stay_up);
    demand_.sample(mine.probe);
  }

  /// Wakes one more worker when half a queue of batches waits for each worker that is awake, unless one is searching
  /// already. A producer without an empty batch has put so many into the ring that the rule wakes the last sleeper,
  /// too.
  void wake_if_worth_it() noexcept {
    if (searching_.load(std::memory_order_seq_cst) != 0) return;
    const unsigned awake = sleepers_.awake();
    if (awake >= demand_.limit()) return;
    if (2 * ring_.backlog() >= std::uint64_t{awake} * depth_ + 2) wake_one();
  }

  /// Wakes one worker. False: no worker sleeps.
  bool wake_one() noexcept {
    const unsigned sleeper = sleepers_.take_one();
    if (sleeper == Sleepers::no_worker) return false;
    wake(sleeper);
    return true;
  }

  void wake_all() noexcept {
    sleepers_.take_all([this](unsigned sleeper) { wake(sleeper); });
  }

  void wake(unsigned sleeper) noexcept {
    searching_.fetch_add(1, std::memory_order_seq_cst);
    sleepers_.wake(sleeper);
  }

  /// Collects all batches that the workers gave back; the producer has none. Returns whether any batch is free.
  bool collect() noexcept {
    // As it is: the batch that came back last, which is still in cache, is filled first.
    free_ = returned_stack_.exchange(nullptr, std::memory_order_acquire);  // meets give_back()
    for (const PageBatch* batch = free_; batch != nullptr; batch = batch->next) ++collected_;
    return free_ != nullptr;
  }

  /// Whether a returned batch waits to be collected. A worker counts a batch after it gave the batch back, so the
  /// difference may be negative for a moment.
  bool has_returned() const noexcept {
    return static_cast<std::int32_t>(returned_.load(std::memory_order_seq_cst) - collected_) > 0;
  }

  /// Sleeps until enough batches have come back. False: no worker has woken the producer.
  bool sleep_until_room() noexcept {
    const std::uint32_t ticket = producer_signal_.ticket();
    // Every batch is out. A stuck channel holds one of them, so a single channel that moves returns more than half.
    wake_at_.store(collected_ + channel_count_ * depth_ / 2, std::memory_order_relaxed);
    producer_sleeping_.store(true, std::memory_order_seq_cst);
    bool woken = true;
    if (!has_returned() && !stopped_.load(std::memory_order_seq_cst))
      woken = producer_signal_.wait(ticket, longest_rest);
    producer_sleeping_.store(false, std::memory_order_relaxed);
    // No worker is woken above the core limit. If all that are awake hang in their channels, this wakes another one.
    if (!woken) wake_one();
    return woken;
  }

  /// Polls `done()` for at most `time`. Returns whether it came true.
  template <class Done>
  static bool spin(std::chrono::nanoseconds time, Done&& done) noexcept {
    const auto end = std::chrono::steady_clock::now() + time;
    do {
      for (unsigned i = 0; i < 8; ++i) {  // reading the clock costs as much as a few polls
        spin_pause();
        if (done()) return true;
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  const unsigned channel_count_;
  const unsigned depth_;
  std::unique_ptr<Channel[]> channels_;
  std::unique_ptr<PageBatch[]> batches_;
  std::unique_ptr<std::uint64_t[]> slots_;

  // Used by the producer alone.
  PageBatch* free_ = nullptr;  ///< linked by PageBatch::next
  std::uint32_t collected_ = 0;

  SharedRing ring_;
  alignas(cache_line) std::atomic<std::uint64_t> closed_{0};  ///< epochs closed; also the number of the open one
  std::atomic<bool> ended_{false};
  std::atomic<bool> stopped_{false};
  std::atomic<std::uint32_t> searching_{0};  ///< workers awake without a batch
  Sleepers sleepers_;
  CoreDemand demand_;
  alignas(cache_line) std::atomic<PageBatch*> returned_stack_{nullptr};  ///< linked by PageBatch::next
  std::atomic<std::uint32_t> returned_{0};                               ///< batches given back since the start
  std::atomic<std::uint32_t> wake_at_{0};
  std::atomic<bool> producer_sleeping_{false};
  Signal producer_signal_;
};

}  // namespace multifd::engine
