// SPDX-License-Identifier: MIT
//
// The paths of one migration at its source: how its connections are made, over which path each channel goes, and what has
// passed there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/migrate/resume_options.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/capped.hpp"
#include "multifd/transport/connect_paths.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/path.hpp"

namespace multifd::migrate::detail {

/// Params `T`: a Capped. Threads: dial(), joined(), lost(), progress(), set_bandwidth() any; the others the migration's,
/// before there are others.
template <class T>
class PathSet {
 public:
  /// Makes one more connection of a path.
  using Dial = std::function<Result<T>(std::size_t path, const std::shared_ptr<PathShared>& shared, const Interrupt&)>;

  /// Params `paths`: with the caps. `dial`: called by several threads at once; returns soon when the Interrupt is triggered;
  /// may be empty.
  PathSet(std::span<const Path> paths, Dial dial) : dial_(std::move(dial)) {
    for (const Path& path : paths) {
      Entry& entry = entries_.emplace_back();
      entry.shared = std::make_shared<PathShared>(path.bandwidth);
      entry.name = std::string(subject_of(path).view());
    }
  }

  std::size_t count() const noexcept { return entries_.size(); }
  const std::shared_ptr<PathShared>& shared(std::size_t path) const noexcept { return entries_[path].shared; }
  bool can_dial() const noexcept { return static_cast<bool>(dial_); }

  /// The next channel goes over that path.
  void add_channel(std::size_t path) {
    const std::lock_guard held(mutex_);
    path_of_.push_back(path);
    ++entries_[path].channels;
    ++entries_[path].connected;
  }
  void leave_out(std::size_t path) {
    const std::lock_guard held(mutex_);
    entries_[path].left_out = true;
  }
  void set_main_path(std::size_t path) noexcept { main_path_ = path; }
  std::size_t main_path() const noexcept { return main_path_; }
  unsigned channels() const noexcept { return static_cast<unsigned>(path_of_.size()); }
  std::size_t path_of(unsigned channel) const noexcept { return path_of_[channel]; }

  void lost(unsigned channel) noexcept {
    const std::lock_guard held(mutex_);
    --entries_[path_of_[channel]].connected;
    ++entries_[path_of_[channel]].lost;
  }
  void joined(unsigned channel) noexcept {
    const std::lock_guard held(mutex_);
    ++entries_[path_of_[channel]].connected;
  }

  /// Paths in the order in which a main connection is tried: those that carry channels first.
  std::vector<std::size_t> best_first() const {
    const std::lock_guard held(mutex_);
    std::vector<std::size_t> order(entries_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::sort(order, {}, [this](std::size_t path) { return std::pair(entries_[path].connected == 0, path); });
    return order;
  }
  [[nodiscard]] Result<T> dial(std::size_t path, const Interrupt& interrupt) {
    return dial_(path, entries_[path].shared, interrupt);
  }
  /// The same over one path after the other.
  [[nodiscard]] Result<T> dial_any(const Interrupt& interrupt) {
    const std::size_t first = next_.fetch_add(1, std::memory_order_relaxed);
    Result<T> link = fail(Errc::bad_option, Stage::connect, "no path");
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      link = dial((first + i) % entries_.size(), interrupt);
      if (link || link.error().code == Errc::cancelled) break;
    }
    return link;
  }

  std::vector<PathProgress> progress() const {
    const std::lock_guard held(mutex_);
    std::vector<PathProgress> now;
    for (const Entry& each : entries_)
      now.push_back({.name = each.name,
                     .channels = each.channels,
                     .connected = each.connected,
                     .read_bytes = each.shared->read_bytes(),
                     .written_bytes = each.shared->written_bytes(),
                     .bandwidth = each.shared->rate(),
                     .lost = each.lost,
                     .left_out = each.left_out});
    return now;
  }
  void set_bandwidth(std::size_t path, std::uint64_t bytes_per_s) noexcept {
    if (path < entries_.size()) entries_[path].shared->set_rate(bytes_per_s);
  }

 private:
  struct Entry {
    std::shared_ptr<PathShared> shared;
    std::string name;
    unsigned channels = 0;
    unsigned connected = 0;
    std::uint64_t lost = 0;
    bool left_out = false;
  };

  const Dial dial_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> path_of_;
  std::size_t main_path_ = 0;
  std::atomic<std::size_t> next_{0};
  mutable std::mutex mutex_;  ///< of the entries' numbers
};

}  // namespace multifd::migrate::detail
