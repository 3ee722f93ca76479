// SPDX-License-Identifier: MIT
//
// Sender: moves a VM's dirty pages to a peer over many channels. The caller's thread queues pages (the producer), one
// worker per channel sends them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/ends/page_source.hpp"
#include "multifd/engine/pipeline.hpp"
#include "multifd/format/device_state.hpp"
#include "multifd/options.hpp"
#include "multifd/packets/announce.hpp"
#include "multifd/packets/outlet.hpp"
#include "multifd/sender_options.hpp"

namespace multifd {

/// Sends pages of a RamMap over connected transports.
///
/// The order of use: open(), then per epoch any number of queue_*() and one close_epoch(), then finish() or
/// close_channels(). A page must be queued at most once per epoch (MULTIFD_CHECKED finds it): inside one there is no
/// order, so the older of two copies might win. A page dirtied again belongs to a later epoch (format/packets.md section
/// 6). Queued pages leave at the latest at close_epoch() or push_out().
///
/// Params: `From`: where the pages lie. FromGuest: in the map's memory, queued by queue_page(), queue_range() and
///   queue_dirty(). FromCopies: in buffers, for a relay; the blocks need no memory, and pages are queued by queue_copies().
///   FromEither: all of these.
/// Threads: cancel(), stats(), set_bandwidth(), set_level() from any thread; everything else from one, the producer.
///   The memory may be written by the guest all the time.
/// Errors: the first error, from whichever thread, stops all channels and is what every later call returns.
/// Lifetime: the destructor cancels if neither has been called, joins, and never waits for the peer.
template <Transport T, Compressor C, ZeroPagePolicy Z, PageSource From = FromGuest>
class Sender {
 public:
  using Options = SenderOptions<C, Z>;
  static_assert((C::method & ~wire::flag_compression_mask) == 0, "Compressor::method must be compression bits");

  /// Starts one worker per link; channel ids follow the order of `links`. Each begins with its hello.
  ///
  /// Params: `ram`: at least one block, copied (the memory is not); `links`: 1 to 255 connected streams.
  /// Errors: Errc::bad_channel_count, bad_block_size (no block), block_without_memory, peer_lacks_zero_lists, bad_option;
  ///   out of memory or threads. The links are closed on any error.
  /// Cost: a thread for each channel, `depth` batches of 1 KiB, with FromCopies and FromEither of 512 KiB, and a compressor's encoder.
  ///   Nothing is allocated later but messages and stats().
  /// `redial`: makes new connections where one is lost (format/extension.md section 19.10), and what was lost with it comes
  ///   back by take_lost(); it outlives this object. Null: a lost connection is the transfer's first error. Own peers only;
  ///   there is no queue_device_state() with it.
  [[nodiscard]] static Result<Sender> open(const RamMap& ram, std::vector<T> links, Options options = {},
                                           packets::Redial<T>* redial = nullptr) {
    if (Z::stage == ZeroStage::channel && !options.peer.zero_lists)
      return fail(Errc::peer_lacks_zero_lists, Stage::setup, "Sender::open");
    if (options.digest == Digest::on && !options.peer.digests)
      return fail(Errc::bad_option, Stage::setup, "digest: only our own receiver verifies it");
    if (auto good = check_time_limit("SenderOptions::confirm_timeout", options.confirm_timeout, Stage::setup); !good)
      return std::unexpected(good.error());
    return catch_bad_alloc(Stage::setup, "Sender::open", [&]() -> Result<Sender> {
      auto format = std::make_unique<Format>(ram, options, links, redial);
      auto pipeline = Pipeline::open(ram, static_cast<unsigned>(links.size()), std::move(options.zero_pages),
                                     {.bandwidth = options.bandwidth,
                                      .depth = options.depth,
                                      .progress_timeout = options.progress_timeout,
                                      .interrupted = when_triggered(options.interrupt),
                                      .while_waiting = std::move(options.while_waiting),
                                      .comes_back = redial != nullptr,
                                      .thread_hook = std::move(options.thread_hook),
                                      .on_error = std::move(options.on_error)},
                                     [&](unsigned channel) {
                                       return Outlet::create(format->shared, channel, std::move(links[channel]),
                                                             options.compressor, redial);
                                     });
      if (!pipeline) return std::unexpected(pipeline.error());
      return Sender(std::move(format), std::move(*pipeline));
    });
  }

  /// Queues one page.
  ///
  /// Params: `offset`: bytes from the start of the block, a multiple of the page size.
  /// Errors: Errc::bad_range (nothing is queued, the sender goes on); the first error.
  /// Threads: producer. Blocks while every channel is full.
  [[nodiscard]] Result<Queued> queue_page(BlockId block, std::uint64_t offset) noexcept
    requires From::guest
  {
    return producer().queue_page(block, offset);
  }

  /// Queues all pages of a range.
  ///
  /// Params: `offset`, `bytes`: multiples of the page size, inside the block; `on_zero(offset)`: needed by policies that
  ///   report zero pages to the caller (ZeroPagesLegacy), and called for each: true, or nothing: the caller puts the page
  ///   on its main stream; false: it travels as bytes.
  /// Errors, Threads: as queue_page().
  template <engine::ZeroSink<Z> OnZero = engine::NoZeroSink>
  [[nodiscard]] Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                OnZero&& on_zero = {})
    requires From::guest
  {
    return producer().queue_range(block, offset, bytes, on_zero);
  }

  /// Queues every page whose bit is set: bit i % 64 of word i / 64 stands for page first_page + i. Empty words cost
  /// next to nothing.
  ///
  /// Params: `bitmap`: as KVM_GET_DIRTY_LOG fills it; bits past the end of the block must be clear; `on_zero`: as
  ///   queue_range().
  /// Errors: Errc::bad_range, before anything is queued; the first error.
  /// Threads: producer. Blocks while every channel is full.
  template <engine::ZeroSink<Z> OnZero = engine::NoZeroSink>
  [[nodiscard]] Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                std::uint64_t first_page = 0, OnZero&& on_zero = {})
    requires From::guest
  {
    return producer().queue_dirty(block, bitmap, first_page, on_zero);
  }

  /// Queues a page that the caller knows to be zero, without a zero check. Where the policy has a form for zero pages,
  /// nobody reads the page. With ZeroPagesNone it travels as bytes: FromGuest reads them from memory when the page
  /// leaves, FromCopies writes zeros.
  ///
  /// Returns, Errors, Threads: as queue_page().
  [[nodiscard]] Result<Queued> queue_zero(BlockId block, std::uint64_t offset) noexcept {
    return producer().queue_zero(block, offset);
  }

  /// queue_zero() for all pages of a range.
  ///
  /// Params: `offset`, `bytes`: as queue_range(); `on_zero(offset)`: needed by policies that report zero pages to the
  ///   caller (ZeroPagesLegacy). It is called for each page, and has to put all of them on the main stream: what it
  ///   returns does not count.
  /// Errors, Threads: as queue_range().
  template <engine::ZeroSink<Z> OnZero = engine::NoZeroSink>
  [[nodiscard]] Result<QueuedPages> queue_zeros(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                OnZero&& on_zero = {}) {
    if (auto good = producer().check_range(block, offset, bytes); !good) return std::unexpected(good.error());
    QueuedPages done;
    for (const std::uint64_t end = offset + bytes; offset < end; offset += pipeline_->map().page_bytes()) {
      const auto queued = queue_zero(block, offset);
      if (!queued) return std::unexpected(queued.error());
      if (*queued == Queued::zero_on_main) static_cast<void>(on_zero(offset));
      ++(*queued == Queued::zero_on_main ? done.zero_on_main : done.queued);
    }
    return done;
  }

  /// Queues one packet's pages as copies: for a relay. Nothing is copied again: the buffer is swapped for an empty one,
  /// and the channels send from it.
  ///
  /// Params: `offsets`: 1 to wire::page_count() places, no page twice; `normal_pages`: how many of them have their bytes
  ///   in `pages`, one after the other; the others are zero pages; `on_zero`: as queue_range(), called also for those
  ///   found among the others.
  /// Errors: Errc::bad_range, offset_misaligned, offset_past_block, bad_option (`pages` holds no memory): nothing is
  ///   queued or swapped; the first error. Threads: producer. Blocks while every channel is full.
  template <engine::ZeroSink<Z> OnZero = engine::NoZeroSink>
  [[nodiscard]] Result<QueuedPages> queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                 std::size_t normal_pages, PageBuffer& pages, OnZero&& on_zero = {})
    requires From::copies
  {
    return producer().queue_copies(block, offsets, normal_pages, pages, on_zero);
  }

  /// Queues a device-state packet (format/packets.md section 13). It travels on any channel, at once, not ordered by
  /// SYNC.
  ///
  /// Params: `state`: copied; idstr 1 to 255 bytes without NUL, 1 byte to just below 4 GiB.
  /// Errors: Errc::peer_lacks_device_state; not_supported with a compressor, as in QEMU; bad_range; ENOMEM; the first
  ///   error. Threads: producer. Blocks while every channel is full.
  [[nodiscard]] Result<void> queue_device_state(const DeviceState& state) noexcept {
    if (auto ready = producer().check_open(); !ready) return ready;
    if (!format_->peer.device_state) return fail(Errc::peer_lacks_device_state, Stage::produce);
    if (format_->redial != nullptr) return fail(Errc::not_supported, Stage::produce, "device state beside a Redial");
    if (C::method != wire::flag_none)
      return fail(Errc::not_supported, Stage::produce, "device state on compressed channels");
    if (state.idstr.empty() || state.idstr.size() > max_idstr_length || state.idstr.contains('\0'))
      return fail(Errc::bad_range, Stage::produce, "device idstr", state.idstr.size());
    if (state.bytes.empty() || state.bytes.size() > std::numeric_limits<std::uint32_t>::max())
      return fail(Errc::bad_range, Stage::produce, "device state", state.bytes.size());
    // Allocated for each: such packets are few, large, and not on the way of the pages.
    Message packet{.bytes = nullptr, .size = wire::device_state_header_bytes + state.bytes.size()};
    packet.bytes.reset(new (std::nothrow) std::byte[packet.size]);
    if (!packet.bytes) return fail_errno(Stage::produce, "allocate device state", ENOMEM);
    wire::encode_device_state_header(packet.bytes.get(), state);
    std::memcpy(packet.bytes.get() + wire::device_state_header_bytes, state.bytes.data(), state.bytes.size());
    return producer().queue_message(std::move(packet));
  }

  /// Hands over what is queued, so that it leaves although no close_epoch() follows soon.
  ///
  /// Errors: the first error. Threads: producer.
  [[nodiscard]] Result<void> push_out() noexcept { return producer().push_out(); }

  /// Closes the epoch: every channel will write a SYNC behind its pages of this epoch. Returns the epoch's number,
  /// counted from 0, without waiting for any channel.
  ///
  /// Errors: the first error. Threads: producer. Blocks only while every channel is full.
  /// Wire: format/packets.md section 6; the main stream's record may be written before or after.
  [[nodiscard]] Result<std::uint64_t> close_epoch() noexcept { return producer().close_epoch(); }

  /// Waits until every channel has written (not: the peer has read) the SYNC of an epoch that close_epoch() returned.
  ///
  /// Errors: Errc::bad_range for an epoch that is not closed; the first error. Threads: any.
  [[nodiscard]] Result<void> wait(std::uint64_t epoch) noexcept { return visit()->wait(epoch); }

  // ---- With a Redial

  /// The receiver says that an epoch is over (EPOCH_WHOLE). What a channel carried in it whose SYNC has not arrived there is
  /// lost, and so is its connection. To be called for each epoch, and before the one behind the next is closed: pages of two
  /// epochs are remembered.
  ///
  /// Errors: Errc::bad_range for an epoch that is not closed. Threads: producer.
  [[nodiscard]] Result<void> settle(const wire::EpochWhole& whole) noexcept {
    return pipeline_->settle(whole.epoch, [&](unsigned channel) { return whole.has(channel); });
  }

  /// Adds the pages to `into` that have to be sent again, and forgets them. Returns how many there are. They belong to a later
  /// epoch than they did. Threads: any.
  std::uint64_t take_lost(DirtyBitmaps& into) noexcept { return pipeline_->take_lost(into); }

  /// close_epoch(), then wait().
  [[nodiscard]] Result<std::uint64_t> close_epoch_and_wait() noexcept {
    const auto epoch = close_epoch();
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
  /// Threads: producer. Wire: format/answer.hpp.
  [[nodiscard]] Result<void> finish() noexcept {
    if (auto ready = producer().check_open(); !ready) return ready;
    if (!format_->shared.gets_answer()) return fail(Errc::peer_lacks_confirmation, Stage::close, "Sender::finish");
    return visit()->finish_confirmed(format_->confirm_timeout);
  }

  /// Ends the channels in order: closes the epoch if pages were queued since the last close_epoch(), waits until
  /// everything is written, ends every stream, joins the workers. For those who learn from their main stream, or from a
  /// protocol of their own, what became of it.
  ///
  /// Success says that everything was handed to the transports, and nothing about the receiver: bytes may still be under
  /// way, and it may refuse all of them. finish() waits for its word.
  ///
  /// With a Redial no connection is made again from here on, and a channel without one counts as ended: all that counts has to
  /// be settled before.
  ///
  /// Errors: the first error; Errc::already_closed. Threads: producer. Blocks on the peer, at most progress_timeout after
  ///   the last byte that moved; cancel() ends that.
  [[nodiscard]] Result<void> close_channels() noexcept {
    if (format_->redial != nullptr) format_->redial->stop();
    return visit()->finish();
  }

  [[nodiscard]] [[deprecated(
      "its success says nothing about the receiver: finish(), or close_channels()")]] Result<void>
  close() noexcept {
    return close_channels();
  }
  [[nodiscard]] [[deprecated("close_epoch()")]] Result<std::uint64_t> sync() noexcept { return close_epoch(); }
  [[nodiscard]] [[deprecated("close_epoch_and_wait()")]] Result<std::uint64_t> sync_and_wait() noexcept {
    return close_epoch_and_wait();
  }
  [[nodiscard]] [[deprecated("push_out()")]] Result<void> flush() noexcept { return push_out(); }

  /// Makes every call, blocked or to come, return Errc::cancelled (or the error that came before). The peer sees a
  /// broken stream.
  ///
  /// Threads: any; it must have returned before the destructor begins, as every call of another thread must. Bounded: it
  /// waits for no thread and no peer.
  void cancel() noexcept { visit()->cancel("Sender::cancel"); }

  /// Changes the bandwidth cap; 0 lifts it. Threads: any.
  void set_bandwidth(std::uint64_t bytes_per_s) noexcept { visit()->set_bandwidth(bytes_per_s); }

  /// Changes the compression level from each channel's next packet on. An impossible level fails the migration with
  /// Errc::bad_option. Threads: any.
  ///
  /// Errors: Errc::not_supported by compressors whose stream cannot change its level.
  [[nodiscard]] Result<void> set_level(int level) noexcept {
    if constexpr (HasLiveLevel<C>) {
      [[maybe_unused]] const auto visiting = visit();
      format_->shared.level.store(level, std::memory_order_relaxed);
      format_->shared.level_changes.fetch_add(1, std::memory_order_release);  // meets follow_level()
      return {};
    } else {
      return fail(Errc::not_supported, Stage::setup, "set_level");
    }
  }

  /// Threads: any. Allocates the snapshot.
  SenderStats stats() const { return visit()->stats(); }

  /// The sum of all channels' counters; its `zero_pages` has zero_on_main in it. Threads: any. Allocates nothing.
  ChannelStats total() const noexcept { return visit()->total(); }

  Sender(Sender&&) noexcept = default;
  Sender& operator=(Sender&& other) noexcept {
    pipeline_ = std::move(other.pipeline_);  // first: it uses the other
    format_ = std::move(other.format_);
    return *this;
  }

 private:
  using Outlet = packets::Outlet<T, C>;
  using Pipeline = engine::Pipeline<Outlet, Z, From>;

  /// What the multifd format adds to the engine.
  struct Format {
    Format(const RamMap& ram, const Options& options, const std::vector<T>& links, packets::Redial<T>* dial)
        : peer(options.peer),
          confirm_timeout(options.confirm_timeout),
          redial(dial),
          shared(ram.page_bytes(), options.uuid, options.digest) {
      // Only to our own receivers: others ignore these bytes today, and may give them a meaning tomorrow.
      if (!peer.digests) return;
      shared.announced = packets::announcement_of(ram, static_cast<unsigned>(links.size()), C::method);
      shared.announced->takes_answer = std::ranges::all_of(links, packets::carries_answer<T>);
    }

    const PeerProfile peer;
    const std::chrono::milliseconds confirm_timeout;
    packets::Redial<T>* const redial;
    packets::OutletShared shared;
  };

  Sender(std::unique_ptr<Format> format, std::unique_ptr<Pipeline> pipeline) noexcept
      : format_(std::move(format)), pipeline_(std::move(pipeline)) {}

  Pipeline& checked() const noexcept {
    if (MULTIFD_CHECKED != 0 && !pipeline_) MULTIFD_MISUSE("a Sender is used that was moved from", {}, 0);
    return *pipeline_;
  }
  engine::Visited<Pipeline> visit() const noexcept { return engine::Visited(checked()); }
  auto& producer() noexcept { return checked().producer; }

  std::unique_ptr<Format> format_;      // before the pipeline, whose outlets use it
  std::unique_ptr<Pipeline> pipeline_;  // of its own: one step less on each page's way
};

}  // namespace multifd
