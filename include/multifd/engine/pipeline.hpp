// SPDX-License-Identifier: MIT
//
// A whole sending end but for its format: producer, hand-off, workers. A sender of some format opens one with an outlet
// for each channel and forwards to it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include "multifd/engine/batch_producer.hpp"
#include "multifd/engine/crew.hpp"
#include "multifd/engine/send_worker.hpp"
#include "multifd/stats.hpp"

namespace multifd::engine {

/// What SenderOptions has of the engine's, whatever the format; explained there.
struct PipelineOptions {
  std::uint64_t bandwidth = 0;
  unsigned depth = 0;
  std::chrono::milliseconds progress_timeout = default_send_progress_timeout;
  std::function<bool()> interrupted{};  ///< polled while the producer or a waiting thread waits; true: cancel
  std::function<Result<void>()> while_waiting{};
  bool comes_back = false;  ///< lost connections are made again, and what they carried is remembered
  ThreadHook thread_hook{};
  ErrorHook on_error{};
};

/// The order of use: open(), queue_*() and close_epoch() of `producer`, then finish(). The destructor cancels if that has
/// not been called, joins, and never waits for the other end.
///
/// Threads: error(), cancel(), wait(), stats(), set_bandwidth() from any; the rest from one, the producer.
/// Errors: the first error, from whichever thread, stops all channels and is what every later call returns.
template <Outlet O, ZeroPagePolicy Z, PageSource From = FromGuest>
class Pipeline {
  using Worker = SendWorker<O, Z, From>;

 public:
  /// Allocates all that sending will need and starts a thread for each channel.
  ///
  /// Params: `make_outlet(channel)`: a Result<O>, called once for each.
  /// Errors: Errc::bad_channel_count, bad_block_size (no block), block_without_memory, bad_option; make_outlet()'s; out
  ///   of memory or threads.
  template <class MakeOutlet>
  [[nodiscard]] static Result<std::unique_ptr<Pipeline>> open(const RamMap& ram, unsigned channels, Z zero_pages,
                                                              PipelineOptions options, MakeOutlet&& make_outlet) {
    if (channels == 0 || channels > max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "open a sender", channels);
    if (ram.blocks().empty()) return fail(Errc::bad_block_size, Stage::setup, "open a sender: no RAM block");
    for (const RamBlock& block : ram.blocks())
      if (block.access == Access::none && From::guest)
        return fail(Errc::block_without_memory, Stage::setup, "open a sender", 0, 0, block.idstr);
    if (auto good = check_time_limit("SenderOptions::progress_timeout", options.progress_timeout, Stage::setup); !good)
      return std::unexpected(good.error());
    return catch_bad_alloc(Stage::setup, "open a sender", [&]() -> Result<std::unique_ptr<Pipeline>> {
      const bool comes_back = options.comes_back;
      auto while_waiting = std::move(options.while_waiting);
      std::unique_ptr<Pipeline> pipeline(new Pipeline(ram, channels, std::move(zero_pages), std::move(options)));
      pipeline->shared_.while_waiting = std::move(while_waiting);
      if (comes_back)
        pipeline->shared_.journal = std::make_unique<SentJournal>(pipeline->shared_.map, pipeline->shared_.channels);
      if (auto started = pipeline->start(make_outlet); !started) return std::unexpected(started.error());
      return pipeline;
    });
  }

  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;
  ~Pipeline() {
    if (visitors.entered() || producer.entered())
      MULTIFD_MISUSE("a Sender is destroyed while another thread is in one of its calls", {}, 0);
    if (crew_.started() && !producer.finished()) shared_.error.abandon("Sender destroyed");
    crew_.join();
    shared_.error.wait_stopped();
  }

  /// Waits until every channel has closed an epoch that producer.close_epoch() returned.
  ///
  /// Errors: Errc::bad_range for an epoch that is open; the first error.
  [[nodiscard]] Result<void> wait(std::uint64_t epoch) noexcept {
    if (epoch >= shared_.handoff->closed_epochs())
      return fail(Errc::bad_range, Stage::sync, "wait: epoch is not closed", epoch);
    auto watch = shared_.watch();
    if (shared_.epochs.wait(epoch, watch.slice(), [&] { shared_.check_progress(watch); })) return {};
    return std::unexpected(shared_.error.get());
  }

  /// Closes the epoch if pages were queued since the last one, waits until the channels have ended, and joins them.
  [[nodiscard]] Result<void> finish() noexcept { return finish(nullptr); }

  /// The same, and waits for the other end's confirmation, `limit` at most (0: no limit) behind the last byte.
  [[nodiscard]] Result<void> finish_confirmed(std::chrono::milliseconds limit) noexcept
    requires HasAnswer<O>
  {
    return finish(&limit);
  }

  /// An epoch is over at the other end. Params `arrived(channel)`: whether it says so of that channel, too. Errors:
  /// Errc::bad_range for an epoch that is open.
  template <class Arrived>
  [[nodiscard]] Result<void> settle(std::uint64_t epoch, Arrived&& arrived) noexcept {
    if (epoch >= shared_.handoff->closed_epochs())
      return fail(Errc::bad_range, Stage::sync, "settle: epoch is not closed", epoch);
    shared_.journal->settle(epoch, arrived);
    for (unsigned channel = 0; channel < shared_.channels; ++channel)
      if (!arrived(channel) && shared_.epochs.took_part(channel, epoch)) (*(crew_.begin() + channel))->drop_link();
    return {};
  }
  std::uint64_t take_lost(DirtyBitmaps& into) noexcept { return shared_.journal->take_lost(into); }

  void cancel(const char* op) noexcept { shared_.error.raise({.code = Errc::cancelled, .op = op}); }
  void set_bandwidth(std::uint64_t bytes_per_s) noexcept { shared_.limiter.set_rate(bytes_per_s); }

  /// Allocates the snapshot.
  SenderStats stats() const {
    SenderStats stats;
    for (unsigned i = 0; i < shared_.channels; ++i) stats.channels.push_back(shared_.counters[i].snapshot(i));
    stats.zero_on_main = producer.zero_on_main.get();
    stats.queued_pages = producer.queued_pages.get();
    stats.epochs = shared_.handoff->closed_epochs();
    stats.producer_waits = producer.waits.get();
    stats.producer_wait_ns = producer.wait_ns.get();
    return stats;
  }

  /// All channels' counters, and in `zero_pages` those that the caller was told of. Allocates nothing.
  ChannelStats total() const noexcept {
    ChannelStats sum{.zero_pages = producer.zero_on_main.get()};
    for (unsigned i = 0; i < shared_.channels; ++i) sum += shared_.counters[i].snapshot(i);
    return sum;
  }

  const RamMap& map() const noexcept { return shared_.map; }

 private:
  Pipeline(const RamMap& ram, unsigned channels, Z zero_pages, PipelineOptions options)
      : depth_(options.depth),
        zero_pages_(std::move(zero_pages)),
        thread_hook_(std::move(options.thread_hook)),
        shared_(
            ram, channels, options.bandwidth, options.progress_timeout, std::move(options.interrupted),
            [this] { stop(); }, std::move(options.on_error)),
        producer(shared_, zero_pages_) {}

  template <class MakeOutlet>
  [[nodiscard]] Result<void> start(MakeOutlet&& make_outlet) {
    const unsigned channels = shared_.channels;
    const unsigned depth = depth_ != 0 ? depth_ : BatchHandoff::default_depth(channels);
    auto handoff = BatchHandoff::create(channels, depth, shared_.map.batch_pages());
    if (!handoff) return std::unexpected(handoff.error());
    shared_.handoff = std::move(*handoff);
    if constexpr (From::copies) {
      if (auto copies = shared_.handoff->allocate_copies(); !copies) return copies;
    }
    producer.start();
    for (unsigned channel = 0; channel < channels; ++channel) {
      Result<O> outlet = make_outlet(channel);
      if (!outlet) return std::unexpected(outlet.error());
      auto worker = Worker::create(shared_, channel, std::move(*outlet), zero_pages_);
      if (!worker) return std::unexpected(worker.error());
      crew_.add(std::move(*worker));
    }
    return crew_.start("send", thread_hook_, shared_.error);
  }

  [[nodiscard]] Result<void> finish(const std::chrono::milliseconds* confirmed_within) noexcept {
    // Relaxed: the hand-off's end, which comes later, publishes it.
    if (confirmed_within != nullptr) shared_.wants_confirmation.store(true, std::memory_order_relaxed);
    if (auto finished = producer.finish(); !finished) return finished;
    auto watch = shared_.watch();
    shared_.epochs.wait_for_channels(watch.slice(), [&] { shared_.check_progress(watch); });
    if (confirmed_within != nullptr) wait_for_confirmation(*confirmed_within);
    crew_.join();
    if (shared_.error.failed()) return std::unexpected(shared_.error.get());
    return {};
  }

  void wait_for_confirmation(std::chrono::milliseconds limit) noexcept {
    ProgressWatch watch(limit, 0);
    shared_.epochs.wait_for_confirmation(watch.slice(), [&] {
      shared_.check_interrupt();
      if (watch.stalled(0))
        shared_.error.raise(
            {.code = Errc::timed_out, .stage = Stage::close, .op = "no confirmation for confirm_timeout"});
    });
  }

  /// Called once, by the thread of the first error. The crew is complete before any thread starts.
  void stop() noexcept {
    shared_.handoff->stop();
    shared_.limiter.stop();
    shared_.epochs.stop();
    crew_.shutdown();
  }

  const unsigned depth_;
  const Z zero_pages_;
  const ThreadHook thread_hook_;
  SendShared shared_;
  Crew<Worker> crew_;

 public:
  BatchProducer<O, Z, From> producer;
  [[no_unique_address]] VisitorsOfBuild visitors;  ///< threads in the calls that any may make
};

}  // namespace multifd::engine
