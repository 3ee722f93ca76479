// SPDX-License-Identifier: MIT
//
// One receiving channel: its worker reads packets, checks everything a peer could get wrong, puts pages into guest
// memory, and stops at each SYNC until the barrier opens.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "multifd/channel/answers.hpp"
#include "multifd/channel/counters.hpp"
#include "multifd/channel/distinct_pages.hpp"
#include "multifd/channel/page_runs.hpp"
#include "multifd/channel/recv_shared.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/thread.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/wire/packet.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd {

/// Threads: run() is the worker's body; shutdown() and stats() from any thread.
template <Transport T, Compressor C>
class RecvChannel {
 public:
  /// Allocates everything that receiving will need: a header, one payload buffer of fixed bound, one decoder.
  static Result<std::unique_ptr<RecvChannel>> create(RecvShared& shared, unsigned channels, T link,
                                                     const C& compressor) {
    const std::size_t page_bytes = shared.map.page_bytes();
    const std::size_t pages = shared.map.packet_pages();
    auto decoder = C::Decoder::open(compressor, {.page_bytes = page_bytes});
    if (!decoder) return std::unexpected(decoder.error());
    auto runs = PageRuns::create(pages);
    if (!runs) return std::unexpected(runs.error());
    auto distinct = DistinctPages::create(pages);
    if (!distinct) return std::unexpected(distinct.error());
    auto digest = PageDigest::create();
    if (!digest) return std::unexpected(digest.error());
    std::unique_ptr<RecvChannel> channel(new (std::nothrow)
                                             RecvChannel(shared, channels, std::move(link), std::move(*decoder),
                                                         std::move(*runs), std::move(*distinct), std::move(*digest)));
    if (!channel) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    channel->header_.reset(new (std::nothrow) std::byte[wire::header_bytes(page_bytes)]);
    channel->in_.reset(new (std::nothrow) iovec[pages + 1]);
    if (C::payload_form == PayloadForm::encoded)
      channel->payload_.reset(new (std::nothrow) std::byte[wire::max_payload_bytes]);
    if (!channel->header_ || !channel->in_ || (C::payload_form == PayloadForm::encoded && !channel->payload_))
      return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    if (shared.on_packet) {
      auto buffer = PageBuffer::create();
      if (!buffer) return std::unexpected(buffer.error());
      channel->pages_ = std::move(*buffer);
      channel->offsets_.reset(new (std::nothrow) std::uint64_t[pages]);
      if (!channel->offsets_) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    }
    return channel;
  }

  /// The worker's body: ends at the stream's end, or at the first error of any channel.
  void run() noexcept {
    Result<void> ended = work();
    counters_.cpu_ns.set(thread_cpu_ns());
    if (ended) return;
    Error error = ended.error();
    if (error.channel == no_channel) error.channel = id();
    if (error.packet == no_packet && error.channel == id() && id() != no_channel)
      error.packet = counters_.packets.get();
    shared_.error.raise(error);
  }

  /// The last bytes, to a peer that takes them: why this side gives up. Threads: any, beside run().
  void give_reason(const wire::AnswerBytes& answer) noexcept {
    if (!answered_.exchange(true, std::memory_order_relaxed)) give_answer(link_, answer);
  }

  /// The same when everything has arrived, and an end in order behind it. Threads: any, after run().
  void confirm() noexcept {
    give_reason(wire::encode_answer());
    (void)link_.finish();
  }

  void shutdown() noexcept { link_.shutdown(); }
  std::uint32_t id() const noexcept { return id_.load(std::memory_order_relaxed); }
  ChannelStats stats() const noexcept { return counters_.snapshot(id()); }
  std::uint64_t wire_bytes() const noexcept { return counters_.wire_bytes.get(); }
  std::uint64_t zeros_written() const noexcept { return zeros_written_.get(); }
  std::uint64_t pages_verified() const noexcept { return pages_verified_.get(); }
  /// Whether a page has come behind the `epochs`th SYNC.
  bool has_data_past(std::uint64_t epochs) const noexcept {
    return data_epoch_.load(std::memory_order_seq_cst) > epochs;
  }

 private:
  RecvChannel(RecvShared& shared, unsigned channels, T link, typename C::Decoder decoder, PageRuns runs,
              DistinctPages distinct, PageDigest digest) noexcept
      : shared_(shared),
        channels_(channels),
        link_(std::move(link)),
        decoder_(std::move(decoder)),
        runs_(std::move(runs)),
        distinct_(std::move(distinct)),
        digest_(std::move(digest)) {}

  Result<void> work() noexcept {
    if (auto hello = read_hello(); !hello) return hello;
    clock_ = {};
    for (;;) {
      const Result<bool> more = read_header();
      clock_.lap(counters_.io_ns);
      if (!more) return std::unexpected(more.error());
      if (!*more) return leave();
      if (is_device_state() && shared_.on_device_state.take) {
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

  Result<void> read_hello() noexcept {
    wire::InitPacketBytes bytes{};
    constexpr std::size_t magic_bytes = 4;  // they tell a stranger, who may never send a whole hello
    for (std::size_t got = 0; got < bytes.size();) {
      const std::size_t wanted = got < magic_bytes ? magic_bytes - got : bytes.size() - got;
      in_[0] = mutable_buffer(std::span(bytes).subspan(got));
      const auto arrived = read_at_least(link_, std::span(in_.get(), 1), wanted);
      if (!arrived) {
        Error error = arrived.error();
        error.stage = Stage::hello;
        return std::unexpected(error);
      }
      got += *arrived;
      if (*arrived < wanted) return fail(Errc::truncated_hello, Stage::hello, "initial packet", got);
      if (wire::load_be<std::uint32_t>(bytes.data()) != wire::magic) break;  // parse_init_packet() names it
    }
    // Also of a hello that is about to be refused. Whose hello has not asked gets no answer.
    const auto announced = wire::load_announcement(bytes);
    (announced && announced->takes_answer ? shared_.peer_takes_answer : answered_)
        .store(true, std::memory_order_relaxed);
    const auto hello = wire::parse_init_packet(bytes, channels_);
    if (!hello) return std::unexpected(hello.error());
    if (auto admitted = shared_.hellos.admit(*hello); !admitted) return admitted;
    id_.store(hello->id, std::memory_order_relaxed);  // for stats(); the worker itself is the only other reader
    counters_.wire_bytes.add(bytes.size());
    return {};
  }

  /// Fills header_, of which `ahead_` bytes may have come with the packet before; false at an orderly end.
  Result<bool> read_header() noexcept {
    // The first bytes tell what is shorter: do not wait for more of it than it has.
    const std::size_t size = header_bytes();
    while (ahead_ < size && !(ahead_ >= prefix_bytes && is_foreign())) {  // the caller looks what it is
      const std::size_t next = ahead_ < prefix_bytes ? prefix_bytes : ahead_ < slots_known ? slots_known : size;
      const std::size_t wanted = next - ahead_;
      in_[0] = {header_.get() + ahead_, size - ahead_};
      const auto arrived = read_at_least(link_, std::span(in_.get(), 1), wanted);
      if (!arrived) return std::unexpected(arrived.error());
      ahead_ += *arrived;
      counters_.wire_bytes.add(*arrived);
      if (ahead_ == 0) return false;
      if (*arrived < wanted) return fail(Errc::truncated_header, Stage::read, "packet header", ahead_);
    }
    return true;
  }

  /// Whether the first bytes of header_ open something that has another length than this side's RAM headers.
  bool is_foreign() const noexcept {
    if (!has_magic() || is_device_state()) return true;
    return ahead_ >= slots_known && wire::other_page_bytes(header_.get(), shared_.map.page_bytes()) != 0;
  }
  bool has_magic() const noexcept { return wire::load_be<std::uint32_t>(header_.get()) == wire::magic; }
  bool is_device_state() const noexcept {
    return has_magic() && (wire::load_be<std::uint32_t>(header_.get() + 8) & wire::flag_device_state) != 0;
  }

  /// A device-state packet of which `ahead_` bytes, perhaps more than the whole, are in header_.
  Result<void> take_device_state() noexcept {
    constexpr std::size_t size = wire::device_state_header_bytes;
    if (ahead_ < size) {
      const std::size_t wanted = size - ahead_;
      in_[0] = {header_.get() + ahead_, header_bytes() - ahead_};
      const auto arrived = read_at_least(link_, std::span(in_.get(), 1), wanted);
      if (!arrived) return std::unexpected(arrived.error());
      ahead_ += *arrived;
      counters_.wire_bytes.add(*arrived);
      if (*arrived < wanted) return fail(Errc::truncated_header, Stage::read, "device-state header", ahead_);
    }
    const auto header = wire::parse_device_state_header(std::span<const std::byte, size>(header_.get(), size),
                                                        shared_.on_device_state.limit_bytes);
    if (!header) return std::unexpected(header.error());
    // Grows to the largest packet seen: devices are few, and most migrations have no such packet at all.
    if (header->payload_bytes > device_state_room_) {
      device_state_.reset();  // before the new one: together they could be twice the limit
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
      const auto arrived = read_at_least(link_, std::span(in_.get(), 1), bytes.size() - here);
      if (!arrived) return std::unexpected(arrived.error());
      counters_.wire_bytes.add(*arrived);
      if (const std::size_t got = here + *arrived; got < bytes.size())
        return fail(Errc::truncated_payload, Stage::read, "device state", got);
    }
    if (auto taken = shared_.on_device_state.take({header->idstr, header->instance_id, bytes}); !taken) return taken;
    // What came behind it opens the next packet.
    ahead_ -= size + here;
    std::memmove(header_.get(), header_.get() + size + here, ahead_);
    counters_.packets.add(1);
    return {};
  }

  Result<void> apply(const wire::PacketHeader& header) noexcept {
    if (shared_.first_packet == FirstPacket::sync && counters_.syncs.get() == 0)
      return fail(Errc::data_before_sync, Stage::parse, "data packet");
    // One order for both sides: either this sees the end of the epochs, or who ends them sees this.
    data_epoch_.store(counters_.syncs.get() + 1, std::memory_order_seq_cst);
    if (shared_.epochs_ended.load(std::memory_order_seq_cst))
      return fail(Errc::data_after_end, Stage::parse, "data packet");
    const Result<BlockId> block = find(header.idstr);
    if (!block) return std::unexpected(block.error());
    auto applied = apply_to(*block, header);
    if (!applied && (applied.error().stage == Stage::parse || applied.error().stage == Stage::decode))
      applied.error().subject = shared_.map.block(*block).idstr;
    return applied;
  }

  Result<void> apply_to(BlockId block, const wire::PacketHeader& header) noexcept {
    if (auto gathered = gather(header, block); !gathered) return gathered;

    if (!shared_.on_packet) {
      // Zero pages first, as QEMU does (format/packets.md section 5.2); the two lists are disjoint, gather() saw to it.
      for (std::size_t i = 0; i < header.zero_pages; ++i) apply_zero(block, offset(header.normal_pages + i));
      clock_.lap(counters_.check_ns);
      const std::byte* const host = shared_.map.block(block).host.data();
      for (const iovec& run : runs_.view())
        shared_.note_bytes(block, static_cast<std::uint64_t>(static_cast<std::byte*>(run.iov_base) - host),
                           run.iov_len / shared_.map.page_bytes());
      if (shared_.populate && header.normal_pages > 0)
        shared_.populate->note(block, offset(header.normal_pages - 1), header.normal_pages);
    }
    // From here header_ may be overwritten by the next packet's: `header` keeps the numbers, idstr is not used again.
    if (header.normal_pages > 0) {
      if (auto read = read_pages(header); !read) return read;
    }
    if (shared_.on_packet) {
      ReceivedPacket packet{.channel = id(),
                            .block = block,
                            .offsets = std::span(offsets_.get(), header.normal_pages + header.zero_pages),
                            .normal_pages = header.normal_pages,
                            .pages = pages_};
      if (auto taken = shared_.on_packet(packet); !taken) return taken;
      clock_.lap(counters_.idle_ns);
    }
    counters_.packets.add(1);
    counters_.normal_pages.add(header.normal_pages);
    counters_.zero_pages.add(header.zero_pages);
    counters_.payload_bytes.add(wire::payload_bytes(header));
    return {};
  }

  /// Checks every offset before the first byte of memory changes, and gathers the normal pages into runs.
  Result<void> gather(const wire::PacketHeader& header, BlockId block) noexcept {
    runs_.clear();
    distinct_.clear();
    const std::size_t page_bytes = shared_.map.page_bytes();
    const std::size_t pages = header.normal_pages + header.zero_pages;
    for (std::size_t i = 0; i < pages; ++i) distinct_.add(offset(i));
    if (shared_.on_packet) {
      for (std::size_t i = 0; i < pages; ++i) {
        if (auto checked = shared_.map.check(block, offset(i)); !checked) return checked;
        offsets_[i] = offset(i);  // header_ may hold the next packet's when the hook runs
      }
      if (header.normal_pages > 0) runs_.add(pages_.data(), header.normal_pages * page_bytes);
      return distinct_.check(shared_.map.block(block).bytes);
    }
    for (std::size_t first = 0; first < pages;) {  // neighbours, which most pages are, at once
      std::size_t end = first + 1;
      while (end < pages && end != header.normal_pages && offset(end) == offset(end - 1) + page_bytes) ++end;
      const auto run = shared_.map.resolve(block, offset(first), end - first);
      if (!run) return std::unexpected(run.error());
      if (first < header.normal_pages) runs_.add(run->data(), run->size());
      first = end;
    }
    return distinct_.check(shared_.map.block(block).bytes);
  }

  Result<void> read_pages(const wire::PacketHeader& header) noexcept {
    const std::size_t payload_bytes = wire::payload_bytes(header);
    const ConstBuffers pages = runs_.view();
    std::size_t parts = 0;
    if constexpr (C::payload_form == PayloadForm::pages) {
      for (const iovec& run : pages) in_[parts++] = run;
    } else {
      in_[parts++] = {payload_.get(), payload_bytes};
    }
    // The next header comes with this payload if it is there already: one system call less per packet.
    in_[parts++] = {header_.get(), header_bytes()};
    const auto arrived = read_at_least(link_, std::span(in_.get(), parts), payload_bytes);
    clock_.lap(counters_.io_ns);
    if (!arrived) return std::unexpected(arrived.error());
    counters_.wire_bytes.add(*arrived);
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

  void apply_zero(BlockId block, std::uint64_t offset) noexcept {
    const bool had_bytes = shared_.note_zero(block, offset);
    if (shared_.destination == DestinationMemory::zeroed && !had_bytes) return;
    std::byte* const page = shared_.map.block(block).host.data() + offset;
    const std::size_t page_bytes = shared_.map.page_bytes();
    if (buffer_is_zero(page, page_bytes)) return;  // reading is cheaper than dirtying, on memory and on files
    std::memset(page, 0, page_bytes);
    zeros_written_.add(1);
  }

  Result<void> synchronise() noexcept {
    counters_.syncs.add(1);
    counters_.cpu_ns.set(thread_cpu_ns());
    auto passed = shared_.barrier->arrive(id(), shared_.progress);
    clock_.lap(counters_.idle_ns);
    return passed;
  }

  Result<void> leave() noexcept {
    if (has_data_past(counters_.syncs.get())) return fail(Errc::unsynced_end, Stage::read, "end of stream");
    return shared_.barrier->leave(id());
  }

  /// The same block as in the packet before, nearly always.
  Result<BlockId> find(std::string_view idstr) noexcept {
    if (last_block_ && shared_.map.block(*last_block_).idstr == idstr) return *last_block_;
    const Result<BlockId> block = shared_.map.find(idstr);
    if (block) last_block_ = *block;
    return block;
  }

  std::uint64_t offset(std::size_t slot) const noexcept { return wire::load_offset(header_.get(), slot); }
  std::size_t header_bytes() const noexcept { return wire::header_bytes(shared_.map.page_bytes()); }

  static constexpr std::size_t prefix_bytes = 12;  ///< magic, version, flags
  static constexpr std::size_t slots_known = 16;   ///< the same, and pages_alloc

  RecvShared& shared_;
  const unsigned channels_;
  T link_;
  typename C::Decoder decoder_;
  PageRuns runs_;
  DistinctPages distinct_;
  PageDigest digest_;
  std::unique_ptr<std::byte[]> header_;
  std::unique_ptr<std::byte[]> payload_;
  std::unique_ptr<iovec[]> in_;
  PageBuffer pages_;                          ///< with a PacketHook: where its pages are
  std::unique_ptr<std::uint64_t[]> offsets_;  ///< and their places
  std::unique_ptr<std::byte[]> device_state_;
  std::size_t device_state_room_ = 0;
  std::size_t ahead_ = 0;  ///< bytes of the next header that are in header_ already
  std::optional<BlockId> last_block_;
  std::atomic<std::uint64_t> data_epoch_ = 0;  ///< of the last packet with pages, counted from 1
  std::atomic<std::uint32_t> id_{no_channel};  ///< known after the hello
  std::atomic<bool> answered_{false};
  StageClock clock_;
  ChannelCounters counters_;
  Counter zeros_written_, pages_verified_;
};

}  // namespace multifd
