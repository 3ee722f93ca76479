// SPDX-License-Identifier: MIT
//
// Receiver: takes the channels of a Sender, or of a real QEMU, and puts their pages into the VMM's own memory. One
// worker per channel; the caller only opens the barrier between epochs, or leaves that to the channels.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/ends/into_hook.hpp"  // IWYU pragma: export
#include "multifd/engine/crew.hpp"
#include "multifd/engine/misuse.hpp"
#include "multifd/options.hpp"
#include "multifd/packets/inlet.hpp"
#include "multifd/receiver_options.hpp"

namespace multifd {

/// Receives pages of a RamMap over connected transports. Every sender generation since QEMU 4.1 is understood without
/// being told (format/versions.md section 15). The peer is not trusted: whatever it sends ends in an Error, and no byte
/// of memory outside the map's blocks changes.
///
/// The order of use: open(), then with Barrier::manual one release_epoch() per epoch, then finish().
///
/// Params: `Into`: where the pages go. IntoMemory: into the map's memory. IntoHook: to a callable, for a relay.
/// Threads: cancel() and stats() from any thread; release_epoch(), finish() and end_epochs() from one at a time.
/// Errors: the first error stops all channels and is what every later call returns. Error::channel is the id from
///   the hello.
/// Lifetime: the destructor cancels if finish() has not been called, joins, and never waits for the peer. It waits for
///   hooks that run.
template <Transport T, Compressor C, PageSink Into = IntoMemory>
class Receiver {
 public:
  using Options = ReceiverOptions<C, Into>;
  static_assert((C::method & ~wire::flag_compression_mask) == 0, "Compressor::method must be compression bits");

  /// Starts one worker per link and waits for every channel's hello; the ids may come in any order.
  ///
  /// Params: `ram`: copied (the memory is not); with IntoMemory all blocks writable; `links`: exactly as many
  ///   as the peer has channels.
  /// Errors: Errc::bad_channel_count, bad_block_size (no block), read_only_block, block_without_memory, bad_option (a
  ///   negative time limit, no hook); bad_magic, bad_version, channel_count_mismatch, page_size_mismatch,
  ///   wrong_compression, block_list_mismatch when a sender of ours announces other settings than this side's;
  ///   too_many_channels, see ReceiverOptions::listener; uuid_mismatch, channel_id_out_of_range, duplicate_channel_id,
  ///   truncated_hello from the hellos; timed_out, cancelled.
  /// Cost: a thread for each channel, whose buffers are all allocated here (1 MiB with a compressor, and its decoder); with
  ///   IntoMemory two bits a page. Nothing is allocated later but device state and stats().
  /// `rejoins`: where new connections come from when one is lost (format/extension.md section 19.10); it outlives this object.
  ///   Null: a lost connection is the transfer's first error. With Barrier::manual only: end_epochs() ends the waiting.
  [[nodiscard]] static Result<Receiver> open(const RamMap& ram, std::vector<T> links, Options options = {},
                                             packets::Rejoins<T>* rejoins = nullptr) {
    if (rejoins != nullptr && options.barrier == Barrier::automatic)
      return fail(Errc::not_supported, Stage::setup, "Receiver::open: Rejoins with an automatic barrier");
    if (links.empty() || links.size() > max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "Receiver::open", links.size());
    if (ram.blocks().empty()) return fail(Errc::bad_block_size, Stage::setup, "Receiver::open: no RAM block");
    for (const RamBlock& block : ram.blocks()) {
      if (!Into::writes_memory) break;
      if (block.access == Access::read_only)
        return fail(Errc::read_only_block, Stage::setup, "Receiver::open", 0, 0, block.idstr);
      if (block.access == Access::none)
        return fail(Errc::block_without_memory, Stage::setup, "Receiver::open", 0, 0, block.idstr);
    }
    for (const auto& [name, limit] : {std::pair("ReceiverOptions::hello_timeout", options.hello_timeout),
                                      std::pair("ReceiverOptions::barrier_timeout", options.barrier_timeout),
                                      std::pair("ReceiverOptions::progress_timeout", options.progress_timeout)})
      if (auto checked = check_time_limit(name, limit, Stage::setup); !checked) return std::unexpected(checked.error());
    return catch_bad_alloc(Stage::setup, "Receiver::open", [&]() -> Result<Receiver> {
      auto state = std::make_unique<State>(ram, std::move(options), static_cast<unsigned>(links.size()), rejoins);
      if (auto started = state->start(std::move(links)); !started) return std::unexpected(started.error());
      return Receiver(std::move(state));
    });
  }

  /// Waits until every channel has read its SYNC, with all pages before it in memory, and lets the channels into the
  /// next epoch: what a VMM does when its main stream closes an epoch. Returns the number of the epoch that ended.
  ///
  /// Errors: Errc::not_supported with Barrier::automatic; already_closed behind finish(), finish(limit) or end_epochs(),
  ///   at once, and the channels go on; unsynced_end when a channel ended instead (Error::channel); timed_out when a
  ///   channel's SYNC does not come and nothing moves; the first error.
  /// Wire: format/packets.md section 6.5.
  ///
  /// `while_held()` is called in between: every page of the epoch has arrived, and none of the next has been taken. A
  /// relay closes its own epoch there (format/roles.md section 11 step 7). It returns a Result<void>; its error is the
  /// migration's.
  template <class WhileHeld = packets::EpochBarrier::Nothing>
  [[nodiscard]] Result<std::uint64_t> release_epoch(WhileHeld&& while_held = {}) {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (s.shared.error.failed()) return std::unexpected(s.shared.error.get());
    if (s.finished || s.shared.barrier->epochs_ended()) return fail(Errc::already_closed, Stage::sync);
    if (s.options.barrier == Barrier::automatic) return fail(Errc::not_supported, Stage::sync, "automatic barrier");
    if (auto alone = s.refuse_more_channels(); !alone) return std::unexpected(s.first_error(alone.error()));
    const auto epoch = s.shared.barrier->release_when_all([&s] { return s.poll(); }, while_held);
    if (epoch) return epoch;
    return std::unexpected(s.first_error(epoch.error()));
  }

  /// Waits until every channel has ended in order, and joins the workers. After it all memory is final, and a sender of
  /// ours that waits for it in Sender::finish() is told so. On any error, a sender of ours is told why, and the call waits
  /// for the hooks that run, at most ReceiverOptions::progress_timeout.
  ///
  /// An orderly end says that the last epoch is whole, not that it was the last one of the guest: a source that dies
  /// between two epochs looks the same on the wire. Whether it was the last, only a main stream can say.
  ///
  /// Errors: Errc::sync_mismatch when a channel still waits at a manual barrier; timed_out when nothing arrives for
  ///   ReceiverOptions::progress_timeout; the first error; already_closed.
  [[nodiscard]] Result<void> finish() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    const auto finished = s.finish(as_timeout(s.options.progress_timeout), LimitOf::standstill);
    if (!finished && finished.error().code == Errc::timed_out) return std::unexpected(s.first_error(finished.error()));
    return finished;
  }

  /// finish() that waits no longer than `limit`, whatever arrives meanwhile; 0 looks once. Then the error is timed_out
  /// and the channels go on; either finish() may be called again. As with finish(), no epoch may follow: with
  /// Barrier::manual a SYNC that comes later is sync_mismatch. A negative limit: bad_option. Where a hook blocks when a
  /// channel fails, the call returns that first error at the limit, and the hook goes on until it returns by itself.
  [[nodiscard]] Result<void> finish(std::chrono::milliseconds limit) noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (auto good = check_time_limit("Receiver::finish", limit, Stage::close); !good) return good;
    return s.finish(limit, LimitOf::call);
  }

  /// Says that the last epoch is over (Barrier::manual): from here on no packet changes memory, so that the pages can be
  /// made use of before the channels have ended.
  ///
  /// Errors: Errc::data_after_end when a page has come behind the last epoch, and from finish() when one comes later;
  ///   sync_mismatch likewise for a SYNC; not_supported with Barrier::automatic; the first error; already_closed.
  [[nodiscard]] Result<void> end_epochs() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (s.shared.error.failed()) return std::unexpected(s.shared.error.get());
    if (s.finished) return fail(Errc::already_closed, Stage::close);
    if (s.options.barrier == Barrier::automatic) return fail(Errc::not_supported, Stage::sync, "automatic barrier");
    if (auto ended = s.shared.barrier->end_epochs(); !ended) return std::unexpected(s.first_error(ended.error()));
    s.shared.epochs_ended.store(true, std::memory_order_seq_cst);
    if (s.rejoins != nullptr) s.rejoins->stop();
    s.sink->stop();  // memory that is populated ahead changes, too
    for (const auto& channel : s.crew)
      if (channel->has_data_past(s.shared.barrier->epochs()))
        return std::unexpected(s.first_error(
            {.code = Errc::data_after_end, .stage = Stage::sync, .op = "end_epochs", .channel = channel->stats().id}));
    return {};
  }

  /// Makes every call, blocked or to come, return Errc::cancelled (or the error that came before). The peer sees a
  /// broken stream.
  ///
  /// Threads: any; it must have returned before the destructor begins, as every call of another thread must. Bounded: it
  /// waits for no thread and no peer.
  void cancel() noexcept { visit()->shared.error.raise({.code = Errc::cancelled, .op = "Receiver::cancel"}); }

  /// Threads: any. Allocates the snapshot.
  ReceiverStats stats() const {
    const auto s = visit();
    ReceiverStats stats;
    for (const auto& channel : s->crew) {
      const ChannelStats one = channel->stats();
      stats.channels.insert(std::ranges::upper_bound(stats.channels, one.id, {}, &ChannelStats::id), one);
      stats.pages_verified += channel->pages_verified();
    }
    if constexpr (std::same_as<Into, IntoMemory>) stats.zeros_written = s->sink->zeros_written();
    stats.epochs = s->shared.barrier->epochs();
    return stats;
  }

  /// The sum of all channels' counters. Threads: any. Allocates nothing.
  ChannelStats total() const noexcept {
    const auto s = visit();
    ChannelStats sum;
    for (const auto& channel : s->crew) sum += channel->stats();
    return sum;
  }

  /// How many channels have ended in order. For who knows from a main stream that more must come: a source that gives up
  /// may leave nothing else to be seen. Threads: any.
  unsigned ended_channels() const noexcept { return visit()->shared.barrier->ended_channels(); }

  /// Which pages have arrived, as bytes or as zero. Threads: any.
  const ReceivedPages& received() const noexcept
    requires std::same_as<Into, IntoMemory>
  {
    return checked().sink->received();
  }

  /// Which pages have begun to come as bytes: after an error, memory may have changed here beside received().
  const ReceivedPages& touched() const noexcept
    requires std::same_as<Into, IntoMemory>
  {
    return checked().sink->touched();
  }

  /// A page that came on the caller's main stream (format/main_stream.md section 9.6) goes into memory as a packet's does:
  /// zero pages, `pages` adjacent ones, written only where the memory may hold something else, and one page's bytes.
  ///
  /// Errors: Errc::bad_range, offset_misaligned, offset_past_block: the numbers may be the peer's. Threads: any; but never
  ///   a page that a channel may bring in the same epoch.
  [[nodiscard]] Result<void> apply_zero(BlockId block, std::uint64_t offset, std::size_t pages = 1) noexcept
    requires std::same_as<Into, IntoMemory>
  {
    const auto s = visit();
    if (auto known = s->check_block(block); !known) return known;
    return s->sink->apply_zero(block, offset, pages);
  }
  [[nodiscard]] Result<void> apply_page(BlockId block, std::uint64_t offset, std::span<const std::byte> bytes) noexcept
    requires std::same_as<Into, IntoMemory>
  {
    const auto s = visit();
    if (auto known = s->check_block(block); !known) return known;
    return s->sink->apply_page(block, offset, bytes);
  }

  // ---- With Rejoins

  /// Whose SYNC has ended the epoch that release_epoch() has returned last: for EPOCH_WHOLE. Threads: the caller's.
  std::array<std::uint8_t, 32> arrived_channels() const noexcept { return checked().shared.barrier->last_arrived(); }
  /// Breaks the connection of a channel where it is older than one of this generation, which has come. Threads: any.
  void drop_older(unsigned channel, std::uint32_t generation) noexcept {
    for (const auto& each : visit()->crew)
      if (each->id() == channel) each->drop_older(generation);
  }

  /// The uuid that the peer said.
  Uuid peer_uuid() const noexcept { return checked().peer_uuid(); }

  [[nodiscard]] [[deprecated("release_epoch()")]] Result<std::uint64_t> sync() { return release_epoch(); }

  Receiver(Receiver&&) noexcept = default;
  Receiver& operator=(Receiver&&) noexcept = default;

 private:
  /// What a limit of finish() counts: time in which nothing moves, or the time of the call.
  enum class LimitOf : std::uint8_t { standstill, call };

  struct State {
    using Inlet = packets::Inlet<T, C, Into>;

    State(const RamMap& ram, Options opts, unsigned channel_count, packets::Rejoins<T>* connections)
        : options(std::move(opts)),
          rejoins(connections),
          shared(
              ram, channel_count, C::method, options.first_packet, std::move(options.on_device_state), options.uuid,
              [this] { stop(); }, std::move(options.on_error)) {}

    ~State() {
      if (visitors.entered() || caller.entered())
        MULTIFD_MISUSE("a Receiver is destroyed while another thread is in one of its calls", {}, 0);
      if (crew.started() && !finished) shared.error.abandon("Receiver destroyed");
      join();
      shared.error.wait_stopped();
    }

    [[nodiscard]] Result<void> start(std::vector<T> links) {
      auto made = Into::Sink::create(shared.map, options.into, options.thread_hook);
      if (!made) return std::unexpected(made.error());
      sink = std::move(*made);
      auto barrier = packets::EpochBarrier::create(shared.channels, options.barrier, options.barrier_timeout);
      if (!barrier) return std::unexpected(barrier.error());
      shared.barrier = std::move(*barrier);
      for (unsigned i = 0; i < shared.channels; ++i) {
        auto inlet = Inlet::create(shared, i, std::move(links[i]), options.compressor, *sink, rejoins);
        if (!inlet) return std::unexpected(inlet.error());
        crew.add(std::move(*inlet));
      }
      if (auto started = crew.start("recv", options.thread_hook, shared.error); !started) return started;
      if (auto complete = shared.hellos.wait(ProgressWatch::bounded(options.hello_timeout), options.interrupt);
          !complete)
        return std::unexpected(first_error(complete.error()));
      if (auto alone = refuse_more_channels(); !alone) return std::unexpected(first_error(alone.error()));
      return {};
    }

    /// For the caller's waits: polled at least every 250 ms. Returns what changes while anything moves.
    std::uint64_t poll() noexcept {
      if (options.interrupt != nullptr && options.interrupt->triggered())
        shared.error.raise({.code = Errc::cancelled, .op = "interrupted"});
      return shared.moved();
    }

    [[nodiscard]] Result<void> check_block(BlockId block) const noexcept {
      return shared.map.contains(block) ? Result<void>{} : fail(Errc::bad_range, Stage::parse, "block", index(block));
    }

    [[nodiscard]] Result<void> finish(std::chrono::milliseconds limit, LimitOf what) noexcept {
      const char* const late = what == LimitOf::standstill ? "no byte from any channel for progress_timeout"
                                                           : "a channel goes on behind finish()'s limit";
      ProgressWatch watch(limit, 0);
      const auto progress = [&] {
        const std::uint64_t moved = poll();
        return what == LimitOf::standstill ? moved : 0;
      };
      const auto failed = [&] {
        // A hook may hold a worker; the destructor waits for that.
        if (limit.count() == 0 ? crew.over() : crew.wait_until_over(watch, progress)) join();
        return std::unexpected(shared.error.get());
      };
      if (shared.error.failed()) return failed();
      if (finished) return fail(Errc::already_closed, Stage::close);
      if (auto ended = shared.barrier->end_epochs(); !ended) return std::unexpected(first_error(ended.error()));
      const auto ended = shared.barrier->wait_for_channels(limit, progress, late);
      // First: a channel that nobody reads may be why the others stand still.
      if (auto alone = refuse_more_channels(); !alone) return std::unexpected(first_error(alone.error()));
      if (!ended) return ended;
      if (shared.error.failed()) return failed();
      join();
      if (shared.error.failed()) return std::unexpected(shared.error.get());
      finished = true;
      // A cancel() that came in between has told the sender that this side gives up.
      if (!confirm() && shared.error.failed()) return std::unexpected(shared.error.get());
      return {};
    }

    /// Errors: Errc::too_many_channels (detail: the id of one), and no other. That nobody could look (no descriptor, no
    /// memory, the listener's own Interrupt) says nothing about the migration; its next call looks again.
    [[nodiscard]] Result<void> refuse_more_channels() noexcept {
      if (options.listener == nullptr || shared.hellos.announced()) return {};
      std::uint64_t id = 0;
      const auto is_one_more = [&](std::span<const std::byte> first) {
        const auto found = wire::id_of_channel_too_many(first, shared.channels, peer_uuid());
        id = found.value_or(0);
        return found.has_value();
      };
      const auto more = catch_bad_alloc(Stage::accept, "look for more channels",
                                        [&] { return options.listener->any_waiting(is_one_more); });
      if (!more.value_or(false)) return {};
      return fail(Errc::too_many_channels, Stage::accept, "accept", id, shared.channels);
    }

    Uuid peer_uuid() const noexcept { return shared.hellos.uuid(); }

    /// Makes `error` the first error unless another came before; returns the one that counts.
    Error first_error(const Error& error) noexcept {
      shared.error.raise(error);
      return shared.error.get();
    }

    /// Called once, by the thread of the first error. The crew is complete before any thread starts.
    void stop() noexcept {
      shared.barrier->stop();
      shared.hellos.stop();
      // The peer's own answer is on every channel before the first is broken: whichever breaks first there has it.
      if (shared.peer_takes_answer.load(std::memory_order_relaxed)) {
        const wire::AnswerBytes answer = wire::encode_answer(shared.error.get());
        for (const auto& channel : crew) channel->give_reason(answer);
      }
      crew.shutdown();
    }

    /// Tells a sender of ours that everything has arrived. Whether that reaches it nobody here can know, so whether it
    /// can be written is no reason to fail: the memory is whole. False: another answer has been given.
    [[nodiscard]] bool confirm() noexcept {
      if (!shared.peer_takes_answer.load(std::memory_order_relaxed)) return true;
      const auto first = std::ranges::find(crew, 0u, [](const auto& channel) { return channel->id(); });
      return first == crew.end() || (*first)->confirm();
    }

    void join() noexcept {
      crew.join();
      if (sink) sink->stop();
    }

    Options options;
    packets::Rejoins<T>* const rejoins;
    packets::InletShared shared;
    std::unique_ptr<typename Into::Sink> sink;
    engine::Crew<Inlet> crew;
    bool finished = false;
    [[no_unique_address]] engine::OneCallerOfBuild caller{
        "two threads are in a Receiver's release_epoch(), finish() or end_epochs() at once"};
    [[no_unique_address]] engine::VisitorsOfBuild visitors;  ///< threads in the calls that any may make
  };

  explicit Receiver(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  State& checked() const noexcept {
    if (MULTIFD_CHECKED != 0 && !state_) MULTIFD_MISUSE("a Receiver is used that was moved from", {}, 0);
    return *state_;
  }

  engine::Visited<State> visit() const noexcept { return engine::Visited(checked()); }

  std::unique_ptr<State> state_;
};

}  // namespace multifd
