// SPDX-License-Identifier: MIT
//
// The producer's half of a sender: ranges, single pages and copies become batches, zero pages go where the policy wants
// them, full batches to the channels. The caller has checked every range.
#pragma once

#include <array>
#include <chrono>
#include <cstring>
#include <new>
#include <optional>
#include <span>
#include <utility>

#include "multifd/channel/counters.hpp"
#include "multifd/channel/send_channel.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/wire/device_state.hpp"

namespace multifd {

/// What a bulk call did with its pages.
struct QueuedPages {
  std::uint64_t queued = 0;
  std::uint64_t zero_on_main = 0;
};

/// Threads: one, the producer; the counters may be read by any.
template <ZeroPagePolicy Z>
class BatchProducer {
 public:
  BatchProducer(SendShared& shared, const Z& zero) noexcept : shared_(shared), zero_(zero) {}

  /// After the hand-off was made.
  void start() noexcept { open_ = shared_.handoff->first_batch(); }

  /// A run of pages, looked at where the policy wants it: zero pages to the caller, the rest to the channels.
  template <class OnZero>
  Result<void> queue(BlockId block, std::uint64_t offset, std::uint64_t pages, OnZero&& on_zero, QueuedPages& done) {
    if constexpr (Z::stage == ZeroStage::producer) {
      for (std::uint64_t first = 0; first < pages; first += zero_mask_pages) {
        const std::uint64_t count = std::min<std::uint64_t>(zero_mask_pages, pages - first);
        const std::uint64_t all = ~std::uint64_t{0} >> (zero_mask_pages - count);
        if (auto queued = queue_bits(block, offset + first * page_bytes(), all, on_zero, done); !queued) return queued;
      }
      return {};
    } else {
      done.queued += pages;
      return queue_run(block, offset, pages);
    }
  }

  /// The same for up to 64 pages, one for each bit that is set: bit 0 stands for the page at `offset`.
  template <class OnZero>
  Result<void> queue_bits(BlockId block, std::uint64_t offset, std::uint64_t bits, OnZero&& on_zero,
                          QueuedPages& done) {
    std::array<std::uint64_t, zero_mask_pages> room;
    std::span<std::uint64_t> offsets = dirty_offsets(bits, offset, page_bytes(), room);
    if constexpr (Z::stage == ZeroStage::producer) {
      unsynced_ = true;
      const std::byte* const host = shared_.map.block(block).host.data();
      const std::uint64_t zero = zero_mask(zero_, PageGroup{block, host, page_bytes(), offsets});
      std::size_t kept = 0;
      for (std::size_t i = 0; i < offsets.size(); ++i) {
        if ((zero >> i & 1) != 0) {
          on_zero(offsets[i]);
        } else {
          offsets[kept++] = offsets[i];
        }
      }
      zero_on_main.add(offsets.size() - kept);
      done.zero_on_main += offsets.size() - kept;
      offsets = offsets.first(kept);
    }
    done.queued += offsets.size();
    return queue_listed(block, offsets);
  }

  /// The hot path: a run of pages into batches, whatever they hold.
  Result<void> queue_run(BlockId block, std::uint64_t offset, std::uint64_t pages) noexcept {
    return fill(block, pages, [&](std::size_t count) {
      open_->push_run(offset, count, page_bytes());
      offset += count * page_bytes();
    });
  }

  /// A page that is zero, to be said without looking at it.
  Result<void> queue_zero(BlockId block, std::uint64_t offset, QueuedPages& done) noexcept {
    unsynced_ = true;
    if constexpr (Z::stage == ZeroStage::producer) {
      zero_on_main.add(1);
      ++done.zero_on_main;
      return {};
    } else {
      ++done.queued;
      const bool listed = Z::stage == ZeroStage::channel;
      if (!listed && shared_.source == PageSource::guest) return queue_run(block, offset, 1);
      // Zero pages end a batch, and bytes of copies cannot be appended to a batch of listed zero pages.
      if (open_->block != block || open_->empty() || (open_->known_zeros != 0) != listed) {
        if (auto put = put_open(); !put) return put;
        open_->block = block;
      }
      queued_pages.add(1);
      if (listed) {
        open_->push_zero(offset);
      } else {
        std::memset(open_->copies.data() + open_->size() * page_bytes(), 0, page_bytes());
        open_->push(offset);
      }
      return open_->full() ? put_open() : Result<void>{};
    }
  }

  /// One packet's pages as copies, swapped into a batch: `normal` pages that lie in `pages` in the order of their
  /// offsets, then pages that are zero. `pages` gets an empty buffer in exchange. Where on_zero(offset) returns false,
  /// the zero page travels as bytes.
  template <class OnZero>
  Result<void> queue_copies(BlockId block, std::span<const std::uint64_t> offsets, std::size_t normal,
                            PageBuffer& pages, OnZero&& on_zero, QueuedPages& done) {
    unsynced_ = true;
    if (auto put = put_open(); !put) return put;
    PageBatch& batch = *open_;
    batch.block = block;
    std::swap(batch.copies, pages);
    for (std::size_t i = 0; i < normal; ++i) {
      std::byte* const page = batch.copies.data() + i * page_bytes();
      if constexpr (Z::stage == ZeroStage::producer) {
        if (zero_.is_zero({block, offsets[i], {page, page_bytes()}}) && is_on_main(offsets[i], on_zero, done)) continue;
        // Zero pages before it have left a gap.
        if (i != batch.size()) std::memcpy(batch.copies.data() + batch.size() * page_bytes(), page, page_bytes());
      }
      batch.push(offsets[i]);
    }
    for (const std::uint64_t offset : offsets.subspan(normal)) {
      if constexpr (Z::stage == ZeroStage::channel) {
        batch.push_zero(offset);
        continue;
      } else if constexpr (Z::stage == ZeroStage::producer) {
        if (is_on_main(offset, on_zero, done)) continue;
      }
      std::memset(batch.copies.data() + batch.size() * page_bytes(), 0, page_bytes());
      batch.push(offset);
    }
    queued_pages.add(batch.size());
    done.queued += batch.size();
    return put_open();
  }

  /// A device-state packet; its bytes are copied.
  Result<void> queue_device_state(const DeviceState& state) noexcept {
    if (auto put = put_open(); !put) return put;
    // Allocated for each: such packets are few, large, and not on the way of the pages.
    EncodedPacket packet{.bytes = nullptr, .size = wire::device_state_header_bytes + state.bytes.size()};
    packet.bytes.reset(new (std::nothrow) std::byte[packet.size]);
    if (!packet.bytes) return fail_errno(Stage::produce, "allocate device state", ENOMEM);
    wire::encode_device_state_header(packet.bytes.get(), state);
    std::memcpy(packet.bytes.get() + wire::device_state_header_bytes, state.bytes.data(), state.bytes.size());
    open_->device_state = std::move(packet);
    return put_open();
  }

  Result<void> put_open() noexcept {
    if (open_->empty()) return {};
    PageBatch* const empty =
        shared_.handoff->put(open_, [this] { note_wait(); }, [this] { shared_.check_progress(*watch_); });
    if (empty == nullptr) return std::unexpected(shared_.error.get());
    open_ = empty;
    return {};
  }

  /// Whether pages, zero ones on the caller's main stream included, belong to an epoch that is not closed.
  bool unsynced() const noexcept { return unsynced_; }
  void note_unsynced() noexcept { unsynced_ = true; }
  void note_synced() noexcept { unsynced_ = false; }

  Counter zero_on_main, queued_pages, waits, wait_ns;

 private:
  /// Pages in any order, whatever they hold.
  Result<void> queue_listed(BlockId block, std::span<const std::uint64_t> offsets) noexcept {
    return fill(block, offsets.size(), [&](std::size_t count) {
      open_->push_all(offsets.first(count));
      offsets = offsets.subspan(count);
    });
  }

  /// Opens batches of `block` until `pages` pages are in; `push(count)` appends the next few, as many as fit.
  template <class Push>
  Result<void> fill(BlockId block, std::uint64_t pages, Push&& push) noexcept {
    if (pages == 0) return {};
    unsynced_ = true;
    if (open_->block != block || open_->known_zeros != 0) {
      if (auto put = put_open(); !put) return put;
      open_->block = block;
    }
    queued_pages.add(pages);
    for (;;) {
      const std::size_t count = std::min<std::uint64_t>(pages, open_->room());
      push(count);
      if (open_->full()) {
        if (auto put = put_open(); !put) return put;
        open_->block = block;
      }
      pages -= count;
      if (pages == 0) return {};
    }
  }

  template <class OnZero>
  bool is_on_main(std::uint64_t offset, OnZero&& on_zero, QueuedPages& done) {
    if (!on_zero(offset)) return false;
    zero_on_main.add(1);
    ++done.zero_on_main;
    return true;
  }

  /// Called when the producer goes to sleep and when it has slept.
  void note_wait() noexcept {
    const auto now = std::chrono::steady_clock::now();
    if (waiting_since_) {
      wait_ns.add(static_cast<std::uint64_t>(std::chrono::nanoseconds(now - *waiting_since_).count()));
      waiting_since_.reset();
    } else {
      waits.add(1);
      waiting_since_ = now;
      watch_.emplace(shared_.watch());
    }
  }

  std::size_t page_bytes() const noexcept { return shared_.map.page_bytes(); }

  SendShared& shared_;
  const Z& zero_;
  PageBatch* open_ = nullptr;
  bool unsynced_ = false;
  std::optional<std::chrono::steady_clock::time_point> waiting_since_;
  std::optional<ProgressWatch> watch_;  ///< of the last wait
};

}  // namespace multifd
