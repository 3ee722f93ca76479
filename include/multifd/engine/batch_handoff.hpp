// SPDX-License-Identifier: MIT
//
// How batches pass from the producer to the channels' workers and back.
//
//   producer --> one shared ring of full batches --> whichever worker is free       put() swaps a full batch
//            <-- a ring of empty ones per worker <--                                for an empty one
//
// So a slow channel holds one batch and stalls nobody. A SYNC takes no place in the ring. An epoch is a number: every
// batch carries its own, close_epoch() raises the count of closed ones, and a worker writes its SYNC when it sees an
// epoch closed and the ring's first batch, if there is one, of a later epoch. That order holds because the producer
// puts all batches of an epoch before it closes it, and the worker looks at the count before it looks at the ring. So
// closing an epoch never waits, however slow a channel is.
//
// Waking a sleeping thread costs 5 to 15 us, more than handing over a batch, so threads are woken seldom: a first
// worker when two batches wait, one more when those that are awake have enough, and none while one is looking for work
// already; the producer when half of all batches came back. And where the workers want more cores than there are, those
// above that number rest in turns (core_demand.hpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/lockfree/spsc_queue.hpp>
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
#include "multifd/limits.hpp"
#include "multifd/memory/page_batch.hpp"
#include "multifd/result.hpp"

namespace multifd::engine {

/// What a worker is to do next.
struct Work {
  enum class Kind : std::uint8_t {
    batch,        ///< send `batch`, then give_back() it
    close_epoch,  ///< close epoch `epoch`: a SYNC, on a multifd channel
    finished,     ///< everything is sent: end the channel in order
    stopped,      ///< give up at once
  };
  Kind kind;
  PageBatch* batch = nullptr;
  std::uint64_t epoch = 0;
};

/// Hand-off between one producer and N workers.
///
/// Threads: put(), close_epoch(), flush(), finish() by the producer; take(c), give_back(c) by worker c; stop() by any.
/// Progress: put() blocks when every channel is full; take() blocks when there is nothing to do; the rest never does.
/// Cost: nothing is allocated after create(); two ring operations a batch; a system call only to wake a sleeper.
class BatchHandoff {
 public:
  static constexpr unsigned max_depth = 16;

  /// How long a worker leaves its batches to the others (up to twice of it), and the producer sleeps between two looks.
  static constexpr std::chrono::nanoseconds longest_rest{250'000'000};

  /// Batches per channel where nobody asks for a number: 64 in all, which is enough to sleep on, in bounds.
  static constexpr unsigned default_depth(unsigned channels) noexcept {
    return std::clamp(64 / channels, 2u, max_depth);
  }

  /// Allocates everything: `depth` batches per channel (2 to max_depth), plus the one that the producer fills.
  ///
  /// Errors: Errc::bad_channel_count, bad_option; ENOMEM.
  static Result<std::unique_ptr<BatchHandoff>> create(unsigned channels, unsigned depth, std::size_t batch_pages) {
    if (channels == 0 || channels > max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "hand-off", channels);
    if (depth < 2 || depth > max_depth) return fail(Errc::bad_option, Stage::setup, "queue depth", depth);
    std::unique_ptr<BatchHandoff> handoff(new (std::nothrow) BatchHandoff(channels, depth));
    if (!handoff || !handoff->allocate(batch_pages)) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    return handoff;
  }

  /// Gives every batch a buffer for copies of its pages. Before the first put(). Errors: ENOMEM.
  Result<void> allocate_copies() noexcept {
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
  /// `waited` is called once before the producer goes to sleep, and once after; `look` every now and then in between, and
  /// may call stop().
  template <class Waited, class Look = decltype([] {})>
  PageBatch* put(PageBatch* full, Waited&& waited, Look&& look = {}) noexcept {
    if (stopped_.load(std::memory_order_acquire)) return nullptr;
    // Own variable: the producer is its only writer.
    full->epoch = closed_.load(std::memory_order_relaxed);
    ring_.push(full, full->epoch);
    if (ring_.backlog() >= 2) wake_if_worth_it();
    if (free_count_ == 0 && !collect()) {
      spin(producer_spin, [&] { return has_returned() && collect(); });
      for (bool slept = false; free_count_ == 0; slept = true) {
        if (stopped_.load(std::memory_order_acquire)) return nullptr;
        if (!slept) waited();
        if (!sleep_until_room()) look();
        if (collect()) waited();
      }
    }
    return free_[--free_count_];
  }

  /// Ends the current epoch; returns its number. The caller has put() all batches of it.
  std::uint64_t close_epoch() noexcept {
    // seq_cst: against a worker that goes to sleep meanwhile; also the release that has_work() and take() acquire.
    const std::uint64_t epoch = closed_.fetch_add(1, std::memory_order_seq_cst);
    wake_all();
    return epoch;
  }

  /// Lets workers see batches that they were not woken for.
  void push_out() noexcept {
    for (std::uint64_t waiting = ring_.backlog(); waiting > 0 && wake_one(); --waiting) {
    }
  }

  /// No more batches and epochs: workers drain what is there, then get Kind::finished.
  void finish() noexcept {
    finished_.store(true, std::memory_order_seq_cst);
    wake_all();
  }

  /// Everybody gives up, now and later.
  void stop() noexcept {
    stopped_.store(true, std::memory_order_seq_cst);
    wake_all();
    producer_signal_.send();
  }

  /// take() where it need not wait; nothing otherwise.
  std::optional<Work> try_take(unsigned channel) noexcept {
    Channel& mine = channels_[channel];
    demand_.sample(mine.probe);
    if (is_one_too_many(mine)) return std::nullopt;
    return next_work(mine);
  }

  /// Waits for work. Batches of one epoch come before the SYNC that ends it, in the order they were put.
  Work take(unsigned channel) noexcept {
    Channel& mine = channels_[channel];
    demand_.sample(mine.probe);
    for (;;) {
      if (is_one_too_many(mine)) rest(mine, channel);
      if (std::optional<Work> work = next_work(mine)) {
        if (mine.searching) stop_searching(mine);
        return *work;
      }
      // One worker at a time looks out for work; more would only take its core from somebody who has some.
      std::uint32_t nobody = 0;
      if (!mine.searching) mine.searching = searching_.compare_exchange_strong(nobody, 1, std::memory_order_seq_cst);
      if (mine.searching && spin(worker_spin, [&] { return has_work(mine); })) continue;
      sleep(mine, channel);
    }
  }

  /// Returns a batch that take() gave, to be filled again.
  void give_back(unsigned channel, PageBatch* batch) noexcept {
    batch->clear();
    const bool fits = channels_[channel].empty.push(batch);
    MULTIFD_ASSERT(fits);  // the ring has room for every batch there is
    // seq_cst: counts the return before it looks whether the producer sleeps (Dekker with sleep_until_room).
    const std::uint32_t returned = returned_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (producer_sleeping_.load(std::memory_order_seq_cst) &&
        static_cast<std::int32_t>(returned - wake_at_.load(std::memory_order_relaxed)) >= 0)
      producer_signal_.send();
  }

  unsigned channels() const noexcept { return channel_count_; }
  /// Threads: any.
  std::uint64_t closed_epochs() const noexcept {
    return closed_.load(std::memory_order_acquire);
  }  // meets close_epoch()

 private:
  /// A worker that gives up needs to be woken, which takes a while (5 to 50 us): it waits as long for the next batch.
  /// The producer's core is wanted by the workers it waits for.
  static constexpr std::chrono::nanoseconds worker_spin{10'000};
  static constexpr std::chrono::nanoseconds producer_spin{3'000};
  static constexpr std::size_t max_batches = std::size_t{max_depth} * max_channels + 1;

  struct alignas(cache_line) Channel {
    /// Worker -> producer. Its room is address space that is touched as it is used.
    boost::lockfree::spsc_queue<PageBatch*, boost::lockfree::capacity<max_batches>> empty;
    // The worker's own.
    alignas(cache_line) std::uint64_t synced = 0;  ///< epochs whose SYNC this worker was told to write
    bool searching = false;                        ///< it is counted in searching_
    CoreDemand::Probe probe;
  };

  BatchHandoff(unsigned channels, unsigned depth) noexcept
      : channel_count_(channels), depth_(depth), demand_(channels) {}

  bool allocate(std::size_t batch_pages) noexcept {
    const std::size_t count = batch_count();
    channels_.reset(new (std::nothrow) Channel[channel_count_]);
    batches_.reset(new (std::nothrow) PageBatch[count]);
    free_.reset(new (std::nothrow) PageBatch*[count]);
    slots_.reset(new (std::nothrow) std::uint64_t[count * batch_pages]);
    if (!channels_ || !batches_ || !free_ || !slots_) return false;
    if (!ring_.allocate(count) || !sleepers_.allocate(channel_count_)) return false;
    for (std::size_t i = 0; i < count; ++i)
      batches_[i] = PageBatch(std::span(slots_.get() + i * batch_pages, batch_pages));
    for (std::size_t i = count; i > 1; --i) free_[free_count_++] = &batches_[i - 1];
    return true;
  }

  std::size_t batch_count() const noexcept { return std::size_t{channel_count_} * depth_ + 1; }

  std::optional<Work> next_work(Channel& mine) noexcept {
    if (stopped_.load(std::memory_order_acquire)) return Work{.kind = Work::Kind::stopped};
    // In this order: finished, then closed, then the ring. What was put before is seen when the later one is.
    const bool finished = finished_.load(std::memory_order_acquire);
    const std::uint64_t closed = closed_.load(std::memory_order_acquire);  // meets close_epoch()
    switch (const auto [first, batch] = ring_.take(mine.synced); first) {
      case SharedRing::First::taken: return Work{.kind = Work::Kind::batch, .batch = batch, .epoch = mine.synced};
      case SharedRing::First::later: return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
      case SharedRing::First::none: break;
    }
    if (closed > mine.synced) return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
    if (finished) return Work{.kind = Work::Kind::finished};
    return std::nullopt;
  }

  bool has_work(const Channel& mine) const noexcept { return ring_.backlog() != 0 || has_more_than_batches(mine); }

  bool has_more_than_batches(const Channel& mine) const noexcept {
    return closed_.load(std::memory_order_seq_cst) > mine.synced || stopped_.load(std::memory_order_seq_cst) ||
           finished_.load(std::memory_order_seq_cst);
  }

  /// Found work: if there is much more, somebody else should look for it.
  void stop_searching(Channel& mine) noexcept {
    mine.searching = false;
    searching_.fetch_sub(1, std::memory_order_seq_cst);
    wake_if_worth_it();
  }

  void sleep(Channel& mine, unsigned channel) noexcept {
    const auto stay_up = [&] {
      if (std::exchange(mine.searching, false)) searching_.fetch_sub(1, std::memory_order_seq_cst);
      return has_work(mine);
    };
    mine.searching = sleepers_.sleep(channel, Signal::forever, stay_up);  // who wakes it has counted it
  }

  /// More workers want a core than there are, and this one has nothing to do but batches, which the others can do.
  bool is_one_too_many(const Channel& mine) const noexcept {
    const unsigned limit = demand_.limit();
    return limit < channel_count_ && sleepers_.awake() > limit && !has_more_than_batches(mine);
  }

  /// Leaves the batches to the others for a while; then it is another one's turn, for this one takes work before it
  /// looks again. So a channel that hangs keeps nobody waiting for longer.
  void rest(Channel& mine, unsigned channel) noexcept {
    const auto stay_up = [&] {
      if (std::exchange(mine.searching, false)) searching_.fetch_sub(1, std::memory_order_seq_cst);
      return sleepers_.awake() < demand_.limit() || has_more_than_batches(mine);
    };
    // Not all at once: they would come back all at once, too.
    mine.searching = sleepers_.sleep(channel, longest_rest + channel % 16 * (longest_rest / 16), stay_up);
    demand_.sample(mine.probe);
  }

  /// Wakes one more worker, unless one is looking for work: when half a queue waits for each of those that are awake.
  /// Without room the producer has everything in the ring, so then the last sleeper is worth it, too.
  void wake_if_worth_it() noexcept {
    if (searching_.load(std::memory_order_seq_cst) != 0) return;
    const unsigned awake = sleepers_.awake();
    if (awake >= demand_.limit()) return;
    if (2 * ring_.backlog() >= std::uint64_t{awake} * depth_ + 2) wake_one();
  }

  /// False: nobody sleeps.
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

  /// Takes all batches that came back; whether there are any.
  bool collect() noexcept {
    for (unsigned i = 0; i < channel_count_; ++i) {
      const std::size_t count = channels_[i].empty.pop(free_.get() + free_count_, batch_count() - free_count_);
      collected_ += static_cast<std::uint32_t>(count);
      free_count_ += count;
    }
    return free_count_ != 0;
  }

  /// Whether a batch waits to be collected. A worker counts it after it gave it back, so the difference may be negative.
  bool has_returned() const noexcept {
    return static_cast<std::int32_t>(returned_.load(std::memory_order_seq_cst) - collected_) > 0;
  }

  /// False: nobody woke it for a while.
  bool sleep_until_room() noexcept {
    const std::uint32_t ticket = producer_signal_.ticket();
    // Every batch is out. A stuck channel holds one of them, so one channel that moves returns more than half.
    wake_at_.store(collected_ + channel_count_ * depth_ / 2, std::memory_order_relaxed);
    producer_sleeping_.store(true, std::memory_order_seq_cst);
    bool woken = true;
    if (!has_returned() && !stopped_.load(std::memory_order_seq_cst))
      woken = producer_signal_.wait(ticket, longest_rest);
    producer_sleeping_.store(false, std::memory_order_relaxed);
    // Nobody was woken beyond the limit. Should those that are awake hang, it is here that the others are missed.
    if (!woken) wake_one();
    return woken;
  }

  /// Whether `done()` came true in that time.
  template <class Done>
  static bool spin(std::chrono::nanoseconds time, Done&& done) noexcept {
    const auto end = std::chrono::steady_clock::now() + time;
    do {
      for (unsigned i = 0; i < 8; ++i) {  // the clock costs as much as a few looks
        spin_pause();
        if (done()) return true;
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  static void spin_pause() noexcept {
#if MULTIFD_X86_64
    __builtin_ia32_pause();
#elif MULTIFD_AARCH64
    asm volatile("yield");
#endif
  }

  const unsigned channel_count_;
  const unsigned depth_;
  std::unique_ptr<Channel[]> channels_;
  std::unique_ptr<PageBatch[]> batches_;
  std::unique_ptr<std::uint64_t[]> slots_;

  // The producer's own.
  std::unique_ptr<PageBatch*[]> free_;  ///< the last one in comes out first: it is still in cache
  std::size_t free_count_ = 0;
  std::uint32_t collected_ = 0;

  SharedRing ring_;
  alignas(cache_line) std::atomic<std::uint64_t> closed_{0};  ///< epochs closed; also the number of the open one
  std::atomic<bool> finished_{false};
  std::atomic<bool> stopped_{false};
  std::atomic<std::uint32_t> searching_{0};  ///< workers awake without a batch
  Sleepers sleepers_;
  CoreDemand demand_;
  alignas(cache_line) std::atomic<std::uint32_t> returned_{0};
  std::atomic<std::uint32_t> wake_at_{0};
  std::atomic<bool> producer_sleeping_{false};
  Signal producer_signal_;
};

}  // namespace multifd::engine
