// SPDX-License-Identifier: MIT
//
// Writes a channel's pages in the multifd format: as packets on a stream.
//
//   hello, { header + payload, ... , SYNC }, { ... , SYNC }, end of stream
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "multifd/compress/policy.hpp"
#include "multifd/engine/outlet.hpp"
#include "multifd/format/init_packet.hpp"
#include "multifd/format/packet.hpp"
#include "multifd/format/rejoin.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/options.hpp"
#include "multifd/packets/answers.hpp"
#include "multifd/packets/redial.hpp"
#include "multifd/transport/algorithms.hpp"

namespace multifd::packets {

/// What the outlets of one sender share.
struct OutletShared {
  OutletShared(std::size_t bytes_of_a_page, const Uuid& vm_uuid, Digest with_digest) noexcept
      : page_bytes(bytes_of_a_page), uuid(vm_uuid), digest(with_digest) {}

  const std::size_t page_bytes;
  const Uuid uuid;
  const Digest digest;
  std::optional<wire::Announcement> announced{};  ///< empty: the peer is not this library's receiver
  std::atomic<std::uint64_t> packet_num{0};       ///< one count for all channels (format/packets.md section 3.1)
  std::atomic<std::uint32_t> level_changes{0};
  std::atomic<int> level{0};

  /// Whether the receiver answers, as the hellos ask it to.
  bool gets_answer() const noexcept { return announced && announced->takes_answer; }
};

/// A model of engine::Outlet, with messages (device-state packets) and an answer.
template <Transport T, Compressor C>
class Outlet {
 public:
  /// Allocates everything that sending will need. Params `redial`: null: a lost connection is an error; else it outlives this
  /// object, as `compressor` does.
  [[nodiscard]] static Result<Outlet> create(OutletShared& shared, unsigned channel, T link, const C& compressor,
                                             Redial<T>* redial = nullptr) {
    auto encoder = C::Encoder::open(compressor, {.page_bytes = shared.page_bytes});
    if (!encoder) return std::unexpected(encoder.error());
    Outlet outlet(shared, channel, std::move(link), std::move(*encoder), compressor, redial);
    outlet.headers_.reset(new (std::nothrow) std::byte[most_headers * outlet.header_bytes()]{});
    outlet.out_.reset(new (std::nothrow) iovec[most_packets * (outlet.packet_pages() + 1)]);
    if (!outlet.headers_ || !outlet.out_) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    if (shared.digest == Digest::on) {
      outlet.staging_.reset(new (std::nothrow) std::byte[batch_bytes]);
      if (!outlet.staging_) return fail_errno(Stage::setup, "allocate channel", ENOMEM);
    }
    return outlet;
  }

  [[nodiscard]] Result<engine::Sent> begin() noexcept {
    const wire::InitPacketBytes hello = wire::encode(wire::InitPacket{
        .uuid = shared_->uuid, .id = static_cast<std::uint8_t>(channel_), .announced = shared_->announced});
    if (auto sent = write_all(link_, std::span<const std::byte>(hello)); !sent) return std::unexpected(sent.error());
    return engine::Sent{.wire_bytes = hello.size()};
  }

  [[nodiscard]] Result<engine::Sent> send(const engine::PageList& pages, engine::Meter& meter) noexcept {
    wire::PacketHeader header{.flags = C::method,
                              .pages_alloc = static_cast<std::uint32_t>(packet_pages()),
                              .normal_pages = static_cast<std::uint32_t>(pages.normal_pages),
                              .zero_pages = static_cast<std::uint32_t>(pages.offsets.size() - pages.normal_pages),
                              .packet_num = next_packet_num(),
                              .idstr = pages.block.idstr};
    std::size_t payload_bytes = 0;
    iovec staged;
    ConstBuffers payload;
    if (pages.normal_pages > 0) {
      ConstBuffers runs = pages.runs;
      if (staging_) {
        staged = stage(runs);
        runs = std::span(&staged, 1);
        header.has_digest = true;
        header.digest = digest_of({staging_.get(), staged.iov_len});
      }
      if (auto level = follow_level(); !level) return std::unexpected(level.error());
      const Result<ConstBuffers> encoded = encoder_.encode(runs);
      if (!encoded) {
        Error error = encoded.error();
        error.subject = pages.block.idstr;
        return std::unexpected(error);
      }
      payload = *encoded;
      payload_bytes = total_bytes(payload);
      // A user's compressor may break its contract; its output must not overrun the peer's buffer.
      const std::size_t bound =
          C::payload_form == PayloadForm::pages ? pages.normal_pages * shared_->page_bytes : wire::max_payload_bytes;
      if (payload_bytes == 0 || payload_bytes > bound || payload.size() > packet_pages())
        return fail(Errc::payload_too_large, Stage::encode, "payload", payload_bytes, bound, pages.block.idstr);
      header.next_packet_size = static_cast<std::uint32_t>(payload_bytes);
    }
    meter.encoded();

    encode(header, pages.offsets);
    const std::size_t piece = meter.piece(payload_bytes);
    if (auto granted = meter.acquire(header_bytes() + piece); !granted) return std::unexpected(granted.error());
    hold(payload);
    // Compressed pages and copies are in buffers that the next packet needs. Under a cap bytes leave when they are granted.
    const bool as_they_lie = pages.in_guest && payload.data() == pages.runs.data() && piece == payload_bytes;
    const bool pinned = as_they_lie && pins(link_);
    const bool can_wait = payload.empty() || (as_they_lie && !pinned && held_packets_ < most_packets && is_fast_);
    if (!can_wait || held_ == most_headers) {
      auto written = write_held(payload_bytes - piece, pinned ? payload.size() : 0, meter);
      if (!written) return std::unexpected(written.error());
    }
    return engine::Sent{.payload_bytes = payload_bytes, .wire_bytes = header_bytes() + payload_bytes};
  }

  [[nodiscard]] Result<void> push_out(engine::Meter& meter) noexcept { return write_held(0, 0, meter); }

  [[nodiscard]] Result<engine::Sent> close_epoch(std::uint64_t, engine::Meter& meter) noexcept {
    std::memset(header(), 0, header_bytes());
    wire::encode_header(header(), {.flags = wire::flag_sync, .packet_num = next_packet_num()});
    hold({});
    if (auto written = write_held(0, 0, meter); !written) return std::unexpected(written.error());
    return engine::Sent{.wire_bytes = header_bytes()};
  }

  /// Writes a whole device-state packet. Never compressed, not ordered by SYNC (format/packets.md section 13).
  [[nodiscard]] Result<engine::Sent> send_message(const Message& packet, engine::Meter& meter) noexcept {
    if (auto written = write_held(0, 0, meter); !written) return std::unexpected(written.error());
    // In pieces: under a cap other channels go on meanwhile, and no call of the transport takes long.
    for (std::span<const std::byte> rest(packet.bytes.get(), packet.size); !rest.empty();) {
      const auto piece = rest.first(std::min(meter.piece(rest.size()), piece_bytes));
      if (auto granted = meter.acquire(piece.size()); !granted) return std::unexpected(granted.error());
      auto written = write_all(link_, piece, counted_by(meter));
      meter.wrote();
      if (!written) return std::unexpected(written.error());
      rest = rest.subspan(piece.size());
    }
    return engine::Sent{.wire_bytes = packet.size};
  }

  [[nodiscard]] Result<void> end() noexcept { return link_.finish(); }
  void shutdown() noexcept {
    if (redial_ != nullptr) redial_->stop();
    drop_link();
  }

  // ---- A connection that is lost

  /// Breaks the connection, so that the worker makes another one. Threads: any.
  void drop_link() noexcept {
    const std::lock_guard held(*link_mutex_);
    link_.shutdown();
  }
  [[nodiscard]] Result<void> check_link() noexcept { return check_connected(link_); }
  /// This side's own drop_link() is one, too.
  bool comes_back(const Error& error) const noexcept {
    return redial_ != nullptr && (is_lost_link(error) || error.code == Errc::cancelled);
  }
  [[nodiscard]] Result<void> reconnect(const Error& why) noexcept {
    drop_link();
    auto link = redial_->reconnect(channel_, why);
    if (!link) return std::unexpected(link.error());
    auto encoder = C::Encoder::open(compressor_, {.page_bytes = shared_->page_bytes});  // its stream begins anew
    if (!encoder) return std::unexpected(encoder.error());
    encoder_ = std::move(*encoder);
    level_changes_seen_ = 0;
    forget_held();
    const std::lock_guard held(*link_mutex_);
    link_ = std::move(*link);
    return {};
  }
  [[nodiscard]] Result<engine::Sent> begin_at(std::uint64_t epoch) noexcept {
    wire::FieldWriter<wire::rejoin_epoch_bytes> bytes;
    if (auto sent = write_all(link_, bytes.be(epoch).view()); !sent) return std::unexpected(sent.error());
    redial_->joined(channel_);
    return engine::Sent{.wire_bytes = wire::rejoin_epoch_bytes};
  }

  [[nodiscard]] Result<void> confirmation() noexcept { return wait_for_confirmation(link_); }
  std::optional<Error> reason() noexcept {
    if (!shared_->gets_answer()) return std::nullopt;
    return take_reason(link_);
  }

 private:
  /// Packets wait for the next one's write while there is work, so that several leave in one call. Those of zero pages
  /// only are just a header: one write for each would cost more than the check of its pages, on both sides.
  static constexpr std::size_t most_headers = 16;
  /// Those with pages among them. More gain nothing that can be measured.
  static constexpr std::size_t most_packets = 4;
  /// Packets with pages wait where so many leave within this time. On a slow link a system call costs nothing beside what
  /// it moves, and the channel that holds the epoch's last packets would be the last to finish by as much.
  static constexpr std::chrono::milliseconds longest_write{10};
  /// What one call of the transport writes of a device's state at most.
  static constexpr std::size_t piece_bytes = 64 * 1024;

  static auto counted_by(engine::Meter& meter) noexcept {
    return [&meter](std::size_t bytes) noexcept { meter.moved(bytes); };
  }

  Outlet(OutletShared& shared, unsigned channel, T link, typename C::Encoder encoder, const C& compressor,
         Redial<T>* redial)
      : shared_(&shared),
        channel_(channel),
        link_(std::move(link)),
        encoder_(std::move(encoder)),
        compressor_(compressor),
        redial_(redial),
        link_mutex_(std::make_unique<std::mutex>()) {}

  /// Writes all buffers. The cap has granted the first `granted` bytes; the rest is asked for piece by piece.
  [[nodiscard]] Result<void> write_pieces(std::span<iovec> buffers, std::size_t granted,
                                          engine::Meter& meter) noexcept {
    for (std::size_t rest = total_bytes(buffers);;) {
      // The buffers that the granted bytes end in, and what of the last one is behind them.
      std::size_t count = 0;
      std::size_t bytes = 0;
      while (bytes < granted) bytes += buffers[count++].iov_len;
      const std::size_t behind = bytes - granted;
      iovec later = buffers[count - 1];
      later.iov_base = static_cast<std::byte*>(later.iov_base) + (later.iov_len - behind);
      later.iov_len = behind;
      buffers[count - 1].iov_len -= behind;
      auto written = write_all(link_, buffers.first(count), counted_by(meter));
      rest -= granted;
      if (!written || rest == 0) return written;
      buffers = buffers.subspan(behind > 0 ? count - 1 : count);
      if (behind > 0) buffers[0] = later;
      granted = meter.piece(rest);
      meter.wrote();
      if (auto asked = meter.acquire(granted); !asked) return asked;
    }
  }

  /// Adds the header that encode() made, and this payload, to what is to be written.
  void hold(ConstBuffers payload) noexcept {
    if (out_count_ > 0 && end_of(out_[out_count_ - 1]) == header()) {
      out_[out_count_ - 1].iov_len += header_bytes();
    } else {
      out_[out_count_++] = const_buffer(header(), header_bytes());
    }
    ++held_;
    for (const iovec& part : payload) out_[out_count_++] = part;
    if (!payload.empty()) ++held_packets_;
  }
  void forget_held() noexcept { held_ = held_packets_ = out_count_ = 0; }
  static const std::byte* end_of(const iovec& buffer) noexcept {
    return static_cast<const std::byte*>(buffer.iov_base) + buffer.iov_len;
  }

  /// Writes what is held. Params `behind`: so many bytes at the end the cap has not granted; `pinned`: so many buffers at
  /// the end are pages of the guest which leave without a copy.
  [[nodiscard]] Result<void> write_held(std::size_t behind, std::size_t pinned, engine::Meter& meter) noexcept {
    if (out_count_ == 0) return {};
    const std::span<iovec> buffers(out_.get(), out_count_);
    const std::size_t packets = held_packets_;
    forget_held();
    auto written = behind == 0 ? write_all(link_, buffers.first(buffers.size() - pinned), counted_by(meter))
                               : write_pieces(buffers, total_bytes(buffers) - behind, meter);
    if constexpr (HasPinnedWrites<T>) {
      if (written && pinned > 0) written = write_all_pinned(link_, buffers.last(pinned), counted_by(meter));
    }
    const auto time = meter.wrote();
    if (packets > 0) is_fast_ = most_packets * time / packets < longest_write;
    return written;
  }

  /// Copies the pages, so that digest and payload have the same bytes although the guest goes on writing.
  iovec stage(ConstBuffers pages) noexcept {
    std::size_t used = 0;
    for (const iovec& run : pages) {
      std::memcpy(staging_.get() + used, run.iov_base, run.iov_len);
      used += run.iov_len;
    }
    return {staging_.get(), used};
  }

  [[nodiscard]] Result<void> follow_level() noexcept {
    if constexpr (HasLiveLevel<C>) {
      const std::uint32_t changes = shared_->level_changes.load(std::memory_order_acquire);  // meets set_level()
      if (changes != level_changes_seen_) {
        level_changes_seen_ = changes;
        return encoder_.set_level(shared_->level.load(std::memory_order_relaxed));
      }
    }
    return {};
  }

  void encode(const wire::PacketHeader& header, std::span<const std::uint64_t> offsets) noexcept {
    wire::encode_header(this->header(), header);
    for (std::size_t i = 0; i < offsets.size(); ++i) wire::store_offset(this->header(), i, offsets[i]);
    // Offsets of an earlier packet must not travel again.
    std::byte* const rest = this->header() + wire::header_fixed_bytes + 8 * offsets.size();
    std::memset(rest, 0, static_cast<std::size_t>(this->header() + header_bytes() - rest));
  }

  /// Where the next header goes: behind the headers that wait.
  std::byte* header() noexcept { return headers_.get() + held_ * header_bytes(); }
  std::size_t header_bytes() const noexcept { return wire::header_bytes(shared_->page_bytes); }
  std::size_t packet_pages() const noexcept { return wire::page_count(shared_->page_bytes); }
  std::uint64_t next_packet_num() noexcept {
    return shared_->packet_num.fetch_add(1, std::memory_order_relaxed);  // relaxed: a statistic that orders nothing
  }

  OutletShared* shared_;
  unsigned channel_;
  T link_;
  typename C::Encoder encoder_;
  C compressor_;                            ///< for the next encoder
  Redial<T>* redial_;                       ///< null: no connection comes back
  std::unique_ptr<std::mutex> link_mutex_;  ///< of link_, while the worker replaces it and others shut it down
  std::unique_ptr<std::byte[]> headers_;
  std::size_t held_ = 0;          ///< headers that wait
  std::size_t held_packets_ = 0;  ///< those with pages among them
  std::unique_ptr<iovec[]> out_;
  std::size_t out_count_ = 0;             ///< entries of what waits
  bool is_fast_ = false;                  ///< by the last write of pages
  std::unique_ptr<std::byte[]> staging_;  ///< with Digest::on
  std::uint32_t level_changes_seen_ = 0;
};

}  // namespace multifd::packets
