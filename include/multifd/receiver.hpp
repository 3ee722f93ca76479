// SPDX-License-Identifier: MIT
//
// Receiver: takes the channels of a Sender, or of a real QEMU, and puts their pages into the VMM's own memory. One
// worker per channel; the caller only opens the barrier between epochs, or leaves that to the channels.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/channel/misuse.hpp"
#include "multifd/channel/recv_channel.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd {

/// Run-time settings of a Receiver. Everything has a default. Time limits: 0 is none (time_limit.hpp).
template <Compressor C>
struct ReceiverOptions {
  C compressor{};  ///< limits of the decoder; levels are the sender's matter
  UuidCheck uuid{};
  Barrier barrier = Barrier::automatic;
  DestinationMemory destination = DestinationMemory::unknown;
  Populate populate = Populate::off;  ///< `ahead` for fresh memory, where a core is idle
  FirstPacket first_packet = FirstPacket::any;
  std::chrono::milliseconds hello_timeout{10'000};  ///< for all initial packets together
  /// Where the links were accepted: then a channel more than they are, which waits there for somebody to accept it, is
  /// too_many_channels; its pages would be missed. For sources that do not announce their number, as QEMU's: those of
  /// ours are compared anyway. Plain sockets only. Not owned, may be null.
  Listener* listener = nullptr;
  /// Ends that wait from outside, because until open() returns there is nobody to cancel(). Not owned, may be null.
  const Interrupt* interrupt = nullptr;
  /// How long channels wait at a barrier for others while no header and no payload arrives anywhere.
  std::chrono::milliseconds barrier_timeout{60'000};
  /// How long finish() waits while no header and no payload arrives anywhere. Long, because a source may well be silent
  /// while its operator holds it before the switchover; a host that is gone is noticed sooner (SocketOptions).
  std::chrono::milliseconds progress_timeout{300'000};
  /// Takes pages in place of the map's memory, which is not touched then; for relays.
  PacketHook on_packet{};
  DeviceStateHook on_device_state{};
  ThreadHook thread_hook{};  ///< runs in each worker before its first byte
  ErrorHook on_error{};      ///< told of the first error, once, by the thread that met it
};

/// Receives pages of a RamMap over connected transports. Every sender generation since QEMU 4.1 is understood without
/// being told (format/versions.md section 15). The peer is not trusted: whatever it sends ends in an Error, and no byte
/// of memory outside the map's blocks changes.
///
/// The order of use: open(), then with Barrier::manual one sync() per epoch, then finish().
///
/// Threads: cancel() and stats() from any thread; sync(), finish() and end_epochs() from one at a time.
/// Errors: the first error stops all channels and is what every later call returns. Error::channel is the id from
///   the hello.
/// Lifetime: the destructor cancels if finish() has not been called, joins, and never waits for the peer.
template <Transport T, Compressor C>
class Receiver {
 public:
  using Options = ReceiverOptions<C>;
  static_assert((C::method & ~wire::flag_compression_mask) == 0, "Compressor::method must be compression bits");

  /// Starts one worker per link and waits for every channel's hello; the ids may come in any order.
  ///
  /// Params: `ram`: copied (the memory is not); all blocks writable, unless a PacketHook takes the pages; `links`:
  ///   exactly as many as the peer has channels.
  /// Errors: Errc::bad_channel_count, bad_block_size (no block), read_only_block, block_without_memory, bad_option (a
  ///   negative time limit); bad_magic, bad_version,
  ///   channel_count_mismatch, page_size_mismatch, wrong_compression, block_list_mismatch when a sender of ours announces
  ///   other settings than this side's; too_many_channels, see ReceiverOptions::listener; uuid_mismatch, channel_id_out_of_range, duplicate_channel_id, truncated_hello
  ///   from the hellos; timed_out, cancelled.
  static Result<Receiver> open(const RamMap& ram, std::vector<T> links, Options options = {}) {
    if (links.empty() || links.size() > wire::max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "Receiver::open", links.size());
    if (ram.blocks().empty()) return fail(Errc::bad_block_size, Stage::setup, "Receiver::open: no RAM block");
    for (const RamBlock& block : ram.blocks()) {
      if (options.on_packet) break;
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
      auto state = std::make_unique<State>(ram, std::move(options), static_cast<unsigned>(links.size()));
      if (auto started = state->start(std::move(links)); !started) return std::unexpected(started.error());
      return Receiver(std::move(state));
    });
  }

  /// Waits until every channel has read its SYNC, with all pages before it in memory, and lets the channels into the
  /// next epoch: what a VMM does when its main stream closes an epoch. Returns the number of the epoch that ended.
  ///
  /// Errors: Errc::not_supported with Barrier::automatic; unsynced_end when a channel ended instead (Error::channel);
  ///   timed_out when a channel's SYNC does not come and nothing moves; the first error.
  /// Wire: format/packets.md section 6.5.
  ///
  /// `while_held()` is called in between: every page of the epoch has arrived, and none of the next has been taken. A
  /// relay closes its own epoch there (format/roles.md section 11 step 7). It returns a Result<void>; its error is the
  /// migration's.
  template <class WhileHeld = SyncPoint::Nothing>
  Result<std::uint64_t> sync(WhileHeld&& while_held = {}) {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (s.shared.error.failed()) return std::unexpected(s.shared.error.get());
    if (s.finished) return fail(Errc::already_closed, Stage::sync);
    if (s.options.barrier == Barrier::automatic) return fail(Errc::not_supported, Stage::sync, "automatic barrier");
    if (auto alone = s.refuse_more_channels(); !alone) return std::unexpected(s.first_error(alone.error()));
    const auto epoch = s.shared.barrier->release_when_all(s.shared.progress, while_held);
    if (epoch) return epoch;
    return std::unexpected(s.first_error(epoch.error()));
  }

  /// Waits until every channel has ended in order, and joins the workers. After it all memory is final, and a sender of
  /// ours that waits for it in Sender::finish() is told so. On any error, a sender of ours is told why.
  ///
  /// An orderly end says that the last epoch is whole, not that it was the last one of the guest: a source that dies
  /// between two epochs looks the same on the wire. Whether it was the last, only a main stream can say.
  ///
  /// Errors: Errc::sync_mismatch when a channel still waits at a manual barrier; timed_out when nothing arrives for
  ///   ReceiverOptions::progress_timeout; the first error; already_closed.
  Result<void> finish() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    const auto finished = s.finish(as_timeout(s.options.progress_timeout), s.shared.progress,
                                   "no byte from any channel for progress_timeout");
    if (!finished && finished.error().code == Errc::timed_out) return std::unexpected(s.first_error(finished.error()));
    return finished;
  }

  /// finish() that waits no longer than `limit`, whatever arrives meanwhile; 0 looks once. Then the error is timed_out
  /// and nothing else changes: the channels go on, and either finish() may be called again. A negative limit: bad_option.
  Result<void> finish(std::chrono::milliseconds limit) noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (auto good = check_time_limit("Receiver::finish", limit, Stage::close); !good) return good;
    return s.finish(limit, [] { return std::uint64_t{0}; }, "a channel goes on behind finish()'s limit");
  }

  /// Says that the last epoch is over (Barrier::manual): from here on no packet changes memory, so that the pages can be
  /// made use of before the channels have ended.
  ///
  /// Errors: Errc::data_after_end when a page has come behind the last epoch, and from finish() when one comes later;
  ///   sync_mismatch likewise for a SYNC; not_supported with Barrier::automatic; the first error; already_closed.
  Result<void> end_epochs() noexcept {
    State& s = checked();
    [[maybe_unused]] const auto turn = s.caller.enter();
    if (s.shared.error.failed()) return std::unexpected(s.shared.error.get());
    if (s.finished) return fail(Errc::already_closed, Stage::close);
    if (s.options.barrier == Barrier::automatic) return fail(Errc::not_supported, Stage::sync, "automatic barrier");
    if (auto ended = s.shared.barrier->end(); !ended) return std::unexpected(s.first_error(ended.error()));
    s.shared.epochs_ended.store(true, std::memory_order_seq_cst);
    for (const auto& channel : s.channels)
      if (channel->has_data_past(s.shared.barrier->epochs()))
        return std::unexpected(s.first_error(
            {.code = Errc::data_after_end, .stage = Stage::sync, .op = "end_epochs", .channel = channel->stats().id}));
    return {};
  }

  /// Makes every call, blocked or to come, return Errc::cancelled (or the error that came before). The peer sees a
  /// broken stream.
  ///
  /// Threads: any; it must have begun before the destructor does. Bounded: it waits for no thread and no peer.
  void cancel() noexcept { checked().shared.error.raise({.code = Errc::cancelled, .op = "Receiver::cancel"}); }

  /// Threads: any. Allocates the snapshot.
  ReceiverStats stats() const {
    const State& s = checked();
    ReceiverStats stats;
    for (const auto& channel : s.channels) {
      stats.channels.push_back(channel->stats());
      stats.zeros_written += channel->zeros_written();
      stats.pages_verified += channel->pages_verified();
    }
    std::ranges::sort(stats.channels, {}, &ChannelStats::id);
    stats.epochs = s.shared.barrier->epochs();
    return stats;
  }

  /// How many channels have ended in order. For who knows from a main stream that more must come: a source that gives up
  /// may leave nothing else to be seen. Threads: any.
  unsigned ended_channels() const noexcept { return checked().shared.barrier->ended(); }

  /// Which pages packets have announced so far, as bytes or as zero; after finish(): which have arrived. Not kept with a
  /// PacketHook. Threads: any.
  const ReceivedPages& received() const noexcept { return checked().shared.received; }

  /// Marks a page that arrived on the caller's main stream (a legacy zero record, format/main_stream.md section 9.6),
  /// and says whether bytes have come for it before. If not, memory that was fresh is zero there: looking at it to
  /// write a zero page would make it resident.
  ///
  /// Params: `as`: bytes: the caller is about to put them into memory.
  /// Errors: Errc::bad_range, offset_misaligned, offset_past_block: the numbers may be the peer's; not_supported with a
  ///   PacketHook.
  Result<bool> mark_received(BlockId block, std::uint64_t offset, Arrived as) noexcept {
    RecvShared& shared = checked().shared;
    if (shared.on_packet) return fail(Errc::not_supported, Stage::parse, "mark_received with a PacketHook");
    if (!shared.map.contains(block)) return fail(Errc::bad_range, Stage::parse, "block", index(block));
    if (auto page = shared.map.resolve(block, offset); !page) return std::unexpected(page.error());
    const bool had_bytes = shared.note_zero(block, offset);
    if (as == Arrived::bytes) shared.note_bytes(block, offset, 1);
    return had_bytes;
  }

  /// The uuid that the peer said.
  Uuid peer_uuid() const noexcept { return checked().peer_uuid(); }

  Receiver(Receiver&&) noexcept = default;
  Receiver& operator=(Receiver&&) noexcept = default;

 private:
  struct State {
    using Channel = RecvChannel<T, C>;

    State(const RamMap& ram, Options opts, unsigned channel_count)
        : options(std::move(opts)),
          shared(ram, options.destination, options.first_packet, options.on_packet, options.on_device_state,
                 channel_count, C::method, options.uuid, [this] { stop(); }) {
      shared.progress = [this] {
        std::uint64_t sum = 0;
        for (const auto& channel : channels) sum += channel->wire_bytes();
        return sum;
      };
    }

    ~State() {
      if (!threads.empty() && !finished) shared.error.raise({.code = Errc::cancelled, .op = destroyed});
      join();
      shared.error.wait_stopped();
    }

    Result<void> start(std::vector<T> links) {
      const auto count = static_cast<unsigned>(links.size());
      if (!options.on_packet) {
        for (ReceivedPages* const pages : {&shared.received, &shared.filled}) {
          auto bitmaps = ReceivedPages::create(shared.map);
          if (!bitmaps) return std::unexpected(bitmaps.error());
          *pages = std::move(*bitmaps);
        }
      }
      if (options.populate == Populate::ahead && !options.on_packet) {
        auto populate = PopulateAhead::create(shared.map);
        if (!populate) return std::unexpected(populate.error());
        shared.populate = std::move(*populate);
        auto thread = Thread::start(*shared.populate, options.thread_hook, {.role = "populate", .channel = 0});
        if (!thread) return std::unexpected(thread.error());
        populating = std::move(*thread);
      }
      auto barrier = SyncPoint::create(count, options.barrier, options.barrier_timeout);
      if (!barrier) return std::unexpected(barrier.error());
      shared.barrier = std::move(*barrier);
      for (T& link : links) {
        auto channel = Channel::create(shared, count, std::move(link), options.compressor);
        if (!channel) return std::unexpected(channel.error());
        channels.push_back(std::move(*channel));
      }
      threads.reserve(channels.size());
      for (std::uint32_t i = 0; i < channels.size(); ++i) {
        auto thread = Thread::start(*channels[i], options.thread_hook, {.role = "recv", .channel = i});
        if (!thread) return std::unexpected(first_error(thread.error()));
        threads.push_back(std::move(*thread));
      }
      if (auto complete = shared.hellos.wait(ProgressWatch::bounded(options.hello_timeout), options.interrupt);
          !complete)
        return std::unexpected(first_error(complete.error()));
      if (auto alone = refuse_more_channels(); !alone) return std::unexpected(first_error(alone.error()));
      return {};
    }

    template <class Progress>
    Result<void> finish(std::chrono::milliseconds limit, const Progress& progress, const char* late) noexcept {
      if (shared.error.failed()) return std::unexpected(shared.error.get());
      if (finished) return fail(Errc::already_closed, Stage::close);
      if (auto ended = shared.barrier->end(); !ended) return std::unexpected(first_error(ended.error()));
      const auto ended = shared.barrier->wait_for_ends(limit, progress, late);
      // First: a channel that nobody reads may be why the others stand still.
      if (auto alone = refuse_more_channels(); !alone) return std::unexpected(first_error(alone.error()));
      if (!ended) return ended;
      join();
      if (shared.error.failed()) return std::unexpected(shared.error.get());
      finished = true;
      confirm();
      return {};
    }

    /// Errors: Errc::too_many_channels (detail: the id of one).
    Result<void> refuse_more_channels() noexcept {
      if (options.listener == nullptr || shared.hellos.announced()) return {};
      std::uint64_t id = 0;
      const auto is_one_more = [&](std::span<const std::byte> first) {
        const auto found = wire::id_of_channel_too_many(first, static_cast<unsigned>(channels.size()), peer_uuid());
        id = found.value_or(0);
        return found.has_value();
      };
      const auto more = catch_bad_alloc(Stage::accept, "look for more channels",
                                        [&] { return options.listener->any_waiting(is_one_more); });
      if (!more) return std::unexpected(more.error());
      return *more ? fail(Errc::too_many_channels, Stage::accept, "accept", id, channels.size()) : Result<void>{};
    }

    Uuid peer_uuid() const noexcept { return shared.hellos.uuid(); }

    /// Makes `error` the first error unless another came before; returns the one that counts.
    Error first_error(const Error& error) noexcept {
      shared.error.raise(error);
      return shared.error.get();
    }

    /// Called once, by the thread of the first error. `channels` is complete before any thread starts.
    void stop() noexcept {
      const Error error = shared.error.get();
      shared.barrier->stop();
      shared.hellos.stop();
      // The peer's own answer is on every channel before the first is broken: whichever breaks first there has it.
      if (shared.peer_takes_answer.load(std::memory_order_relaxed)) {
        const wire::AnswerBytes answer = wire::encode_answer(error);
        for (const auto& channel : channels) channel->give_reason(answer);
      }
      for (const auto& channel : channels) channel->shutdown();
      // A destructor reports nothing: what the hook would speak to may be gone.
      if (options.on_error && error.op != destroyed) options.on_error(error);
    }

    /// Tells a sender of ours that everything has arrived. Whether that reaches it nobody here can know, so whether it
    /// can be written is no reason to fail: the memory is whole.
    void confirm() noexcept {
      if (!shared.peer_takes_answer.load(std::memory_order_relaxed)) return;
      for (const auto& channel : channels)
        if (channel->id() == 0) channel->confirm();
    }

    void join() noexcept {
      for (Thread& thread : threads) thread.join();
      if (shared.populate) shared.populate->stop();
      populating.join();
    }

    static constexpr const char* destroyed = "Receiver destroyed";

    const Options options;
    RecvShared shared;
    std::vector<std::unique_ptr<Channel>> channels;
    std::vector<Thread> threads;
    Thread populating;
    bool finished = false;
    [[no_unique_address]] OneCallerOfBuild caller{
        "two threads are in a Receiver's sync(), finish() or end_epochs() at once"};
  };

  explicit Receiver(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  State& checked() const noexcept {
    if (MULTIFD_CHECKED != 0 && !state_) MULTIFD_MISUSE("a Receiver is used that was moved from", {}, 0);
    return *state_;
  }

  std::unique_ptr<State> state_;
};

}  // namespace multifd
