// SPDX-License-Identifier: MIT
//
// Sender: moves a VM's dirty pages to a peer over many channels. The caller's thread queues pages (the producer), one
// worker per channel sends them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/channel/announce.hpp"
#include "multifd/channel/batch_producer.hpp"
#include "multifd/channel/misuse.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/sender_options.hpp"

namespace multifd {

/// What queue_page() did with a page.
enum class Queued : std::uint8_t {
  queued,        ///< it will travel on a channel
  zero_on_main,  ///< it is zero, and the caller has to say so on its main stream (only with ZeroPagesLegacy)
};

/// Holds for policies that do not report zero pages to the caller. With one that does (ZeroPagesLegacy), the bulk
/// calls need their last argument: a callable on_zero(offset).
template <class Z>
concept NeedsNoZeroSink = Z::stage != ZeroStage::producer;

/// Sends pages of a RamMap over connected transports.
///
/// The order of use: open(), then per epoch any number of queue_*() and one sync(), then finish() or close_channels(). A
/// page must be queued at most once per epoch (MULTIFD_CHECKED finds it): inside one there is no order, so the older of
/// two copies might win. A page dirtied again belongs to a later epoch (format/packets.md section 6). Queued pages
/// leave at the latest at sync() or flush().
///
/// Threads: cancel(), stats(), set_bandwidth(), set_level() from any thread; everything else from one, the producer.
///   The memory may be written by the guest all the time.
/// Errors: the first error, from whichever thread, stops all channels and is what every later call returns.
/// Lifetime: the destructor cancels if neither has been called, joins, and never waits for the peer.
template <Transport T, Compressor C, ZeroPagePolicy Z>
class Sender {
 public:
  using Options = SenderOptions<C, Z>;
  static_assert((C::method & ~wire::flag_compression_mask) == 0, "Compressor::method must be compression bits");

  /// Starts one worker per link; channel ids follow the order of `links`. Each begins with its hello.
  ///
  /// Params: `ram`: at least one block, copied (the memory is not); `links`: 1 to 255 connected streams.
  /// Errors: Errc::bad_channel_count, bad_block_size (no block), block_without_memory, peer_lacks_zero_lists, bad_option; out of memory or
  ///   threads. The links are closed on any error.
  static Result<Sender> open(const RamMap& ram, std::vector<T> links, Options options = {}) {
    if (links.empty() || links.size() > wire::max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "Sender::open", links.size());
    if (ram.blocks().empty()) return fail(Errc::bad_block_size, Stage::setup, "Sender::open: no RAM block");
    if (Z::stage == ZeroStage::channel && !options.peer.zero_lists)
      return fail(Errc::peer_lacks_zero_lists, Stage::setup, "Sender::open");
    for (const RamBlock& block : ram.blocks())
      if (block.access == Access::none && options.pages == PageSource::guest)
        return fail(Errc::block_without_memory, Stage::setup, "Sender::open", 0, 0, block.idstr);
    if (options.digest == Digest::on && !options.peer.digests)
      return fail(Errc::bad_option, Stage::setup, "digest: only our own receiver verifies it");
    for (const auto& [name, limit] : {std::pair("SenderOptions::progress_timeout", options.progress_timeout),
                                      std::pair("SenderOptions::confirm_timeout", options.confirm_timeout)})
      if (auto checked = check_time_limit(name, limit, Stage::setup); !checked) return std::unexpected(checked.error());
    return catch_bad_alloc(Stage::setup, "Sender::open", [&]() -> Result<Sender> {
      const auto channels = static_cast<unsigned>(links.size());
      // Only to our own receivers: others ignore these bytes today, and may give them a meaning tomorrow.
      std::optional<wire::Announcement> announced;
      if (options.peer.digests) {
        announced = announcement_of(ram, channels, C::method);
        announced->takes_answer = std::ranges::all_of(links, carries_answer<T>);
      }
      auto state = std::make_unique<State>(ram, std::move(options), channels, announced);
      if (auto started = state->start(std::move(links)); !started) return std::unexpected(started.error());
      return Sender(std::move(state));
    });
  }

  /// Queues one page.
  ///
  /// Params: `offset`: bytes from the start of the block, a multiple of the page size.
  /// Errors: Errc::bad_range (nothing is queued, the sender goes on); the first error.
  /// Threads: producer. Blocks while every channel is full.
  Result<Queued> queue_page(BlockId block, std::uint64_t offset) noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check(block, offset, s.page_bytes); !ready) return std::unexpected(ready.error());
    s.checks.note_run(s.shared.map, block, offset, 1);
    if constexpr (Z::stage == ZeroStage::producer) {
      const std::byte* host = s.shared.map.block(block).host.data();
      if (s.options.zero_pages.is_zero({block, offset, {host + offset, s.page_bytes}})) {
        s.producer.note_unsynced();  // also an epoch of nothing but zero pages ends with SYNCs
        s.producer.zero_on_main.add(1);
        return Queued::zero_on_main;
      }
    }
    if (auto queued = s.producer.queue_run(block, offset, 1); !queued) return std::unexpected(queued.error());
    return Queued::queued;
  }

  /// Queues all pages of a range. With ZeroPagesLegacy, `on_zero(offset)` is called for each page that is zero.
  ///
  /// Params: `offset`, `bytes`: multiples of the page size, inside the block.
  /// Errors, Threads: as queue_page().
  template <class OnZero>
  Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes, OnZero&& on_zero) {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check(block, offset, bytes); !ready) return std::unexpected(ready.error());
    s.checks.note_run(s.shared.map, block, offset, bytes / s.page_bytes);
    QueuedPages done;
    if (auto queued = s.producer.queue(block, offset, bytes / s.page_bytes, on_zero, done); !queued)
      return std::unexpected(queued.error());
    return done;
  }

  Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes)
    requires NeedsNoZeroSink<Z>
  {
    return queue_range(block, offset, bytes, [](std::uint64_t) {});
  }

  /// Queues every page whose bit is set: bit i % 64 of word i / 64 stands for page first_page + i. Empty words cost
  /// next to nothing.
  ///
  /// Params: `bitmap`: as KVM_GET_DIRTY_LOG fills it; bits past the end of the block must be clear.
  /// Errors: Errc::bad_range, before anything is queued; the first error.
  /// Threads: producer. Blocks while every channel is full.
  template <class OnZero>
  Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap, std::uint64_t first_page,
                                  OnZero&& on_zero) {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check(block, 0, 0); !ready) return std::unexpected(ready.error());
    const std::uint64_t pages = s.shared.map.pages(block);
    const Subject name(s.shared.map.block(block).idstr);
    if (first_page > pages) return fail(Errc::bad_range, Stage::produce, "queue_dirty: page", first_page, pages, name);
    if (const std::uint64_t end = end_of_dirty(bitmap); end > pages - first_page)
      return fail(Errc::bad_range, Stage::produce, "queue_dirty: page", first_page + end - 1, pages, name);

    QueuedPages done;
    for (std::size_t word = 0; word < bitmap.size(); ++word) {
      if (bitmap[word] == 0) continue;
      const std::uint64_t offset = (first_page + 64 * word) * s.page_bytes;
      s.checks.note_bits(s.shared.map, block, offset, bitmap[word]);
      if (auto queued = s.producer.queue_bits(block, offset, bitmap[word], on_zero, done); !queued)
        return std::unexpected(queued.error());
    }
    return done;
  }

  Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap, std::uint64_t first_page = 0)
    requires NeedsNoZeroSink<Z>
  {
    return queue_dirty(block, bitmap, first_page, [](std::uint64_t) {});
  }

  /// Queues a page that the caller knows to be zero; nobody looks at it.
  ///
  /// Returns, Errors, Threads: as queue_page().
  Result<Queued> queue_zero(BlockId block, std::uint64_t offset) noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_place(block, offset, s.page_bytes); !ready) return std::unexpected(ready.error());
    s.checks.note_run(s.shared.map, block, offset, 1);
    QueuedPages done;
    if (auto queued = s.producer.queue_zero(block, offset, done); !queued) return std::unexpected(queued.error());
    return done.queued != 0 ? Queued::queued : Queued::zero_on_main;
  }

  /// Queues one packet's pages as copies (PageSource::copies): for a relay. Nothing is copied again: the buffer is
  /// swapped for an empty one, and the channels send from it.
  ///
  /// Params: `offsets`: 1 to wire::page_count() places, no page twice; `normal_pages`: how many of them have their bytes
  ///   in `pages`, one after the other; the others are zero pages; `on_zero(offset)`: called with ZeroPagesLegacy for
  ///   each zero page, also for those found among the others; true: the caller puts it on its main stream, false: it
  ///   travels as bytes.
  /// Errors: Errc::bad_range, offset_misaligned, offset_past_block, bad_option (`pages` holds no memory), not_supported
  ///   with PageSource::guest: nothing is queued or swapped; the first error. Threads: producer. Blocks while every
  ///   channel is full.
  template <class OnZero>
  Result<QueuedPages> queue_copies(BlockId block, std::span<const std::uint64_t> offsets, std::size_t normal_pages,
                                   PageBuffer& pages, OnZero&& on_zero) {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_place(block, 0, 0); !ready) return std::unexpected(ready.error());
    if (s.shared.source != PageSource::copies) return fail(Errc::not_supported, Stage::produce, "queue_copies");
    if (offsets.empty() || offsets.size() > s.shared.map.packet_pages() || normal_pages > offsets.size())
      return fail(Errc::bad_range, Stage::produce, "queue_copies", offsets.size());
    // Also without normal pages: it is swapped in, and later pages are written to it.
    if (pages.data() == nullptr) return fail(Errc::bad_option, Stage::produce, "queue_copies: buffer without memory");
    for (const std::uint64_t offset : offsets)
      if (auto checked = s.shared.map.check(block, offset); !checked) return std::unexpected(checked.error());
    QueuedPages done;
    if (auto queued = s.producer.queue_copies(block, offsets, normal_pages, pages, on_zero, done); !queued)
      return std::unexpected(queued.error());
    return done;
  }

  /// Queues a device-state packet (format/packets.md section 13). It travels on any channel, at once, not ordered by
  /// SYNC.
  ///
  /// Params: `state`: copied; idstr 1 to 255 bytes without NUL, 1 byte to just below 4 GiB.
  /// Errors: Errc::peer_lacks_device_state; not_supported with a compressor, as in QEMU; bad_range; ENOMEM; the first
  ///   error. Threads: producer. Blocks while every channel is full.
  Result<void> queue_device_state(const DeviceState& state) noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_open(); !ready) return ready;
    if (!s.options.peer.device_state) return fail(Errc::peer_lacks_device_state, Stage::produce);
    if (C::method != wire::flag_none)
      return fail(Errc::not_supported, Stage::produce, "device state on compressed channels");
    if (state.idstr.empty() || state.idstr.size() > wire::max_idstr_length || state.idstr.contains('\0'))
      return fail(Errc::bad_range, Stage::produce, "device idstr", state.idstr.size());
    if (state.bytes.empty() || state.bytes.size() > std::numeric_limits<std::uint32_t>::max())
      return fail(Errc::bad_range, Stage::produce, "device state", state.bytes.size());
    if (auto queued = s.producer.queue_device_state(state); !queued) return queued;
    s.shared.handoff->flush();  // it may be the last: no sync() needs to follow
    return {};
  }

  /// Hands over what is queued, so that it leaves although no sync() follows soon.
  ///
  /// Errors: the first error. Threads: producer.
  Result<void> flush() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_open(); !ready) return ready;
    if (auto put = s.producer.put_open(); !put) return put;
    s.shared.handoff->flush();
    return {};
  }

  /// Closes the epoch: every channel will write a SYNC behind its pages of this epoch. Returns the epoch's number,
  /// counted from 0, without waiting for any channel.
  ///
  /// Errors: the first error. Threads: producer. Blocks only while every channel is full.
  /// Wire: format/packets.md section 6; the main stream's record may be written before or after.
  Result<std::uint64_t> sync() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_open(); !ready) return std::unexpected(ready.error());
    if (auto put = s.producer.put_open(); !put) return std::unexpected(put.error());
    s.producer.note_synced();
    s.checks.new_epoch();
    s.epochs.add(1);
    return s.shared.handoff->close_epoch();
  }

  /// Waits until every channel has written (not: the peer has read) the SYNC of an epoch that sync() returned.
  ///
  /// Errors: Errc::bad_range for an epoch that is not closed; the first error. Threads: any.
  Result<void> wait(std::uint64_t epoch) noexcept {
    State& s = checked();
    if (epoch >= s.epochs.get()) return fail(Errc::bad_range, Stage::sync, "wait: epoch is not closed", epoch);
    auto watch = s.shared.watch();
    const auto look = [&] { s.shared.check_progress(watch); };
    if (s.shared.gate.wait(epoch, watch.slice(), look)) return {};
    return std::unexpected(s.shared.error.get());
  }

  /// sync(), then wait().
  Result<std::uint64_t> sync_and_wait() noexcept {
    const auto epoch = sync();
    if (!epoch) return epoch;
    if (auto written = wait(*epoch); !written) return std::unexpected(written.error());
    return epoch;
  }

  /// Ends in order, and waits until the receiver confirms that everything has arrived: the end for those whose receiver is
  /// ours and who have no main stream that says it. Success means that its Receiver::finish() has succeeded.
  ///
  /// Errors: Errc::peer_lacks_confirmation (nothing has ended yet) with another SenderOptions::peer than peer_multifd, or
  ///   over a transport that carries no answer (a pipe); peer_gave_up with the receiver's own reason; unconfirmed when it
  ///   ends without an answer; timed_out after confirm_timeout; else as close_channels().
  /// Threads: producer. Wire: wire/answer.hpp.
  Result<void> finish() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_open(); !ready) return ready;
    if (!s.shared.gets_answer()) return fail(Errc::peer_lacks_confirmation, Stage::close, "Sender::finish");
    // Relaxed: the hand-off's end, which comes later, publishes it.
    s.shared.wants_answer.store(true, std::memory_order_relaxed);
    return close_channels();
  }

  /// Ends the channels in order: closes the epoch if pages were queued since the last sync(), waits until everything is
  /// written, ends every stream, joins the workers. For those who learn from their main stream, or from a protocol of
  /// their own, what became of it.
  ///
  /// Success says that everything was handed to the transports, and nothing about the receiver: bytes may still be under
  /// way, and it may refuse all of them. finish() waits for its word.
  ///
  /// Errors: the first error; Errc::already_closed. Threads: producer. Blocks on the peer, at most progress_timeout after
  ///   the last byte that moved; cancel() ends that.
  Result<void> close_channels() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.checks.enter();
    if (auto ready = s.check_open(); !ready) return ready;
    if (s.producer.unsynced()) {
      if (auto synced = sync(); !synced) return std::unexpected(synced.error());
    }
    s.closed = true;
    s.shared.handoff->finish();
    auto watch = s.shared.watch();
    s.shared.gate.wait_for_ends(watch.slice(), [&] { s.shared.check_progress(watch); });
    if (s.shared.wants_answer.load(std::memory_order_relaxed)) s.wait_for_answer();
    s.join();
    if (s.shared.error.failed()) return std::unexpected(s.shared.error.get());
    return {};
  }

  [[deprecated("its success says nothing about the receiver: finish(), or close_channels()")]]
  Result<void> close() noexcept {
    return close_channels();
  }

  /// Makes every call, blocked or to come, return Errc::cancelled (or the error that came before). The peer sees a
  /// broken stream.
  ///
  /// Threads: any; it must have begun before the destructor does. Bounded: it waits for no thread and no peer.
  void cancel() noexcept { checked().shared.error.raise({.code = Errc::cancelled, .op = "Sender::cancel"}); }

  /// Changes the bandwidth cap; 0 lifts it. Threads: any.
  void set_bandwidth(std::uint64_t bytes_per_s) noexcept { checked().shared.limiter.set_rate(bytes_per_s); }

  /// Changes the compression level from each channel's next packet on. An impossible level fails the migration with
  /// Errc::bad_option. Threads: any.
  ///
  /// Errors: Errc::not_supported by compressors whose stream cannot change its level.
  Result<void> set_level(int level) noexcept {
    if constexpr (HasLiveLevel<C>) {
      checked().shared.level.store(level, std::memory_order_relaxed);
      checked().shared.level_changes.fetch_add(1, std::memory_order_release);  // meets follow_level()
      return {};
    } else {
      return fail(Errc::not_supported, Stage::setup, "set_level");
    }
  }

  /// Threads: any. Allocates the snapshot.
  SenderStats stats() const {
    const State& s = checked();
    SenderStats stats;
    for (const auto& channel : s.channels) stats.channels.push_back(channel->stats());
    stats.zero_on_main = s.producer.zero_on_main.get();
    stats.queued_pages = s.producer.queued_pages.get();
    stats.epochs = s.epochs.get();
    stats.producer_waits = s.producer.waits.get();
    stats.producer_wait_ns = s.producer.wait_ns.get();
    return stats;
  }

  Sender(Sender&&) noexcept = default;
  Sender& operator=(Sender&&) noexcept = default;

 private:
  struct State {
    using Channel = SendChannel<T, C, Z>;

    State(const RamMap& ram, Options opts, unsigned channel_count, const std::optional<wire::Announcement>& announced)
        : options(std::move(opts)),
          page_bytes(ram.page_bytes()),
          shared(ram, options.uuid, announced, options.pages, options.digest, channel_count, options.bandwidth,
                 options.progress_timeout, [this] { stop(); }),
          checks(ram),
          producer(shared, options.zero_pages) {
      shared.progress = [this] {
        std::uint64_t sum = 0;
        for (const auto& channel : channels) sum += channel->wire_bytes();
        return sum;
      };
    }

    ~State() {
      if (!threads.empty() && !closed) shared.error.raise({.code = Errc::cancelled, .op = destroyed});
      join();
      shared.error.wait_stopped();
    }

    Result<void> start(std::vector<T> links) {
      const auto count = static_cast<unsigned>(links.size());
      const unsigned depth = options.depth != 0 ? options.depth : BatchHandoff::default_depth(count);
      auto handoff = BatchHandoff::create(count, depth, shared.map.packet_pages());
      if (!handoff) return std::unexpected(handoff.error());
      shared.handoff = std::move(*handoff);
      if (options.pages == PageSource::copies) {
        if (auto copies = shared.handoff->allocate_copies(); !copies) return copies;
      }
      producer.start();
      for (T& link : links) {
        auto channel = Channel::create(shared, static_cast<std::uint8_t>(channels.size()), std::move(link),
                                       options.compressor, options.zero_pages);
        if (!channel) return std::unexpected(channel.error());
        channels.push_back(std::move(*channel));
      }
      threads.reserve(channels.size());
      for (std::uint32_t id = 0; id < channels.size(); ++id) {
        auto thread = Thread::start(*channels[id], options.thread_hook, {.role = "send", .channel = id});
        if (!thread) {
          shared.error.raise(thread.error());
          return std::unexpected(shared.error.get());  // a worker's may have come before
        }
        threads.push_back(std::move(*thread));
      }
      return {};
    }

    /// Called once, by the thread of the first error. `channels` is complete before any thread starts.
    void stop() noexcept {
      shared.handoff->stop();
      shared.limiter.stop();
      shared.gate.stop();
      for (const auto& channel : channels) channel->shutdown();
      // A destructor reports nothing: what the hook would speak to may be gone.
      if (const Error error = shared.error.get(); options.on_error && error.op != destroyed) options.on_error(error);
    }

    void wait_for_answer() noexcept {
      ProgressWatch watch(options.confirm_timeout, 0);
      shared.gate.wait_for_answer(watch.slice(), [&] {
        if (watch.stalled(0))
          shared.error.raise(
              {.code = Errc::timed_out, .stage = Stage::close, .op = "no confirmation for confirm_timeout"});
      });
    }

    void join() noexcept {
      for (Thread& thread : threads) thread.join();
    }

    Result<void> check_open() const noexcept {
      if (shared.error.failed()) [[unlikely]]
        return std::unexpected(shared.error.get());
      if (closed) [[unlikely]]
        return fail(Errc::already_closed, Stage::produce);
      return {};
    }

    /// A range of guest memory.
    Result<void> check(BlockId block, std::uint64_t offset, std::uint64_t bytes) const noexcept {
      if (auto ready = check_place(block, offset, bytes); !ready) [[unlikely]]
        return ready;
      if (shared.source != PageSource::guest) [[unlikely]]
        return fail(Errc::not_supported, Stage::produce, "guest memory: this sender takes copies");
      return {};
    }

    Result<void> check_place(BlockId block, std::uint64_t offset, std::uint64_t bytes) const noexcept {
      if (auto ready = check_open(); !ready) [[unlikely]]
        return ready;
      if (!shared.map.contains(block)) [[unlikely]]
        return fail(Errc::bad_range, Stage::produce, "BlockId of another map", index(block));
      const RamBlock& there = shared.map.block(block);
      if (((offset | bytes) & (page_bytes - 1)) != 0 || bytes > there.bytes || offset > there.bytes - bytes)
          [[unlikely]]
        return fail(Errc::bad_range, Stage::produce, "range", offset, there.bytes, there.idstr);
      return {};
    }

    static constexpr const char* destroyed = "Sender destroyed";

    const Options options;
    const std::size_t page_bytes;
    SendShared shared;
    std::vector<std::unique_ptr<Channel>> channels;
    std::vector<Thread> threads;
    [[no_unique_address]] ProducerChecksOfBuild checks;
    BatchProducer<Z> producer;
    bool closed = false;
    Counter epochs;
  };

  explicit Sender(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  State& checked() const noexcept {
    if (MULTIFD_CHECKED != 0 && !state_) MULTIFD_MISUSE("a Sender is used that was moved from", {}, 0);
    return *state_;
  }

  std::unique_ptr<State> state_;
};

}  // namespace multifd
