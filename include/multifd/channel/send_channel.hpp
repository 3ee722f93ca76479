// SPDX-License-Identifier: MIT
//
// One sending channel: its worker takes batches, finds zero pages, encodes, writes, and gives the batches back.
//
//   hello, { header + payload, ... , SYNC }, { ... , SYNC }, end of stream
#pragma once

#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "multifd/channel/answers.hpp"
#include "multifd/channel/counters.hpp"
#include "multifd/channel/page_runs.hpp"
#include "multifd/channel/send_shared.hpp"
#include "multifd/compress/policy.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/memory/ram_map.hpp"
#include "multifd/thread.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/wire/init_packet.hpp"
#include "multifd/wire/packet.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd {

/// Threads: run() is the worker's body; shutdown() and stats() from any thread.
template <Transport T, Compressor C, ZeroPagePolicy Z>
class SendChannel {
 public:
  /// Allocates everything that sending will need.
  static Result<std::unique_ptr<SendChannel>> create(SendShared& shared, std::uint8_t id, T link, const C& compressor,
                                                     const Z& zero) {
    const std::size_t page_bytes = shared.map.page_bytes();
    const std::size_t pages = shared.map.packet_pages();
    auto encoder = C::Encoder::open(compressor, {.page_bytes = page_bytes});
    if (!encoder) return std::unexpected(encoder.error());
    auto runs = PageRuns::create(pages);
    if (!runs) return std::unexpected(runs.error());
    auto digest = PageDigest::create();
    if (!digest) return std::unexpected(digest.error());
    std::unique_ptr<SendChannel> channel(new (std::nothrow) SendChannel(
        shared, id, std::move(link), std::move(*encoder), zero, std::move(*runs), std::move(*digest)));
    if (!channel) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    channel->headers_.reset(new (std::nothrow) std::byte[most_headers * wire::header_bytes(page_bytes)]{});
    channel->out_.reset(new (std::nothrow) iovec[pages + 1]);
    channel->zeros_.reset(new (std::nothrow) std::uint64_t[pages]);
    if (shared.digest == Digest::on) channel->staging_.reset(new (std::nothrow) std::byte[wire::packet_page_bytes]);
    if (!channel->headers_ || !channel->out_ || !channel->zeros_ || (shared.digest == Digest::on && !channel->staging_))
      return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    return channel;
  }

  /// The worker's body: ends when everything is sent, or at the first error of any channel.
  void run() noexcept {
    Result<void> ended = work();
    counters_.cpu_ns.set(thread_cpu_ns());
    if (!ended) raise(ended.error());
    shared_.gate.left();
    // Relaxed: the worker saw it set when it saw that the hand-off is finished, or need not.
    if (id_ != 0 || !ended || !shared_.wants_answer.load(std::memory_order_relaxed)) return;
    if (auto confirmed = wait_for_confirmation(link_); !confirmed) shared_.error.raise(confirmed.error());
    shared_.gate.answered();
  }

  void shutdown() noexcept { link_.shutdown(); }
  ChannelStats stats() const noexcept { return counters_.snapshot(id_); }
  std::uint64_t wire_bytes() const noexcept { return counters_.wire_bytes.get(); }

 private:
  SendChannel(SendShared& shared, std::uint8_t id, T link, typename C::Encoder encoder, const Z& zero, PageRuns runs,
              PageDigest digest) noexcept
      : shared_(shared),
        id_(id),
        link_(std::move(link)),
        encoder_(std::move(encoder)),
        zero_(zero),
        runs_(std::move(runs)),
        digest_(std::move(digest)) {}

  /// Makes this channel's error the first one. A receiver of ours may have left its reason before it broke the connection.
  void raise(Error error) noexcept {
    error.channel = id_;
    error.packet = counters_.packets.get();
    if (shared_.gets_answer() && error.code == Condition::peer_gone) {
      if (const auto reason = take_reason(link_)) error = *reason;
    }
    shared_.error.raise(error);
  }

  Result<void> work() noexcept {
    if (auto sent = send_hello(); !sent) return sent;
    clock_ = {};
    for (;;) {
      std::optional<Work> next = shared_.handoff->try_take(id_);
      if (!next) {
        if (auto sent = write_headers(0); !sent) return sent;
        next = shared_.handoff->take(id_);
      }
      const Work work = *next;
      clock_.lap(counters_.idle_ns);
      switch (work.kind) {
        case Work::Kind::batch: {
          auto sent =
              work.batch->device_state.bytes ? send_device_state(work.batch->device_state) : send_batch(*work.batch);
          shared_.handoff->give_back(id_, work.batch);
          if (!sent) return sent;
          break;
        }
        case Work::Kind::sync:
          if (auto sent = send_sync(); !sent) return sent;
          break;
        case Work::Kind::finished: return link_.finish();
        case Work::Kind::stopped: return {};  // the reason is the first error already
      }
    }
  }

  Result<void> send_hello() noexcept {
    const wire::InitPacketBytes hello =
        wire::encode(wire::InitPacket{.uuid = shared_.uuid, .id = id_, .announced = shared_.announced});
    if (auto sent = write_all(link_, std::span<const std::byte>(hello)); !sent) return sent;
    counters_.wire_bytes.add(hello.size());
    return {};
  }

  Result<void> send_sync() noexcept {
    std::memset(header(), 0, header_bytes());
    wire::encode_header(header(), {.flags = wire::flag_sync, .packet_num = next_packet_num()});
    if (auto sent = write_headers(1); !sent) return sent;
    counters_.wire_bytes.add(header_bytes());
    counters_.syncs.add(1);
    counters_.cpu_ns.set(thread_cpu_ns());
    shared_.gate.written(id_);
    return {};
  }

  /// Writes the headers that are held, and `more` behind them.
  Result<void> write_headers(std::size_t more) noexcept {
    const std::size_t count = std::exchange(held_, 0) + more;
    if (count == 0) return {};
    auto sent = write_all(link_, std::span<const std::byte>(headers_.get(), count * header_bytes()));
    clock_.lap(counters_.io_ns);
    return sent;
  }

  /// Written as it is: never compressed, not ordered by SYNC (format/packets.md section 13).
  Result<void> send_device_state(const EncodedPacket& packet) noexcept {
    if (!shared_.limiter.acquire(packet.size)) return {};  // stopped: take() will say so
    if (auto sent = write_headers(0); !sent) return sent;
    auto sent = write_all(link_, std::span<const std::byte>(packet.bytes.get(), packet.size));
    clock_.lap(counters_.io_ns);
    if (!sent) return sent;
    counters_.packets.add(1);
    counters_.wire_bytes.add(packet.size);
    return {};
  }

  Result<void> send_batch(PageBatch& batch) noexcept {
    const std::size_t page_bytes = shared_.map.page_bytes();
    const RamBlock& block = shared_.map.block(batch.block);

    const bool copies = shared_.source == PageSource::copies;
    const std::size_t normal = copies ? gather_copies(batch) : zeros_to_the_end(batch, block.host.data());
    clock_.lap(counters_.check_ns);

    const std::span<const std::uint64_t> offsets = batch.offsets();
    if (!copies) {
      runs_.clear();
      for (const std::uint64_t offset : offsets.first(normal)) runs_.add(block.host.data() + offset, page_bytes);
    }

    wire::PacketHeader header{.flags = C::method,
                              .pages_alloc = static_cast<std::uint32_t>(shared_.map.packet_pages()),
                              .normal_pages = static_cast<std::uint32_t>(normal),
                              .zero_pages = static_cast<std::uint32_t>(offsets.size() - normal),
                              .packet_num = next_packet_num(),
                              .idstr = block.idstr};
    std::size_t payload_bytes = 0;
    std::size_t out_count = 1;
    if (normal > 0) {
      iovec staged;
      ConstBuffers pages = runs_.view();
      if (shared_.digest == Digest::on) {
        staged = stage(pages);
        pages = std::span(&staged, 1);
        header.has_digest = true;
        header.digest = digest_.of(pages);
      }
      if (auto level = follow_level(); !level) return level;
      const Result<ConstBuffers> payload = encoder_.encode(pages);
      if (!payload) {
        Error error = payload.error();
        error.subject = block.idstr;
        return std::unexpected(error);
      }
      payload_bytes = total_bytes(*payload);
      // A policy of the user's may break its contract; the peer's buffer is not ours to overrun.
      const std::size_t bound = C::payload_form == PayloadForm::pages ? normal * page_bytes : wire::max_payload_bytes;
      if (payload_bytes == 0 || payload_bytes > bound || payload->size() > shared_.map.packet_pages())
        return fail(Errc::payload_too_large, Stage::encode, "payload", payload_bytes, bound, block.idstr);
      for (const iovec& part : *payload) out_[out_count++] = part;
      header.next_packet_size = static_cast<std::uint32_t>(payload_bytes);
    }
    clock_.lap(counters_.codec_ns);

    encode(header, offsets);
    if (shared_.limiter.rate() != 0) {
      if (!shared_.limiter.acquire(header_bytes() + payload_bytes)) return {};  // stopped: take() will say so
      clock_.lap(counters_.capped_ns);
    }
    if (payload_bytes == 0 && held_ + 1 < most_headers) {
      ++held_;
    } else {
      out_[0] = const_buffer(headers_.get(), (held_ + 1) * header_bytes());
      held_ = 0;
      auto sent = write_all(link_, std::span(out_.get(), out_count));
      clock_.lap(counters_.io_ns);
      if (!sent) return sent;
    }

    counters_.packets.add(1);
    counters_.normal_pages.add(normal);
    counters_.zero_pages.add(offsets.size() - normal);
    counters_.payload_bytes.add(payload_bytes);
    counters_.wire_bytes.add(header_bytes() + payload_bytes);
    return {};
  }

  /// Partitions the batch in place, keeping the order on both sides; returns the number of normal pages.
  std::size_t zeros_to_the_end(PageBatch& batch, const std::byte* host) noexcept {
    const std::span<std::uint64_t> offsets = batch.offsets().first(batch.size() - batch.known_zeros);
    if constexpr (Z::stage != ZeroStage::channel) return offsets.size();
    std::size_t normal = 0;
    std::size_t zero = 0;
    for (std::size_t first = 0; first < offsets.size(); first += zero_mask_pages) {
      const auto group = offsets.subspan(first, std::min(zero_mask_pages, offsets.size() - first));
      const std::uint64_t mask = zero_mask(zero_, {batch.block, host, shared_.map.page_bytes(), group});
      for (std::size_t i = 0; i < group.size(); ++i) {
        if ((mask >> i & 1) != 0) {
          zeros_[zero++] = group[i];
        } else {
          offsets[normal++] = group[i];
        }
      }
    }
    std::copy_n(zeros_.get(), zero, offsets.begin() + static_cast<std::ptrdiff_t>(normal));
    return normal;
  }

  /// The same for copies, whose bytes do not lie where the offsets say; fills runs_ with the normal pages' bytes.
  std::size_t gather_copies(PageBatch& batch) noexcept {
    const std::size_t page_bytes = shared_.map.page_bytes();
    const std::span<std::uint64_t> offsets = batch.offsets().first(batch.size() - batch.known_zeros);
    std::size_t normal = 0;
    std::size_t zero = 0;
    runs_.clear();
    for (std::size_t i = 0; i < offsets.size(); ++i) {
      std::byte* const page = batch.copies.data() + i * page_bytes;
      if (Z::stage == ZeroStage::channel && zero_.is_zero({batch.block, offsets[i], {page, page_bytes}})) {
        zeros_[zero++] = offsets[i];
      } else {
        offsets[normal++] = offsets[i];
        runs_.add(page, page_bytes);
      }
    }
    std::copy_n(zeros_.get(), zero, offsets.begin() + static_cast<std::ptrdiff_t>(normal));
    return normal;
  }

  /// A private copy, so that digest and payload speak of the same bytes while the guest goes on writing.
  iovec stage(ConstBuffers pages) noexcept {
    std::size_t used = 0;
    for (const iovec& run : pages) {
      std::memcpy(staging_.get() + used, run.iov_base, run.iov_len);
      used += run.iov_len;
    }
    return {staging_.get(), used};
  }

  Result<void> follow_level() noexcept {
    if constexpr (HasLiveLevel<C>) {
      const std::uint32_t changes = shared_.level_changes.load(std::memory_order_acquire);  // meets set_level()
      if (changes != level_changes_seen_) {
        level_changes_seen_ = changes;
        return encoder_.set_level(shared_.level.load(std::memory_order_relaxed));
      }
    }
    return {};
  }

  void encode(const wire::PacketHeader& header, std::span<const std::uint64_t> offsets) noexcept {
    wire::encode_header(this->header(), header);
    for (std::size_t i = 0; i < offsets.size(); ++i) wire::store_offset(this->header(), i, offsets[i]);
    // Slots of earlier packets do not travel again.
    std::byte* const rest = this->header() + wire::header_fixed_bytes + 8 * offsets.size();
    std::memset(rest, 0, static_cast<std::size_t>(this->header() + header_bytes() - rest));
  }

  /// Where the next header goes: behind those that are held.
  std::byte* header() noexcept { return headers_.get() + held_ * header_bytes(); }
  std::size_t header_bytes() const noexcept { return wire::header_bytes(shared_.map.page_bytes()); }
  std::uint64_t next_packet_num() noexcept {
    return shared_.packet_num.fetch_add(1, std::memory_order_relaxed);  // a statistic; orders nothing
  }

  SendShared& shared_;
  const std::uint8_t id_;
  T link_;
  typename C::Encoder encoder_;
  const Z& zero_;
  PageRuns runs_;
  PageDigest digest_;
  /// Packets of zero pages are nothing but a header. They wait here for the next packet's write, as long as there is
  /// work: a write each would cost more than looking at their pages, here and at the peer.
  static constexpr std::size_t most_headers = 16;
  std::unique_ptr<std::byte[]> headers_;
  std::size_t held_ = 0;
  std::unique_ptr<iovec[]> out_;
  std::unique_ptr<std::uint64_t[]> zeros_;
  std::unique_ptr<std::byte[]> staging_;
  std::uint32_t level_changes_seen_ = 0;
  StageClock clock_;
  ChannelCounters counters_;
};

}  // namespace multifd
