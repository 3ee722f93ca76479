// SPDX-License-Identifier: MIT
//
// The library's first hand-off, now a rival of the one that ships: a pair of boost::lockfree::spsc_queue per channel,
// the producer going round robin over the channels that have room. Lowest latency with one worker; but a batch once
// given to a channel stays with it, and each channel wants its own wakes.
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/lockfree/spsc_queue.hpp>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>

#include "multifd/engine/batch_handoff.hpp"
#include "multifd/engine/spin.hpp"

namespace rivals {

using namespace multifd;

/// Hand-off between one producer and N workers.
///
/// Threads: put(), close_epoch(), push_out(), end() by the producer; take(c), give_back(c) by worker c; stop() by
///   any.
/// Progress: put() blocks when every channel is full; take() blocks when there is nothing to do; the rest never does.
/// Cost: nothing is allocated after create(); two ring operations a batch; a system call only to wake a sleeper.
class SpscPairs {
 public:
  static constexpr unsigned max_depth = 16;

  /// Allocates everything: `depth` batches per channel (2 to max_depth), plus the one that the producer fills.
  ///
  /// Errors: Errc::bad_channel_count, bad_option; ENOMEM.
  static Result<std::unique_ptr<SpscPairs>> create(unsigned channels, unsigned depth, std::size_t packet_pages) {
    if (channels == 0 || channels > multifd::max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "hand-off", channels);
    if (depth < 2 || depth > max_depth) return fail(Errc::bad_option, Stage::setup, "queue depth", depth);
    std::unique_ptr<SpscPairs> handoff(new (std::nothrow) SpscPairs(channels, depth));
    if (!handoff || !handoff->allocate(packet_pages)) return fail_errno(Stage::setup, "allocate batches", ENOMEM);
    return handoff;
  }

  /// The batch that the producer starts with.
  PageBatch* first_batch() noexcept { return &batches_[0]; }

  /// Gives a full batch to some channel that has room and takes an empty one; null when stopped.
  ///
  /// `waited` is called once before the producer goes to sleep, and once after.
  template <class Waited>
  PageBatch* put(PageBatch* full, Waited&& waited) noexcept {
    full->epoch = closed_.load(std::memory_order_relaxed);  // own variable: the producer is its only writer
    bool slept = false;
    for (;;) {
      if (stopped_.load(std::memory_order_acquire)) return nullptr;
      const std::uint32_t returned = returned_.load(std::memory_order_seq_cst);
      if (PageBatch* empty = try_put(full)) {
        if (slept) waited();
        return empty;
      }
      if (!slept) waited();
      slept = true;
      wake_all();  // everything is queued: no worker may sleep on a batch while the producer sleeps
      sleep_until_room(returned);
    }
  }

  /// Ends the current epoch; returns its number. The caller has put() all batches of it.
  std::uint64_t close_epoch() noexcept {
    // seq_cst: against a worker that goes to sleep meanwhile; also the release that has_work() and take() acquire.
    const std::uint64_t epoch = closed_.fetch_add(1, std::memory_order_seq_cst);
    wake_all();
    return epoch;
  }

  /// Lets workers see batches that they were not woken for.
  void push_out() noexcept { wake_all(); }

  /// No more batches and epochs: workers drain what is there, then get Kind::end.
  void end() noexcept {
    ended_.store(true, std::memory_order_seq_cst);
    wake_all();
  }

  /// Makes every call give up, those under way and later ones.
  void stop() noexcept {
    stopped_.store(true, std::memory_order_seq_cst);
    wake_all();
    wake_producer();
  }

  /// Waits for work. Batches of one epoch come before the SYNC that ends it, in the order they were put.
  Work take(unsigned channel) noexcept {
    Channel& mine = channels_[channel];
    for (;;) {
      if (std::optional<Work> work = next_work(mine)) return *work;
      for (unsigned i = 0; i < spins; ++i) {
        engine::spin_pause();
        if (has_work(mine)) break;
      }
      const std::uint32_t ticket = mine.signal.load(std::memory_order_acquire);
      mine.sleeping.store(true, std::memory_order_seq_cst);
      // Dekker: the store above and the loads in has_work() against push and load in try_put() and wake().
      if (!has_work(mine)) mine.signal.wait(ticket, std::memory_order_acquire);
      mine.sleeping.store(false, std::memory_order_relaxed);
    }
  }

  /// Returns a batch that take() gave, to be filled again.
  void give_back(unsigned channel, PageBatch* batch) noexcept {
    batch->clear();
    const bool fits = channels_[channel].empty.push(batch);
    MULTIFD_ASSERT(fits);  // the ring holds every batch of the channel
    // seq_cst: the return is counted before the check whether the producer sleeps (Dekker, with sleep_until_room()).
    const std::uint32_t returned = returned_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (producer_sleeping_.load(std::memory_order_seq_cst) &&
        static_cast<std::int32_t>(returned - wake_at_.load(std::memory_order_relaxed)) >= 0)
      wake_producer();
  }

 private:
  using Ring = boost::lockfree::spsc_queue<PageBatch*, boost::lockfree::capacity<max_depth>>;
  static constexpr unsigned spins = 100;

  struct alignas(cache_line) Channel {
    Ring full;                                                 ///< producer -> worker
    Ring empty;                                                ///< worker -> producer
    alignas(cache_line) std::atomic<std::uint32_t> pushed{0};  ///< written by the producer
    alignas(cache_line) std::atomic<std::uint32_t> signal{0};  ///< what the worker sleeps on
    std::atomic<bool> sleeping{false};
    // The worker's own.
    std::uint32_t taken = 0;
    std::uint64_t synced = 0;  ///< epochs whose SYNC this worker was told to write
  };

  SpscPairs(unsigned channels, unsigned depth) noexcept : channel_count_(channels), depth_(depth) {}

  bool allocate(std::size_t packet_pages) noexcept {
    const std::size_t count = batch_count();
    channels_.reset(new (std::nothrow) Channel[channel_count_]);
    batches_.reset(new (std::nothrow) PageBatch[count]);
    slots_.reset(new (std::nothrow) std::uint64_t[count * packet_pages]);
    if (!channels_ || !batches_ || !slots_) return false;
    for (std::size_t i = 0; i < count; ++i)
      batches_[i] = PageBatch(std::span(slots_.get() + i * packet_pages, packet_pages));
    for (std::size_t i = 1; i < count; ++i) channels_[(i - 1) / depth_].empty.push(&batches_[i]);
    return true;
  }

  std::size_t batch_count() const noexcept { return std::size_t{channel_count_} * depth_ + 1; }

  /// Round robin over the channels that have room: a slow one is passed by.
  PageBatch* try_put(PageBatch* full) noexcept {
    for (unsigned i = 0; i < channel_count_; ++i) {
      Channel& target = channels_[next_channel_];
      next_channel_ = next_channel_ + 1 == channel_count_ ? 0 : next_channel_ + 1;
      PageBatch* empty = nullptr;
      if (!target.empty.pop(empty)) continue;
      const bool fits = target.full.push(full);
      MULTIFD_ASSERT(fits);
      // seq_cst: the push comes before wake()'s read of `sleeping` (Dekker, with take()).
      target.pushed.store(target.pushed.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
      if (target.full.write_available() + 2 <= max_depth) wake(target);
      return empty;
    }
    return nullptr;
  }

  std::optional<Work> next_work(Channel& mine) noexcept {
    if (stopped_.load(std::memory_order_acquire)) return Work{.kind = Work::Kind::stopped};
    // In this order: ended, then closed, then the ring. What was put before is seen when the later one is.
    const bool ended = ended_.load(std::memory_order_acquire);
    const std::uint64_t closed = closed_.load(std::memory_order_acquire);  // meets close_epoch()
    if (mine.full.read_available() != 0) {
      PageBatch* batch = mine.full.front();
      if (batch->epoch > mine.synced) return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
      mine.full.pop();
      ++mine.taken;
      return Work{.kind = Work::Kind::batch, .batch = batch, .epoch = batch->epoch};
    }
    if (closed > mine.synced) return Work{.kind = Work::Kind::close_epoch, .epoch = mine.synced++};
    if (ended) return Work{.kind = Work::Kind::end};
    return std::nullopt;
  }

  bool has_work(const Channel& mine) const noexcept {
    return mine.pushed.load(std::memory_order_seq_cst) != mine.taken ||
           closed_.load(std::memory_order_seq_cst) > mine.synced || stopped_.load(std::memory_order_seq_cst) ||
           ended_.load(std::memory_order_seq_cst);
  }

  /// One system call per sleep, not per batch: the thread that clears the flag wakes.
  void wake(Channel& channel) noexcept {
    if (!channel.sleeping.load(std::memory_order_seq_cst)) return;
    if (!channel.sleeping.exchange(false, std::memory_order_seq_cst)) return;
    channel.signal.fetch_add(1, std::memory_order_release);  // meets the acquire in take()
    channel.signal.notify_one();
  }

  void wake_all() noexcept {
    for (unsigned i = 0; i < channel_count_; ++i) wake(channels_[i]);
  }

  void sleep_until_room(std::uint32_t returned_before) noexcept {
    const std::uint32_t ticket = producer_signal_.load(std::memory_order_acquire);
    // All batches were out when `returned_before` was read. One channel that moves returns all of its own, so more
    // must not be waited for: the others may be stuck.
    const std::uint32_t enough = std::max(1u, std::min(depth_, channel_count_ * depth_ / 4));
    wake_at_.store(returned_before + enough, std::memory_order_relaxed);
    producer_sleeping_.store(true, std::memory_order_seq_cst);
    if (returned_.load(std::memory_order_seq_cst) == returned_before && !stopped_.load(std::memory_order_seq_cst))
      producer_signal_.wait(ticket, std::memory_order_acquire);
    producer_sleeping_.store(false, std::memory_order_relaxed);
  }

  void wake_producer() noexcept {
    producer_signal_.fetch_add(1, std::memory_order_release);  // meets the acquire in sleep_until_room()
    producer_signal_.notify_one();
  }

  const unsigned channel_count_;
  const unsigned depth_;
  std::unique_ptr<Channel[]> channels_;
  std::unique_ptr<PageBatch[]> batches_;
  std::unique_ptr<std::uint64_t[]> slots_;
  unsigned next_channel_ = 0;  ///< the producer's own

  alignas(cache_line) std::atomic<std::uint64_t> closed_{0};  ///< epochs closed; also the number of the open one
  std::atomic<bool> ended_{false};
  std::atomic<bool> stopped_{false};
  alignas(cache_line) std::atomic<std::uint32_t> returned_{0};
  alignas(cache_line) std::atomic<std::uint32_t> producer_signal_{0};
  std::atomic<std::uint32_t> wake_at_{0};
  std::atomic<bool> producer_sleeping_{false};
};

}  // namespace rivals
