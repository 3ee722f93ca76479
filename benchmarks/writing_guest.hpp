// SPDX-License-Identifier: MIT
//
// A guest that goes on writing, for benchmarks of whole migrations over loopback.
#pragma once

#include <fmt/format.h>

#include <multifd/migrate/destination.hpp>
#include <multifd/migrate/dirty/dirty_pages.hpp>
#include <multifd/migrate/source.hpp>
#include <multifd/multifd.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

namespace bench {

using namespace multifd;
using namespace multifd::migrate;

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

[[noreturn]] inline void give_up(const Error& error) {
  fmt::print(stderr, "{}\n", describe(error));
  std::exit(1);
}

template <class T>
T need(Result<T> result) {
  if (!result) give_up(result.error());
  return std::move(*result);
}

/// DirtyPages whose bitmaps take long to fetch, as KVM's of a large guest do.
class SlowPages {
 public:
  SlowPages(const RamMap& ram, std::chrono::milliseconds fetch)
      : pages_(need(DirtyPages::create(ram))), fetch_(fetch) {}

  static constexpr DirtyFetch fetches = DirtyPages::fetches;
  Result<void> start() noexcept { return pages_.start(); }
  Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    auto fetched = pages_.fetch(block, bitmap);
    if (fetch_.count() > 0) std::this_thread::sleep_for(fetch_);
    return fetched;
  }
  Result<void> rearm(BlockId block, std::uint64_t first_page, std::span<const std::uint64_t> bitmap) noexcept {
    return pages_.rearm(block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return pages_.needs_rearm(); }
  Result<void> stop() noexcept { return pages_.stop(); }
  std::size_t page_bytes() const noexcept { return pages_.page_bytes(); }
  void mark(BlockId block, std::uint64_t offset, std::uint64_t bytes) noexcept { pages_.mark(block, offset, bytes); }

 private:
  DirtyPages pages_;
  std::chrono::milliseconds fetch_;
};

/// A guest of random bytes, at either end.
class WritingGuest {
 public:
  struct Options {
    std::size_t bytes = 0;
    std::size_t working_set = 0;         ///< bytes of it that are written again and again
    bool equal = false;                  ///< what is written is what is there
    std::chrono::milliseconds fetch{0};  ///< what fetching the dirty bitmap takes
  };
  explicit WritingGuest(const Options& options)
      : memory_(options.bytes), dirty_(ram_, options.fetch), pages_(options.working_set / page), equal_(options.equal) {
    std::mt19937_64 random(1);
    for (std::size_t at = 0; at < memory_.size(); at += 8) {
      const std::uint64_t word = random();
      std::memcpy(&memory_[at], &word, 8);
    }
  }

  Result<RamMap> ram() { return ram_; }
  SlowPages& dirty_source() { return dirty_; }
  Result<void> pause() {
    vcpu_ = {};
    return {};
  }
  Result<void> resume() {
    vcpu_ = std::jthread([this](const std::stop_token& stop) { write(stop); });
    return {};
  }
  Result<void> save(StateWriter& to) { return to.device({.idstr = "vcpu"}, {}); }
  Result<RamMap> prepare(const Announcement&) { return ram_; }
  Result<void> load(StateReader& from) {
    while (true) {
      MULTIFD_TRY_ASSIGN(const auto device, from.next());
      if (!device) return {};
    }
  }

 private:
  static constexpr std::size_t page = 4096;

  /// Goes over the working set, a page in each 2 us, which leaves the cores to the migration.
  void write(const std::stop_token& stop) {
    auto due = std::chrono::steady_clock::now();
    for (std::uint64_t number = 0; !stop.stop_requested(); ++number) {
      if (number % 512 == 0) std::this_thread::sleep_until(due += std::chrono::milliseconds(1));
      const std::size_t at = number % pages_ * page;
      std::atomic_ref word(*reinterpret_cast<std::uint64_t*>(&memory_[at]));
      word.store(equal_ ? word.load(std::memory_order_relaxed) : number, std::memory_order_relaxed);
      dirty_.mark(BlockId{0}, at, 8);
    }
  }

  std::vector<std::byte> memory_;
  RamMap ram_{page};
  BlockId block_ = need(ram_.add("pc.ram", memory_));
  SlowPages dirty_;
  std::size_t pages_;
  bool equal_;
  std::jthread vcpu_;
};

/// Migrates it to a second one like it, in this process.
inline MigrationReport move_guest(WritingGuest& here, WritingGuest& there, const SourceOptions& options) {
  Listener listener = need(Listener::listen({.host = "127.0.0.1"}));
  Result<ArrivalReport> taken = fail(Errc::cancelled, Stage::none);
  static_cast<void>(here.resume());
  MigrationReport moved = [&] {
    const std::jthread destination([&] { taken = migrate_from<Stacks>(there, listener); });
    return need(migrate_to<Stacks>(here, listener.local_address(), options));
  }();
  if (!taken) give_up(taken.error());
  static_cast<void>(there.pause());
  return moved;
}

inline double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

}  // namespace bench
