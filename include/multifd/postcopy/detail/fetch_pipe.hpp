// SPDX-License-Identifier: MIT
//
// The requests of one thread to its fetcher: jobs cut into requests, answers checked and put together again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/postcopy/detail/fetch_plan.hpp"
#include "multifd/postcopy/detail/lazy_layout.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy::detail {

/// A fetcher that one thread uses, and any thread may cancel.
class FetcherSlot {
 public:
  /// Puts one in, cancelled if everything is. Threads: any.
  void put(std::unique_ptr<PageFetcher> fetcher) noexcept {
    const std::lock_guard held(mutex_);
    if (cancelled_) fetcher->cancel();
    fetcher_ = std::move(fetcher);
  }
  /// Threads: the one that uses it, this and the next.
  PageFetcher* get() const noexcept {
    const std::lock_guard held(mutex_);
    return fetcher_.get();
  }
  void drop() noexcept {
    std::unique_ptr<PageFetcher> dropped;
    const std::lock_guard held(mutex_);
    dropped = std::move(fetcher_);
  }
  /// Now and later. Threads: any.
  void cancel() noexcept {
    const std::lock_guard held(mutex_);
    cancelled_ = true;
    if (fetcher_) fetcher_->cancel();
  }

 private:
  mutable std::mutex mutex_;
  std::unique_ptr<PageFetcher> fetcher_;
  bool cancelled_ = false;
};

/// What came for a job. Valid until the next call of the pipe.
struct FetchAnswer {
  FetchJob job;
  std::span<const std::uint64_t> offsets{};  ///< as FetchedPages::offsets, in the block
  std::span<const std::byte> bytes{};
};

/// Threads: one.
class FetchPipe {
 public:
  /// Errors: ENOMEM. Cost: where a unit is larger than a request, one unit and its offsets.
  [[nodiscard]] static Result<FetchPipe> create(const LazyLayout& layout, std::size_t page_bytes) {
    return catch_bad_alloc(Stage::setup, "allocate requests", [&]() -> Result<FetchPipe> {
      FetchPipe pipe(layout, page_bytes);
      pipe.asked_.reserve(most_window);
      if (layout.largest_unit() > batch_bytes) {
        pipe.offsets_.reserve(layout.largest_unit() / page_bytes);
        pipe.bytes_ = std::make_unique_for_overwrite<std::byte[]>(layout.largest_unit());
      }
      return pipe;
    });
  }

  bool empty() const noexcept { return asked_.empty() && !cut_; }
  /// Whether ask() has room for another job.
  bool has_room(const PageFetcher& fetcher) const noexcept {
    return !cut_ && asked_.size() < std::clamp<std::size_t>(fetcher.window(), 1, most_window);
  }

  /// Asks for a job's pages; where they are several requests, for as many as there is room for. A job with an error behind it
  /// is in drain(), too.
  [[nodiscard]] Result<void> ask(PageFetcher& fetcher, const FetchJob& job) {
    cut_ = job;
    cut_at_ = 0;
    return go_on(fetcher);
  }

  /// Waits for the oldest request's pages. Returns nothing when the job has further ones.
  /// Errors: of the fetcher; Errc::unasked_pages.
  [[nodiscard]] Result<std::optional<FetchAnswer>> take(PageFetcher& fetcher) {
    // Ahead of the answer, which is valid until the fetcher is called again, and lost if asking fails.
    MULTIFD_TRY(go_on(fetcher));
    const Asked oldest = asked_.front();
    MULTIFD_TRY_ASSIGN(const FetchedPages pages, fetcher.take());
    MULTIFD_TRY(check(oldest.range, pages));
    asked_.erase(asked_.begin());  // few
    if (oldest.first && oldest.last) return FetchAnswer{oldest.job, pages.offsets, pages.bytes};
    if (oldest.first) offsets_.clear(), used_ = 0;
    offsets_.insert(offsets_.end(), pages.offsets.begin(), pages.offsets.end());
    std::memcpy(bytes_.get() + used_, pages.bytes.data(), pages.bytes.size());
    used_ += pages.bytes.size();
    if (oldest.last) return FetchAnswer{oldest.job, offsets_, {bytes_.get(), used_}};
    return std::nullopt;
  }

  /// Forgets all jobs, behind an error. Calls `visit(job)` once for each.
  template <class Visit>
  void drain(Visit&& visit) {
    for (const Asked& each : asked_)
      if (each.last) visit(each.job);
    asked_.clear();
    if (cut_) visit(*std::exchange(cut_, std::nullopt));
  }

 private:
  /// However many a fetcher would take.
  static constexpr std::size_t most_window = 64;

  struct Asked {
    FetchJob job;
    PageRange range;
    bool first;  ///< of the job's requests
    bool last;
  };

  FetchPipe(const LazyLayout& layout, std::size_t page_bytes) noexcept : layout_(&layout), page_bytes_(page_bytes) {}

  /// Asks for more of the job that is not asked for whole.
  [[nodiscard]] Result<void> go_on(PageFetcher& fetcher) {
    const std::size_t window = std::clamp<std::size_t>(fetcher.window(), 1, most_window);
    while (cut_ && asked_.size() < window) {
      const PageRange all = layout_->part_of(cut_->run.first).range(cut_->run);
      const PageRange range{all.block, all.offset + cut_at_, std::min<std::uint64_t>(batch_bytes, all.bytes - cut_at_)};
      MULTIFD_TRY(fetcher.ask(range));
      const bool first = cut_at_ == 0;
      cut_at_ += range.bytes;
      const bool last = cut_at_ == all.bytes;
      asked_.push_back({*cut_, range, first, last});
      if (last) cut_.reset();
    }
    return {};
  }

  [[nodiscard]] Result<void> check(const PageRange& asked, const FetchedPages& pages) const noexcept {
    const auto wrong = [&](std::uint64_t offset) {
      return fail(Errc::unasked_pages, Stage::read, "fetched pages", offset, asked.offset);
    };
    if (pages.range != asked) return wrong(pages.range.offset);
    if (pages.bytes.size() != pages.offsets.size() * page_bytes_) return wrong(pages.bytes.size());
    std::uint64_t least = asked.offset;
    for (const std::uint64_t offset : pages.offsets) {
      if (offset < least || offset >= asked.end() || offset % page_bytes_ != 0) return wrong(offset);
      least = offset + page_bytes_;
    }
    return {};
  }

  const LazyLayout* layout_;
  std::size_t page_bytes_;
  std::vector<Asked> asked_;
  std::optional<FetchJob> cut_;  ///< a job that is asked for in part
  std::uint64_t cut_at_ = 0;     ///< how many bytes of it
  std::vector<std::uint64_t> offsets_;
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t used_ = 0;
};

}  // namespace multifd::postcopy::detail
