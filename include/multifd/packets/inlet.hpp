// SPDX-License-Identifier: MIT
//
// Reads one channel's packets in the multifd format, checks them, and passes their pages to a PageSink.
//
//   hello, { header + payload, ... , SYNC }, { ... , SYNC }, end of stream
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/compress/policy.hpp"
#include "multifd/ends/page_sink.hpp"
#include "multifd/engine/counters.hpp"
#include "multifd/format/device_state.hpp"
#include "multifd/format/init_packet.hpp"
#include "multifd/format/packet.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/memory/page_runs.hpp"
#include "multifd/packets/answers.hpp"
#include "multifd/packets/distinct_pages.hpp"
#include "multifd/packets/inlet_shared.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/packets/returning_link.hpp"
#include "multifd/thread.hpp"
#include "multifd/transport/algorithms.hpp"

namespace multifd::packets {

/// Threads: run() is the body of the channel's thread; give_reason(), shutdown(), id() and has_data_past() from any,
///   confirm() after run(). Of give_reason() and confirm(), which write, only the first that comes does.
template <Transport T, Compressor C, PageSink Into>
class Inlet {
  using Channel = typename Into::Sink::Channel;

 public:
  /// Allocates everything that receiving will need: a header, one payload buffer of fixed bound, one decoder.
  ///
  /// Params: `link_index`: which of the receiver's links this is; the channel's id comes with the hello. `rejoins`: null: a
  ///   lost connection is an error; else it outlives this object.
  [[nodiscard]] static Result<std::unique_ptr<Inlet>> create(InletShared& shared, unsigned link_index, T link,
                                                             const C& compressor, typename Into::Sink& sink,
                                                             Rejoins<T>* rejoins = nullptr) {
    const std::size_t page_bytes = shared.map.page_bytes();
    const std::size_t pages = shared.map.batch_pages();
    auto decoder = C::Decoder::open(compressor, {.page_bytes = page_bytes});
    if (!decoder) return std::unexpected(decoder.error());
    auto runs = PageRuns::create(pages);
    if (!runs) return std::unexpected(runs.error());
    auto distinct = DistinctPages::create(pages);
    if (!distinct) return std::unexpected(distinct.error());
    auto digest = PageDigest::create();
    if (!digest) return std::unexpected(digest.error());
    auto channel = Channel::create(sink);
    if (!channel) return std::unexpected(channel.error());
    std::unique_ptr<Inlet> inlet(new (std::nothrow) Inlet(shared, link_index, std::move(link), std::move(*decoder),
                                                          std::move(*runs), std::move(*distinct), std::move(*digest),
                                                          std::move(*channel), compressor, rejoins));
    if (!inlet) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    inlet->header_.reset(new (std::nothrow) std::byte[wire::header_bytes(page_bytes)]);
    inlet->offsets_.reset(new (std::nothrow) std::uint64_t[pages]);
    inlet->in_.reset(new (std::nothrow) iovec[pages + 1]);
    if (C::payload_form == PayloadForm::encoded)
      inlet->payload_.reset(new (std::nothrow) std::byte[wire::max_payload_bytes]);
    if (!inlet->header_ || !inlet->offsets_ || !inlet->in_ ||
        (C::payload_form == PayloadForm::encoded && !inlet->payload_))
      return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    return inlet;
  }

  /// Ends at the stream's end, or at the first error of any channel.
  void run() noexcept {
    Result<void> ended = read_hello();
    if (ended) ended = work();
    while (!ended && link_.is_lost(ended.error()) && id() != no_channel && !shared_.error.failed()) {
      const auto found = link_.find(id(), ended.error(), *shared_.barrier, shared_.epochs_ended);
      ended = !found ? std::unexpected(found.error()) : *found ? go_on() : shared_.barrier->channel_ended(id());
      if (!found) break;
    }
    counters_.cpu_ns.set(thread_cpu_ns());
    if (ended) return;
    Error error = ended.error();
    if (error.channel == no_channel) error.channel = id();
    if (error.packet == no_packet && error.channel == id() && id() != no_channel)
      error.packet = counters_.packets.get();
    shared_.error.raise(error);
  }

  /// Writes the channel's last bytes, for a peer that reads them: why this side gives up. Threads: any, also during
  /// run().
  void give_reason(const wire::AnswerBytes& answer) noexcept {
    if (answered_.exchange(true, std::memory_order_relaxed)) return;
    link_.with([&](T& link) { give_answer(link, answer); });
  }

  /// Writes that everything has arrived, and ends the stream in order. False, and nothing is written, when
  /// give_reason() has come before, or the peer takes no answer. Threads: any, after run().
  [[nodiscard]] bool confirm() noexcept {
    if (answered_.exchange(true, std::memory_order_relaxed)) return false;
    give_answer(*link_, wire::encode_answer());
    (void)(*link_).finish();
    return true;
  }

  void shutdown() noexcept { link_.shutdown(); }
  /// Breaks the connection where it is older than one of this generation, which has come. Threads: any.
  void drop_older(std::uint32_t generation) noexcept { link_.drop_older(generation); }
  std::uint32_t id() const noexcept { return id_.load(std::memory_order_relaxed); }
  ChannelStats stats() const noexcept { return counters_.snapshot(id()); }
  std::uint64_t pages_verified() const noexcept { return pages_verified_.get(); }
  /// Whether a page has come after the channel's first `epochs` SYNCs.
  bool has_data_past(std::uint64_t epochs) const noexcept {
    return data_epoch_.load(std::memory_order_seq_cst) > epochs;
  }

 private:
  Inlet(InletShared& shared, unsigned link_index, T link, typename C::Decoder decoder, PageRuns runs,
        DistinctPages distinct, PageDigest digest, Channel channel, const C& compressor, Rejoins<T>* rejoins) noexcept
      : shared_(shared),
        counters_(shared.counters[link_index]),
        link_(std::move(link), rejoins),
        decoder_(std::move(decoder)),
        runs_(std::move(runs)),
        distinct_(std::move(distinct)),
        digest_(std::move(digest)),
        channel_(std::move(channel)),
        compressor_(compressor) {}

  /// Reads another connection.
  [[nodiscard]] Result<void> go_on() noexcept {
    const auto epoch = link_.join(id(), *shared_.barrier);
    if (!epoch) return std::unexpected(epoch.error());
    auto decoder = C::Decoder::open(compressor_, {.page_bytes = shared_.map.page_bytes()});  // its stream begins anew
    if (!decoder) return std::unexpected(decoder.error());
    decoder_ = std::move(*decoder);
    ahead_ = 0;
    epoch_ = *epoch;
    return work();
  }

  [[nodiscard]] Result<void> work() noexcept {
    clock_ = {};
    for (;;) {
      const Result<bool> more = read_header();
      clock_.lap(counters_.io_ns);
      if (!more) return std::unexpected(more.error());
      if (!*more) return leave();
      if (wire::is_device_state(header_.get()) && shared_.on_device_state.take) {
        if (auto taken = take_device_state(); !taken) return taken;
        continue;
      }
      const auto header = wire::parse_header({header_.get(), header_bytes()},
                                             {.page_bytes = shared_.map.page_bytes(), .method = C::method});
      if (!header) return std::unexpected(header.error());
      ahead_ = 0;
      if (header->has_pages()) {
        if (auto applied = apply(*header); !applied) return applied;
      }
      if (header->is_sync()) {
        if (auto passed = synchronise(); !passed) return passed;
      }
    }
  }

  /// Reads into the first `parts` entries of in_, at least `wanted` bytes unless the stream ends; counts them as they come.
  [[nodiscard]] Result<std::size_t> read(std::size_t parts, std::size_t wanted, std::size_t soon = 0) noexcept {
    const auto moved = [this](std::size_t bytes) noexcept { counters_.wire_bytes.add(bytes); };
    return read_at_least(*link_, std::span(in_.get(), parts), wanted, moved, soon);
  }

  [[nodiscard]] Result<void> read_hello() noexcept {
    wire::InitPacketBytes bytes{};
    constexpr std::size_t magic_bytes = 4;  // enough to refuse a stranger, which may never send a whole hello
    for (std::size_t got = 0; got < bytes.size();) {
      const std::size_t wanted = got < magic_bytes ? magic_bytes - got : bytes.size() - got;
      in_[0] = mutable_buffer(std::span(bytes).subspan(got));
      const auto arrived = read(1, wanted);
      if (!arrived) {
        Error error = arrived.error();
        error.stage = Stage::hello;
        return std::unexpected(error);
      }
      got += *arrived;
      if (*arrived < wanted) return fail(Errc::truncated_hello, Stage::hello, "initial packet", got);
      if (wire::load_be<std::uint32_t>(bytes.data()) != wire::magic) break;  // parse_init_packet() makes the error
    }
    // Before the hello is checked, so that a peer that is refused gets an answer, too, if its hello asks for one.
    const auto announced = wire::load_announcement(bytes);
    (announced && announced->takes_answer ? shared_.peer_takes_answer : answered_)
        .store(true, std::memory_order_relaxed);
    const auto hello = wire::parse_init_packet(bytes, shared_.channels);
    if (!hello) return std::unexpected(hello.error());
    if (auto admitted = shared_.hellos.admit(*hello); !admitted) return admitted;
    id_.store(hello->id, std::memory_order_relaxed);  // for stats(); the worker itself is the only other reader
    return {};
  }

  /// Fills header_, of which `ahead_` bytes may have come with the packet before. False: the stream ended in order.
  [[nodiscard]] Result<bool> read_header() noexcept {
    // Some packets are shorter than a RAM header, and their first bytes say so: do not wait for bytes that never come.
    const std::size_t size = header_bytes();
    while (ahead_ < size && !(ahead_ >= wire::prefix_bytes && is_foreign())) {  // the caller parses what came
      const std::size_t next = ahead_ < wire::prefix_bytes         ? wire::prefix_bytes
                               : ahead_ < wire::sized_prefix_bytes ? wire::sized_prefix_bytes
                                                                   : size;
      const std::size_t wanted = next - ahead_;
      in_[0] = {header_.get() + ahead_, size - ahead_};
      const auto arrived = read(1, wanted);
      if (!arrived) return std::unexpected(arrived.error());
      ahead_ += *arrived;
      if (ahead_ == 0) return false;
      if (*arrived < wanted) return fail(Errc::truncated_header, Stage::read, "packet header", ahead_);
    }
    return true;
  }

  /// Whether header_ begins with anything but a RAM header of this side's page size.
  bool is_foreign() const noexcept {
    if (!wire::has_magic(header_.get()) || wire::is_device_state(header_.get())) return true;
    return ahead_ >= wire::sized_prefix_bytes && wire::other_page_bytes(header_.get(), shared_.map.page_bytes()) != 0;
  }

  /// Reads the rest of a device-state packet and calls the hook. `ahead_` bytes, of it and behind it, are in header_ already.
  [[nodiscard]] Result<void> take_device_state() noexcept {
    constexpr std::size_t size = wire::device_state_header_bytes;
    if (ahead_ < size) {
      const std::size_t wanted = size - ahead_;
      in_[0] = {header_.get() + ahead_, header_bytes() - ahead_};
      const auto arrived = read(1, wanted);
      if (!arrived) return std::unexpected(arrived.error());
      ahead_ += *arrived;
      if (*arrived < wanted) return fail(Errc::truncated_header, Stage::read, "device-state header", ahead_);
    }
    const auto header = wire::parse_device_state_header(std::span<const std::byte, size>(header_.get(), size),
                                                        shared_.on_device_state.limit_bytes);
    if (!header) return std::unexpected(header.error());
    // The buffer grows to the largest packet so far: such packets are few, and most migrations have none.
    if (header->payload_bytes > device_state_room_) {
      device_state_.reset();  // first, because both buffers together could take twice the limit
      device_state_room_ = 0;
      device_state_.reset(new (std::nothrow) std::byte[header->payload_bytes]);
      if (!device_state_) return fail_errno(Stage::read, "allocate device state", ENOMEM);
      device_state_room_ = header->payload_bytes;
    }
    const std::span<std::byte> bytes(device_state_.get(), header->payload_bytes);
    const std::size_t here = std::min(bytes.size(), ahead_ - size);
    std::memcpy(bytes.data(), header_.get() + size, here);
    if (here < bytes.size()) {
      in_[0] = mutable_buffer(bytes.subspan(here));
      const auto arrived = read(1, bytes.size() - here);
      if (!arrived) return std::unexpected(arrived.error());
      if (const std::size_t got = here + *arrived; got < bytes.size())
        return fail(Errc::truncated_payload, Stage::read, "device state", got);
    }
    if (auto taken = shared_.on_device_state.take({header->idstr, header->instance_id, bytes}); !taken) return taken;
    // Bytes that came behind this packet begin the next one.
    ahead_ -= size + here;
    std::memmove(header_.get(), header_.get() + size + here, ahead_);
    counters_.packets.add(1);
    return {};
  }

  [[nodiscard]] Result<void> apply(const wire::PacketHeader& header) noexcept {
    if (shared_.first_packet == FirstPacket::sync && epoch_ == 0)
      return fail(Errc::data_before_sync, Stage::parse, "data packet");
    // seq_cst, in one order with end_epochs(): either this channel sees the end, or that sees this channel's page.
    data_epoch_.store(epoch_ + 1, std::memory_order_seq_cst);
    if (ended()) return fail(Errc::data_after_end, Stage::parse, "data packet");
    const Result<BlockId> block = find(header.idstr);
    if (!block) return std::unexpected(block.error());
    auto applied = apply_to(*block, header);
    if (!applied && (applied.error().stage == Stage::parse || applied.error().stage == Stage::decode))
      applied.error().subject = shared_.map.block(*block).idstr;
    return applied;
  }

  [[nodiscard]] Result<void> apply_to(BlockId block, const wire::PacketHeader& header) noexcept {
    // All offsets are decoded now, because the next header may overwrite header_ before the sink has used them.
    const std::size_t count = header.normal_pages + header.zero_pages;
    distinct_.clear();
    for (std::size_t i = 0; i < count; ++i) {
      offsets_[i] = wire::load_offset(header_.get(), i);
      distinct_.add(offsets_[i]);
    }
    ArrivingPages pages{.block = block,
                        .offsets = std::span(offsets_.get(), count),
                        .normal_pages = header.normal_pages,
                        .channel = id()};
    // Every offset is checked before the first byte of memory changes.
    runs_.clear();
    if (auto placed = channel_.place(pages, runs_); !placed) return placed;
    if (auto distinct = distinct_.check(shared_.map.block(block).bytes); !distinct) return distinct;
    pages.runs = runs_.view();
    channel_.begin(pages);
    clock_.lap(counters_.check_ns);
    // `header` keeps the numbers; its idstr, which lies in header_, is not used again.
    if (header.normal_pages > 0) {
      if (auto read = read_pages(header); !read) return read;
    }
    if (auto arrived = channel_.arrived(pages); !arrived) return arrived;
    clock_.lap(Into::writes_memory ? counters_.check_ns : counters_.idle_ns);
    counters_.packets.add(1);
    counters_.normal_pages.add(header.normal_pages);
    counters_.zero_pages.add(header.zero_pages);
    counters_.payload_bytes.add(wire::payload_bytes(header));
    return {};
  }

  [[nodiscard]] Result<void> read_pages(const wire::PacketHeader& header) noexcept {
    const std::size_t payload_bytes = wire::payload_bytes(header);
    const ConstBuffers pages = runs_.view();
    std::size_t parts = 0;
    if constexpr (C::payload_form == PayloadForm::pages) {
      for (const iovec& run : pages) in_[parts++] = run;
    } else {
      in_[parts++] = {payload_.get(), payload_bytes};
    }
    // This read takes the next header along, and waits for it: one system call per packet instead of two. Behind pages
    // there comes another packet or the SYNC. Device state may be shorter than a header, and is not to be waited for.
    in_[parts++] = {header_.get(), header_bytes()};
    const auto arrived = read(parts, payload_bytes, shared_.on_device_state.take ? 0 : header_bytes());
    clock_.lap(counters_.io_ns);
    if (!arrived) return std::unexpected(arrived.error());
    if (*arrived < payload_bytes) return fail(Errc::truncated_payload, Stage::read, "payload", *arrived);
    ahead_ = *arrived - payload_bytes;

    if constexpr (C::payload_form == PayloadForm::encoded) {
      if (auto decoded = decoder_.decode({payload_.get(), payload_bytes}, pages); !decoded) return decoded;
    }
    if (header.has_digest) {
      if (const std::uint64_t got = digest_.of(pages); got != header.digest)
        return fail(Errc::digest_mismatch, Stage::decode, "XXH3-64", got);
      pages_verified_.add(header.normal_pages);
    }
    clock_.lap(counters_.codec_ns);
    return {};
  }

  [[nodiscard]] Result<void> synchronise() noexcept {
    counters_.syncs.add(1);
    counters_.cpu_ns.set(thread_cpu_ns());
    auto passed = shared_.barrier->arrive(id(), [this] { return shared_.moved(); });
    ++epoch_;
    clock_.lap(counters_.idle_ns);
    return passed;
  }

  [[nodiscard]] Result<void> leave() noexcept {
    // Where connections return an end ahead of the last epoch is a lost one.
    if ((link_.returns() && !ended()) || has_data_past(epoch_))
      return fail(Errc::unsynced_end, Stage::read, "end of stream");
    return shared_.barrier->channel_ended(id());
  }

  /// A block by its name, which is nearly always that of the packet before.
  [[nodiscard]] Result<BlockId> find(std::string_view idstr) noexcept {
    if (last_block_ && shared_.map.block(*last_block_).idstr == idstr) return *last_block_;
    const Result<BlockId> block = shared_.map.find(idstr);
    if (block) last_block_ = *block;
    return block;
  }

  bool ended() const noexcept { return shared_.epochs_ended.load(std::memory_order_seq_cst); }
  std::size_t header_bytes() const noexcept { return wire::header_bytes(shared_.map.page_bytes()); }

  InletShared& shared_;
  engine::ChannelCounters& counters_;
  ReturningLink<T> link_;
  typename C::Decoder decoder_;
  PageRuns runs_;
  DistinctPages distinct_;
  PageDigest digest_;
  Channel channel_;
  const C compressor_;       ///< for the next decoder
  std::uint64_t epoch_ = 0;  ///< that the next packet belongs to
  std::unique_ptr<std::byte[]> header_;
  std::unique_ptr<std::uint64_t[]> offsets_;  ///< of the current packet
  std::unique_ptr<std::byte[]> payload_;
  std::unique_ptr<iovec[]> in_;
  std::unique_ptr<std::byte[]> device_state_;
  std::size_t device_state_room_ = 0;
  std::size_t ahead_ = 0;  ///< bytes of the next header that are in header_ already
  std::optional<BlockId> last_block_;
  std::atomic<std::uint64_t> data_epoch_ = 0;  ///< the epoch of the last packet with pages, counted from 1
  std::atomic<std::uint32_t> id_{no_channel};  ///< known after the hello
  std::atomic<bool> answered_{false};          ///< somebody writes the answer, or has, or the peer asks for none
  engine::StageClock clock_;
  engine::Counter pages_verified_;
};

}  // namespace multifd::packets
