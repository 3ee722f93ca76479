// SPDX-License-Identifier: MIT
//
// The producer's half of a sender: pages, ranges, bitmaps and copies become batches, zero pages go where the policy
// wants them, full batches to the channels. All arguments of the caller are checked here.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include "multifd/ends/page_source.hpp"
#include "multifd/engine/counters.hpp"
#include "multifd/engine/misuse.hpp"
#include "multifd/engine/outlet.hpp"
#include "multifd/engine/send_shared.hpp"
#include "multifd/engine/zero_sink.hpp"
#include "multifd/memory/dirty_bitmap.hpp"
#include "multifd/options.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd::engine {

/// The calls are Sender's, and are explained there.
///
/// Threads: one, the producer; the counters may be read by any.
template <Outlet O, ZeroPagePolicy Z, PageSource From>
class BatchProducer {
 public:
  BatchProducer(SendShared& shared, const Z& zero) noexcept
      : shared_(shared), page_bytes_(shared.map.page_bytes()), zero_(zero), checks_(shared.map) {}

  /// Takes the first empty batch. Called once, after the hand-off was created.
  void start() noexcept { open_ = shared_.handoff->first_batch(); }

  [[nodiscard]] Result<Queued> queue_page(BlockId block, std::uint64_t offset) noexcept
    requires From::guest
  {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (!is_open() || !fits(block, offset, page_bytes())) [[unlikely]]
      return std::unexpected(refusal(block, offset));
    checks_.note_run(shared_.map, block, offset, 1);
    if constexpr (Z::stage == ZeroStage::producer) {
      const std::byte* const host = shared_.map.block(block).host.data();
      if (zero_.is_zero({block, offset, {host + offset, page_bytes()}})) {
        unsynced_ = true;  // an epoch that has only zero pages needs its SYNC, too
        zero_on_main.add(1);
        return Queued::zero_on_main;
      }
    }
    if (auto queued = append_page(block, offset); !queued) return std::unexpected(queued.error());
    return Queued::queued;
  }

  template <ZeroSink<Z> OnZero>
  [[nodiscard]] Result<QueuedPages> queue_range(BlockId block, std::uint64_t offset, std::uint64_t bytes,
                                                OnZero&& on_zero)
    requires From::guest
  {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (!is_open() || !fits(block, offset, bytes)) [[unlikely]]
      return std::unexpected(refusal(block, offset));
    const std::uint64_t pages = bytes / page_bytes();
    checks_.note_run(shared_.map, block, offset, pages);
    QueuedPages done;
    if constexpr (Z::stage == ZeroStage::producer) {
      for (std::uint64_t first = 0; first < pages; first += zero_mask_pages) {
        const std::uint64_t count = std::min<std::uint64_t>(zero_mask_pages, pages - first);
        const std::uint64_t all = ~std::uint64_t{0} >> (zero_mask_pages - count);
        if (auto queued = queue_bits(block, offset + first * page_bytes(), all, on_zero, done); !queued)
          return std::unexpected(queued.error());
      }
    } else {
      done.queued = pages;
      if (auto queued = append_run(block, offset, pages); !queued) return std::unexpected(queued.error());
    }
    return done;
  }

  template <ZeroSink<Z> OnZero>
  [[nodiscard]] Result<QueuedPages> queue_dirty(BlockId block, std::span<const std::uint64_t> bitmap,
                                                std::uint64_t first_page, OnZero&& on_zero)
    requires From::guest
  {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (!is_open() || !fits(block, 0, 0)) [[unlikely]]
      return std::unexpected(refusal(block, 0));
    const std::uint64_t pages = shared_.map.pages(block);
    const Subject name(shared_.map.block(block).idstr);
    if (first_page > pages) return fail(Errc::bad_range, Stage::produce, "queue_dirty: page", first_page, pages, name);
    if (const std::uint64_t end = end_of_dirty(bitmap); end > pages - first_page)
      return fail(Errc::bad_range, Stage::produce, "queue_dirty: page", first_page + end - 1, pages, name);
    QueuedPages done;
    for (std::size_t word = 0; word < bitmap.size(); ++word) {
      if (bitmap[word] == 0) continue;
      const std::uint64_t offset = (first_page + 64 * word) * page_bytes();
      checks_.note_bits(shared_.map, block, offset, bitmap[word]);
      if (auto queued = queue_bits(block, offset, bitmap[word], on_zero, done); !queued)
        return std::unexpected(queued.error());
    }
    return done;
  }

  [[nodiscard]] Result<Queued> queue_zero(BlockId block, std::uint64_t offset) noexcept {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (!is_open() || !fits(block, offset, page_bytes())) [[unlikely]]
      return std::unexpected(refusal(block, offset));
    checks_.note_run(shared_.map, block, offset, 1);
    unsynced_ = true;
    if constexpr (Z::stage == ZeroStage::producer) {
      zero_on_main.add(1);
      return Queued::zero_on_main;
    } else {
      constexpr bool listed = Z::stage == ZeroStage::channel;
      if constexpr (!listed && From::guest) {
        if (auto queued = append_page(block, offset); !queued) return std::unexpected(queued.error());
      } else {
        // In a batch the listed zero pages come last. No bytes can follow, so each kind has batches of its own.
        if (open_->block != block || open_->empty() || (open_->known_zeros != 0) != listed) {
          if (auto put = put_and_open(block); !put) return std::unexpected(put.error());
        }
        queued_pages.add(1);
        if constexpr (listed) {
          open_->push_zero(offset);
        } else {
          append_zero_bytes(offset);
        }
        if (open_->full()) {
          if (auto put = put_open(); !put) return std::unexpected(put.error());
        }
      }
      return Queued::queued;
    }
  }

  /// One packet's pages as copies, swapped into a batch: `normal_pages` that lie in `pages` in the order of their
  /// offsets, then pages that are zero. `pages` gets an empty buffer in exchange. Where on_zero(offset) returns false,
  /// the zero page travels as bytes.
  template <ZeroSink<Z> OnZero>
  [[nodiscard]] Result<QueuedPages> queue_copies(BlockId block, std::span<const std::uint64_t> offsets,
                                                 std::size_t normal_pages, PageBuffer& pages, OnZero&& on_zero)
    requires From::copies
  {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (!is_open() || !fits(block, 0, 0)) [[unlikely]]
      return std::unexpected(refusal(block, 0));
    if (offsets.empty() || offsets.size() > shared_.map.batch_pages() || normal_pages > offsets.size())
      return fail(Errc::bad_range, Stage::produce, "queue_copies: number of pages", offsets.size(),
                  shared_.map.batch_pages(), shared_.map.block(block).idstr);
    // Without normal pages, too: the buffer is swapped in, and zero pages may be written to it as bytes.
    if (pages.data() == nullptr)
      return fail(Errc::bad_option, Stage::produce, "queue_copies: buffer without memory", 0, 0,
                  shared_.map.block(block).idstr);
    for (const std::uint64_t offset : offsets)
      if (auto checked = shared_.map.check(block, offset); !checked) return std::unexpected(checked.error());

    unsynced_ = true;
    if (auto put = put_open(); !put) return std::unexpected(put.error());
    QueuedPages done;
    PageBatch& batch = *open_;
    batch.block = block;
    batch.copied = true;
    std::swap(batch.copies, pages);
    for (std::size_t i = 0; i < normal_pages; ++i) {
      std::byte* const page = batch.copies.data() + i * page_bytes();
      if constexpr (Z::stage == ZeroStage::producer) {
        if (zero_.is_zero({block, offsets[i], {page, page_bytes()}}) && is_taken(offsets[i], on_zero, done)) continue;
        // Zero pages before this page have left a gap.
        if (i != batch.size()) std::memcpy(batch.copies.data() + batch.size() * page_bytes(), page, page_bytes());
      }
      batch.push(offsets[i]);
    }
    for (const std::uint64_t offset : offsets.subspan(normal_pages)) {
      if constexpr (Z::stage == ZeroStage::channel) {
        batch.push_zero(offset);
      } else {
        if (Z::stage == ZeroStage::producer && is_taken(offset, on_zero, done)) continue;
        append_zero_bytes(offset);
      }
    }
    queued_pages.add(batch.size());
    done.queued += batch.size();
    if (auto put = put_open(); !put) return std::unexpected(put.error());
    return done;
  }

  /// Queues a message of the format's own. It belongs to no epoch, and leaves without a close_epoch().
  [[nodiscard]] Result<void> queue_message(Message message) noexcept
    requires HasMessages<O>
  {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (auto ready = check_open(); !ready) return ready;
    if (auto put = put_open(); !put) return put;
    open_->message = std::move(message);
    return push_out();
  }

  [[nodiscard]] Result<void> push_out() noexcept {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (auto ready = check_open(); !ready) return ready;
    if (auto put = put_open(); !put) return put;
    shared_.handoff->push_out();
    return {};
  }

  [[nodiscard]] Result<std::uint64_t> close_epoch() noexcept {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (auto ready = check_open(); !ready) return std::unexpected(ready.error());
    if (auto put = put_open(); !put) return std::unexpected(put.error());
    unsynced_ = false;
    checks_.new_epoch();
    return shared_.handoff->close_epoch();
  }

  /// Says that no more pages come: closes the epoch if it has pages. The channels drain what they have, and end.
  [[nodiscard]] Result<void> finish() noexcept {
    [[maybe_unused]] const auto turn = checks_.enter();
    if (auto ready = check_open(); !ready) return ready;
    if (unsynced_) {
      if (auto closed = close_epoch(); !closed) return std::unexpected(closed.error());
    }
    finished_ = true;
    shared_.handoff->end();
    return {};
  }
  bool finished() const noexcept { return finished_; }
  bool entered() const noexcept { return checks_.entered(); }

  /// Errors: the first error; Errc::already_closed behind finish().
  [[nodiscard]] Result<void> check_open() const noexcept {
    return is_open() ? Result<void>{} : std::unexpected(refusal(BlockId{}, 0));
  }

  /// Errors: as check_open(); Errc::bad_range.
  [[nodiscard]] Result<void> check_range(BlockId block, std::uint64_t offset, std::uint64_t bytes) const noexcept {
    return is_open() && fits(block, offset, bytes) ? Result<void>{} : std::unexpected(refusal(block, offset));
  }

  Counter zero_on_main, queued_pages, waits, wait_ns;

 private:
  /// Queues up to 64 pages, one for each bit that is set: bit 0 stands for the page at `offset`.
  template <class OnZero>
  [[nodiscard]] Result<void> queue_bits(BlockId block, std::uint64_t offset, std::uint64_t bits, OnZero&& on_zero,
                                        QueuedPages& done) {
    std::array<std::uint64_t, zero_mask_pages> room;
    std::span<std::uint64_t> offsets = dirty_offsets(bits, offset, page_bytes(), room);
    if constexpr (Z::stage == ZeroStage::producer) {
      unsynced_ = true;
      const std::byte* const host = shared_.map.block(block).host.data();
      std::array<const std::byte*, zero_mask_pages> pages;
      for (std::size_t i = 0; i < offsets.size(); ++i) pages[i] = host + offsets[i];
      const std::uint64_t zero = zero_mask(zero_, PageGroup{block, page_bytes(), offsets, pages.data()});
      std::size_t kept = 0;
      for (std::size_t i = 0; i < offsets.size(); ++i)
        if ((zero >> i & 1) == 0 || !is_taken(offsets[i], on_zero, done)) offsets[kept++] = offsets[i];
      offsets = offsets.first(kept);
    }
    done.queued += offsets.size();
    return append_listed(block, offsets);
  }

  /// Whether the caller takes a zero page. An on_zero() that returns void takes all.
  template <class OnZero>
  bool is_taken(std::uint64_t offset, OnZero&& on_zero, QueuedPages& done) {
    if constexpr (std::is_void_v<std::invoke_result_t<OnZero&, std::uint64_t>>) {
      on_zero(offset);
    } else {
      if (!on_zero(offset)) return false;
    }
    zero_on_main.add(1);
    ++done.zero_on_main;
    return true;
  }

  // The hot paths. They append pages to batches, without a zero check.

  [[nodiscard]] Result<void> append_page(BlockId block, std::uint64_t offset) noexcept {
    if (auto open = open_batch(block); !open) return open;
    queued_pages.add(1);
    open_->push(offset);
    return open_->full() ? put_and_open(block) : Result<void>{};
  }

  /// Appends adjacent pages.
  [[nodiscard]] Result<void> append_run(BlockId block, std::uint64_t offset, std::uint64_t pages) noexcept {
    return append(block, pages, [&](std::size_t count) {
      open_->push_run(offset, count, page_bytes());
      offset += count * page_bytes();
    });
  }

  /// Appends pages in any order.
  [[nodiscard]] Result<void> append_listed(BlockId block, std::span<const std::uint64_t> offsets) noexcept {
    return append(block, offsets.size(), [&](std::size_t count) {
      open_->push_all(offsets.first(count));
      offsets = offsets.subspan(count);
    });
  }

  /// Opens batches of `block` until `pages` pages are in; `push(count)` appends the next few, as many as fit.
  template <class Push>
  [[nodiscard]] Result<void> append(BlockId block, std::uint64_t pages, Push&& push) noexcept {
    if (pages == 0) return {};
    if (auto open = open_batch(block); !open) return open;
    queued_pages.add(pages);
    for (;;) {
      const std::size_t count = std::min<std::uint64_t>(pages, open_->room());
      push(count);
      if (open_->full()) {
        if (auto put = put_and_open(block); !put) return put;
      }
      pages -= count;
      if (pages == 0) return {};
    }
  }

  /// Makes sure that pages of `block` can be appended to the open batch.
  [[nodiscard]] Result<void> open_batch(BlockId block) noexcept {
    unsynced_ = true;
    if (open_->block == block && open_->known_zeros == 0) [[likely]]
      return {};
    return put_and_open(block);
  }
  [[nodiscard]] Result<void> put_and_open(BlockId block) noexcept {
    if (auto put = put_open(); !put) return put;
    open_->block = block;
    return {};
  }

  /// Appends a zero page among copies, as bytes.
  void append_zero_bytes(std::uint64_t offset) noexcept {
    open_->copied = true;
    std::memset(open_->copies.data() + open_->size() * page_bytes(), 0, page_bytes());
    open_->push(offset);
  }

  [[nodiscard]] Result<void> put_open() noexcept {
    if (open_->empty()) return {};
    PageBatch* const empty =
        shared_.handoff->put(open_, [this] { note_wait(); }, [this] { shared_.check_progress(*watch_); });
    if (empty == nullptr) return std::unexpected(shared_.error.get());
    open_ = empty;
    return {};
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

  // On the way of every page, so they say only yes or no; refusal() makes the Error.
  bool is_open() const noexcept { return !shared_.error.failed() && !finished_; }
  bool fits(BlockId block, std::uint64_t offset, std::uint64_t bytes) const noexcept {
    if (!shared_.map.contains(block)) return false;
    const std::uint64_t there = shared_.map.block(block).bytes;
    return ((offset | bytes) & (page_bytes() - 1)) == 0 && bytes <= there && offset <= there - bytes;
  }
  [[gnu::noinline, gnu::cold]] Error refusal(BlockId block, std::uint64_t offset) const noexcept {
    if (shared_.error.failed()) return shared_.error.get();
    if (finished_) return {.code = Errc::already_closed, .stage = Stage::produce};
    if (!shared_.map.contains(block))
      return {.code = Errc::bad_range, .stage = Stage::produce, .op = "BlockId of another map", .detail = index(block)};
    const RamBlock& there = shared_.map.block(block);
    return fail(Errc::bad_range, Stage::produce, "range", offset, there.bytes, there.idstr).error();
  }

  std::size_t page_bytes() const noexcept { return page_bytes_; }

  SendShared& shared_;
  const std::size_t page_bytes_;  ///< the map's, nearer
  const Z& zero_;
  [[no_unique_address]] ProducerChecksOfBuild checks_;
  PageBatch* open_ = nullptr;
  bool unsynced_ = false;  ///< the open epoch has pages, counting zero pages that the caller took
  bool finished_ = false;
  std::optional<std::chrono::steady_clock::time_point> waiting_since_;
  std::optional<ProgressWatch> watch_;  ///< of the last wait
};

}  // namespace multifd::engine
