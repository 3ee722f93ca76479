// SPDX-License-Identifier: MIT
//
// Where the pages of a guest come from that runs before they are there: an image, a page server, memory of this process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "multifd/memory/ram_block.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy {

/// Adjacent pages of one RAM block: whole pages, at least one, at most batch_bytes.
struct PageRange {
  BlockId block{};
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;

  std::uint64_t end() const noexcept { return offset + bytes; }
  friend bool operator==(const PageRange&, const PageRange&) = default;
};

/// The answer to one request. Valid until the next call of the fetcher.
struct FetchedPages {
  PageRange range;                           ///< as it was asked for
  std::span<const std::uint64_t> offsets{};  ///< of the pages that are not zero, ascending; the range's others are zero
  std::span<const std::byte> bytes{};        ///< those pages, one after the other
};

/// Fetches pages for one thread.
///
/// The order of calls: ask() up to window() times, then take() for each, in the order of asking; more may be asked for in
/// between. Behind an error nothing but the destructor.
///
/// Threads: one; cancel() any.
/// Errors: what PageStore::may_return() says can be mended by another fetcher; all else is final.
class PageFetcher {
 public:
  PageFetcher() = default;
  PageFetcher(const PageFetcher&) = delete;
  PageFetcher& operator=(const PageFetcher&) = delete;
  virtual ~PageFetcher() = default;

  /// How many requests may be without an answer: 1 where nothing is gained by more.
  virtual unsigned window() const noexcept = 0;

  /// Asks for pages. Params `range`: inside of a block of the store (contract).
  [[nodiscard]] Result<void> ask(const PageRange& range) noexcept { return do_ask(range); }
  /// Waits for the oldest request's pages.
  [[nodiscard]] Result<FetchedPages> take() noexcept { return do_take(); }

  /// The pages around one that are best fetched behind it, at most batch_bytes with it: asked for next, they cost a copy of what
  /// was decompressed for it, or a read that takes little longer than the page's. A range of that page alone: none.
  /// Params: `page`: that take() has returned last (contract).
  virtual PageRange fetched_together(const PageRange& page) const noexcept { return page; }

  /// Makes ask() and take() return Errc::cancelled, now and later.
  virtual void cancel() noexcept = 0;

 private:
  [[nodiscard]] virtual Result<void> do_ask(const PageRange& range) noexcept = 0;
  [[nodiscard]] virtual Result<FetchedPages> do_take() noexcept = 0;
};

/// What a fetcher is for.
enum class FetchKind : std::uint8_t {
  urgent,      ///< single pages that a thread of the guest waits for: nothing of the background may be in front of them
  background,  ///< all the others
};

/// A RAM block as a store has it.
struct StoreBlock {
  std::string idstr;
  std::uint64_t bytes = 0;
};

/// Where pages come from. A base class and not a policy: each call moves many pages, and only at run time a program learns
/// which store it is.
///
/// Threads: any, all calls.
/// Lifetime: the destructor waits for nothing; no call may be under way, and no fetcher be left.
/// Models: GuestPages (memory of this process), ImagePages (files), RemotePages (a PageServer elsewhere).
class PageStore {
 public:
  PageStore() = default;
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;
  virtual ~PageStore() = default;

  /// In the order of their BlockIds; does not change.
  virtual std::span<const StoreBlock> blocks() const noexcept = 0;
  virtual std::size_t page_bytes() const noexcept = 0;

  /// Makes a fetcher. May block, for as long as no connection can be had; cancel() ends that.
  /// Errors: Errc::cancelled; those of the store: errno, of files and connections. Cost: buffers of some MiB; a connection.
  [[nodiscard]] Result<std::unique_ptr<PageFetcher>> open(FetchKind kind) noexcept { return do_open(kind); }
  /// Whether another fetcher may succeed where one has returned `error`: a lost connection.
  virtual bool may_return(const Error& error) const noexcept = 0;
  /// Makes open() return Errc::cancelled, now and later. Fetchers have their own cancel().
  virtual void cancel() noexcept = 0;

 private:
  [[nodiscard]] virtual Result<std::unique_ptr<PageFetcher>> do_open(FetchKind kind) noexcept = 0;
};

}  // namespace multifd::postcopy
