// SPDX-License-Identifier: MIT
//
// A PageStore whose pages are made up: each page's bytes follow from its block and offset, so that whoever reads a guest's
// memory knows what has to be there. Fetchers can be slow, be lost, and answer wrongly.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/postcopy/page_store.hpp"
#include "support/basics.hpp"

namespace test {

using multifd::BlockId;
using multifd::Errc;
using multifd::Error;
using multifd::Result;
using multifd::postcopy::FetchedPages;
using multifd::postcopy::FetchKind;
using multifd::postcopy::PageFetcher;
using multifd::postcopy::PageRange;
using multifd::postcopy::PageStore;
using multifd::postcopy::StoreBlock;

inline constexpr std::size_t page_size = 4096;

/// What decides a page's bytes: 0 of a zero page.
inline std::uint64_t word_of(std::uint32_t block, std::uint64_t page, unsigned zero_of) {
  const std::uint64_t mixed = (page + 1) * 0x9e37'79b9'7f4a'7c15u + block;
  if (zero_of != 0 && (mixed >> 32) % zero_of == 0) return 0;
  return mixed | 1;
}

class FakeStore : public PageStore {
 public:
  struct Options {
    unsigned zero_of = 4;  ///< every nth page, about, is zero; 0: none
    unsigned window = 4;
    std::chrono::microseconds slowest{0};  ///< an answer takes so long at most, at random
    std::uint64_t lost_after = 0;          ///< a fetcher is lost after about so many calls; 0: never
    std::chrono::microseconds no_open{0};  ///< open() takes so long
    std::function<void(std::vector<std::uint64_t>&, std::vector<std::byte>&, PageRange&)> spoil{};  ///< an answer
    std::error_code final_error{};  ///< of the fetcher, after `final_after` requests in all
    std::uint64_t final_after = 0;
    std::uint64_t together = 0;  ///< an urgent fetch brings near the aligned range of so many bytes
  };

  FakeStore(std::vector<std::uint64_t> block_bytes, Options wanted) : options(std::move(wanted)) {
    for (const std::uint64_t bytes : block_bytes) blocks_.push_back({"block" + std::to_string(blocks_.size()), bytes});
  }
  explicit FakeStore(std::vector<std::uint64_t> block_bytes) : FakeStore(std::move(block_bytes), Options{}) {}

  std::span<const StoreBlock> blocks() const noexcept override { return blocks_; }
  std::size_t page_bytes() const noexcept override { return page_size; }
  bool may_return(const Error& error) const noexcept override {
    return error.code == std::errc::connection_reset || error.code == std::errc::connection_refused;
  }
  void cancel() noexcept override {
    const std::lock_guard held(mutex_);
    cancelled_ = true;
    changed_.notify_all();
  }

  /// Holds all answers, or lets them go.
  void hold(bool held_back) {
    const std::lock_guard held(mutex_);
    held_back_ = held_back;
    changed_.notify_all();
  }
  void hold_background(bool held_back) {
    const std::lock_guard held(mutex_);
    background_held_back_ = held_back;
    changed_.notify_all();
  }
  /// While true, fetchers are lost at once, and none is to be had.
  void disconnect(bool gone) {
    const std::lock_guard held(mutex_);
    gone_ = gone;
    changed_.notify_all();
  }

  std::uint64_t word(std::uint32_t block, std::uint64_t page) const { return word_of(block, page, options.zero_of); }

  Options options;
  std::atomic<std::uint64_t> requests{0};
  std::atomic<std::uint64_t> urgent_requests{0};
  std::atomic<std::uint64_t> opened{0};
  std::atomic<std::uint64_t> lost{0};
  /// Asked for, in order, with the kind; guarded by the mutex.
  std::vector<std::pair<FetchKind, PageRange>> log() const {
    const std::lock_guard held(mutex_);
    return log_;
  }
  bool keep_log = false;

 private:
  class Fetcher : public PageFetcher {
   public:
    Fetcher(FakeStore& store, FetchKind kind) : store_(store), kind_(kind), rng_(seed() + store.opened.load()) {
      if (store_.options.lost_after != 0) calls_left_ = 1 + below(rng_, 2 * store_.options.lost_after);
      asked_.reserve(store_.options.window);
      offsets_.reserve(multifd::batch_bytes / page_size);
      bytes_.reserve(multifd::batch_bytes);
    }
    unsigned window() const noexcept override { return store_.options.window; }
    PageRange fetched_together(const PageRange& page) const noexcept override {
      const std::uint64_t bytes = store_.options.together;
      if (bytes == 0) return page;
      const std::uint64_t begin = page.offset / bytes * bytes;
      return {page.block, begin, std::min(bytes, store_.blocks_[index(page.block)].bytes - begin)};
    }
    void cancel() noexcept override {
      const std::lock_guard held(store_.mutex_);
      cancelled_ = true;
      store_.changed_.notify_all();
    }

   private:
    Result<void> call() {
      if (calls_left_ != 0 && --calls_left_ == 0) return lose();
      if (store_.options.final_after != 0 && store_.requests.load() > store_.options.final_after)
        return std::unexpected(Error{.code = store_.options.final_error, .op = "fake"});
      return {};
    }
    Result<void> lose() {
      ++store_.lost;
      return multifd::fail_errno(multifd::Stage::read, "fake", ECONNRESET);
    }
    Result<void> do_ask(const PageRange& range) noexcept override {
      REQUIRE(asked_.size() < window());
      REQUIRE(range.bytes > 0);
      REQUIRE(range.bytes <= multifd::batch_bytes);
      REQUIRE(range.end() <= store_.blocks_[index(range.block)].bytes);
      if (auto done = call(); !done) return done;
      asked_.push_back(range);
      if (store_.keep_log) {
        const std::lock_guard held(store_.mutex_);
        store_.log_.emplace_back(kind_, range);
      }
      // Last: a test that waits for the number finds the rest done.
      if (kind_ == FetchKind::urgent) ++store_.urgent_requests;
      ++store_.requests;
      return {};
    }
    Result<FetchedPages> do_take() noexcept override {
      REQUIRE(!asked_.empty());
      if (auto done = call(); !done) return std::unexpected(done.error());
      const auto slowest = store_.options.slowest.count();
      const auto end = std::chrono::steady_clock::now() +
                       std::chrono::microseconds(slowest == 0 ? 0 : below(rng_, static_cast<std::size_t>(slowest)));
      {
        std::unique_lock held(store_.mutex_);
        const auto ends = [&] { return cancelled_ || store_.gone_; };
        const auto held_back = [&] {
          return store_.held_back_ || (store_.background_held_back_ && kind_ == FetchKind::background);
        };
        while (!ends() && (held_back() || std::chrono::steady_clock::now() < end)) {
          if (held_back())
            store_.changed_.wait_for(held, 50ms);
          else
            store_.changed_.wait_until(held, end);
        }
        if (cancelled_) return multifd::fail(Errc::cancelled, multifd::Stage::read);
        if (store_.gone_) return std::unexpected(lose().error());
      }
      PageRange range = asked_.front();
      asked_.erase(asked_.begin());
      offsets_.clear();
      bytes_.clear();
      for (std::uint64_t offset = range.offset; offset < range.end(); offset += page_size) {
        const std::uint64_t word = store_.word(index(range.block), offset / page_size);
        if (word == 0) continue;
        offsets_.push_back(offset);
        const std::size_t at = bytes_.size();
        bytes_.resize(at + page_size);
        for (std::size_t i = 0; i < page_size; i += 8) std::memcpy(&bytes_[at + i], &word, 8);
      }
      if (store_.options.spoil) store_.options.spoil(offsets_, bytes_, range);
      return FetchedPages{range, offsets_, bytes_};
    }

    FakeStore& store_;
    const FetchKind kind_;
    Rng rng_;
    std::uint64_t calls_left_ = 0;
    bool cancelled_ = false;
    std::vector<PageRange> asked_;
    std::vector<std::uint64_t> offsets_;
    std::vector<std::byte> bytes_;
  };

  Result<std::unique_ptr<PageFetcher>> do_open(FetchKind kind) noexcept override {
    std::unique_lock held(mutex_);
    const auto end = std::chrono::steady_clock::now() + options.no_open;
    while (!cancelled_ && (gone_ || std::chrono::steady_clock::now() < end)) changed_.wait_for(held, 1ms);
    if (cancelled_) return multifd::fail(Errc::cancelled, multifd::Stage::connect);
    auto made = std::make_unique<Fetcher>(*this, kind);
    ++opened;
    return made;
  }

  std::vector<StoreBlock> blocks_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool cancelled_ = false;
  bool held_back_ = false;
  bool background_held_back_ = false;
  bool gone_ = false;
  std::vector<std::pair<FetchKind, PageRange>> log_;
};

}  // namespace test
