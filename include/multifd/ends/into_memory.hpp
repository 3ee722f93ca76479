// SPDX-License-Identifier: MIT
//
// A receiver's pages go into the map's memory: a VMM's guest, or a mapped file.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "multifd/ends/page_sink.hpp"
#include "multifd/ends/populate_ahead.hpp"
#include "multifd/memory/received_pages.hpp"
#include "multifd/thread.hpp"
#include "multifd/zero/buffer_is_zero.hpp"

namespace multifd {

/// Writes pages to the map's memory. A model of PageSink. Most callers leave both settings alone.
struct IntoMemory {
  static constexpr bool writes_memory = true;

  /// What the memory holds before the first page arrives. `unknown` is right for every memory, and reads a place before
  /// it writes a zero page there, which makes holes of a file resident. `zeroed` neither reads nor writes a place to
  /// which no bytes have come, so that fresh memory stays untouched. Set it for memory that you have just mapped: on
  /// memory with other contents it leaves old bytes in the guest.
  DestinationMemory destination = DestinationMemory::unknown;

  /// Which threads take the page faults of fresh memory. With `off` the channels take them while they receive; with
  /// `ahead` one more thread takes them, at most 32 MiB ahead of the data. Set `ahead` when a core is idle and most
  /// pages hold data; leave it off for warm memory, and for sparse files.
  Populate populate = Populate::off;

  class Sink;
};

/// Threads: received, apply_zero(), apply_page() any; stop() the receiver's.
class IntoMemory::Sink {
 public:
  /// Places one channel's pages; has no memory of its own.
  class Channel {
   public:
    [[nodiscard]] static Result<Channel> create(Sink& sink) noexcept { return Channel(sink); }

    [[nodiscard]] Result<void> place(const ArrivingPages& pages, PageRuns& runs) noexcept {
      const RamMap& map = sink_->map_;
      const std::size_t page_bytes = map.page_bytes();
      for (std::size_t first = 0; first < pages.offsets.size();) {  // adjacent pages, which most are, in one step
        const std::size_t last = first < pages.normal_pages ? pages.normal_pages : pages.offsets.size();
        const std::size_t count = adjacent_pages(pages.offsets.subspan(first, last - first), page_bytes);
        const auto run = map.resolve(pages.block, pages.offsets[first], count);
        if (!run) return std::unexpected(run.error());
        if (first < pages.normal_pages) runs.add(run->data(), run->size());
        first += count;
      }
      return {};
    }

    void begin(const ArrivingPages& pages) noexcept {
      // Zero pages first, as QEMU does (format/packets.md section 5.2).
      std::span<const std::uint64_t> zeros = pages.zeros();
      while (!zeros.empty()) {
        const std::size_t count = adjacent_pages(zeros, sink_->map_.page_bytes());
        sink_->zero(pages.block, zeros.front(), count);
        zeros = zeros.subspan(count);
      }
      mark(sink_->touched_, pages);
      if (sink_->populate_ && pages.normal_pages > 0)
        sink_->populate_->note(pages.block, pages.normal().back(), pages.normal_pages);
    }

    [[nodiscard]] Result<void> arrived(const ArrivingPages& pages) noexcept {
      mark(sink_->received_, pages);
      return {};
    }

   private:
    explicit Channel(Sink& sink) noexcept : sink_(&sink) {}

    /// Marks the normal pages, by the runs that place() has made of them.
    void mark(ReceivedPages& in, const ArrivingPages& pages) const noexcept {
      const RamMap& map = sink_->map_;
      const std::byte* const host = map.block(pages.block).host.data();
      for (const iovec& run : pages.runs)
        in.set(pages.block, static_cast<std::uint64_t>(static_cast<const std::byte*>(run.iov_base) - host),
               run.iov_len / map.page_bytes());
    }

    Sink* sink_;
  };

  /// Params: `map`: must outlive the sink. Errors: ENOMEM; threads.
  [[nodiscard]] static Result<std::unique_ptr<Sink>> create(const RamMap& map, const IntoMemory& settings,
                                                            const ThreadHook& hook) {
    std::unique_ptr<Sink> sink(new Sink(map, settings.destination));
    for (ReceivedPages* const pages : {&sink->received_, &sink->touched_}) {
      auto bitmaps = ReceivedPages::create(map);
      if (!bitmaps) return std::unexpected(bitmaps.error());
      *pages = std::move(*bitmaps);
    }
    if (settings.populate == Populate::off) return sink;
    auto populate = PopulateAhead::create(map);
    if (!populate) return std::unexpected(populate.error());
    sink->populate_ = std::move(*populate);
    auto thread = Thread::start(*sink->populate_, hook, {.role = "populate", .channel = 0});
    if (!thread) return std::unexpected(thread.error());
    sink->populating_ = std::move(*thread);
    return sink;
  }

  Sink(const Sink&) = delete;
  Sink& operator=(const Sink&) = delete;
  ~Sink() { stop(); }

  /// Ends the helper thread.
  void stop() noexcept {
    if (populate_) populate_->stop();
    populating_.join();
  }

  /// Writes adjacent zero pages. Errors: Errc::offset_misaligned, offset_past_block: the numbers may be the peer's.
  [[nodiscard]] Result<void> apply_zero(BlockId block, std::uint64_t offset, std::size_t pages = 1) noexcept {
    if (auto run = map_.resolve(block, offset, pages); !run) return std::unexpected(run.error());
    zero(block, offset, pages);
    return {};
  }

  /// Writes one page's bytes. Errors: as apply_zero(); Errc::bad_range when `bytes` is not one page.
  [[nodiscard]] Result<void> apply_page(BlockId block, std::uint64_t offset,
                                        std::span<const std::byte> bytes) noexcept {
    const auto page = map_.resolve(block, offset);
    if (!page) return std::unexpected(page.error());
    if (bytes.size() != page->size())
      return fail(Errc::bad_range, Stage::parse, "page", bytes.size(), page->size(), map_.block(block).idstr);
    touched_.set(block, offset, 1);
    std::memcpy(page->data(), bytes.data(), bytes.size());
    received_.set(block, offset, 1);
    return {};
  }

  const ReceivedPages& received() const noexcept { return received_; }
  const ReceivedPages& touched() const noexcept { return touched_; }
  std::uint64_t zeros_written() const noexcept { return zeros_written_.load(std::memory_order_relaxed); }

 private:
  Sink(const RamMap& map, DestinationMemory destination) noexcept : map_(map), destination_(destination) {}

  /// Makes adjacent pages zero, whose offsets have been checked.
  void zero(BlockId block, std::uint64_t offset, std::size_t pages) noexcept {
    const std::size_t page_bytes = map_.page_bytes();
    std::byte* page = map_.block(block).host.data() + offset;
    // Where no bytes have come, fresh memory is still zero, and a read would make a hole of a file resident.
    const bool untouched = destination_ == DestinationMemory::zeroed && !touched_.any(block, offset, pages);
    for (std::size_t i = 0; i < pages && !untouched; ++i, page += page_bytes) {
      if (destination_ == DestinationMemory::zeroed && !touched_.test(block, offset + i * page_bytes)) continue;
      if (buffer_is_zero(page, page_bytes)) continue;  // reading is cheaper than dirtying, on memory and on files
      std::memset(page, 0, page_bytes);
      zeros_written_.fetch_add(1, std::memory_order_relaxed);
    }
    received_.set(block, offset, pages);  // last: who sees the mark finds the zeros
  }

  const RamMap& map_;
  const DestinationMemory destination_;
  ReceivedPages received_;  ///< pages that have arrived, as bytes or as zero pages
  ReceivedPages touched_;   ///< pages whose bytes have arrived or are arriving
  std::atomic<std::uint64_t> zeros_written_{0};
  std::unique_ptr<PopulateAhead> populate_;  ///< with Populate::ahead
  Thread populating_;
};

}  // namespace multifd
