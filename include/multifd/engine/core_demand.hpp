// SPDX-License-Identifier: MIT
//
// How many cores the workers would use if each got one whenever it wants one. When that demand exceeds the machine's
// cores, workers only take turns, and every context switch costs time: then no more workers than cores should be awake.
// A worker that blocks on its link wants no core. On slow links the demand therefore stays low, and all channels are
// used.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <thread>
#include <utility>

#include "multifd/config.hpp"

namespace multifd::engine {

/// Threads: sample() by each worker with its own Probe; the rest by any.
/// Cost: with no more workers than cores nothing is measured and no file is opened.
class CoreDemand {
 public:
  /// `cores`: how many this process may use.
  explicit CoreDemand(unsigned workers, unsigned cores = std::thread::hardware_concurrency()) noexcept
      : workers_(workers),
        cores_(std::max(cores, 1u)),
        watching_(workers > cores_),
        limit_(std::min(workers, cores_)) {}

  /// One worker's measurement of the core time that it wants.
  class Probe {
   public:
    Probe() = default;
    Probe(const Probe&) = delete;
    Probe& operator=(const Probe&) = delete;
    ~Probe() {
      if (file_ >= 0) ::close(file_);
    }

   private:
    friend class CoreDemand;
    /// Time on a core and in the queue for one, since the last call; 0 where the kernel does not say (no /proc).
    std::int64_t wanted_ns() noexcept {
      if (file_ == not_open) file_ = ::open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
      std::array<char, 80> text;
      const ssize_t length = file_ < 0 ? -1 : ::pread(file_, text.data(), text.size(), 0);
      std::int64_t ran = 0;
      std::int64_t queued = 0;
      const char* const end = text.data() + std::max<ssize_t>(length, 0);
      const auto first = std::from_chars(text.data(), end, ran);
      if (first.ec != std::errc{} || first.ptr == end) return 0;
      if (std::from_chars(first.ptr + 1, end, queued).ec != std::errc{}) return 0;
      return ran + queued - std::exchange(seen_ns_, ran + queued);
    }
    static constexpr int not_open = -2;
    int file_ = not_open;
    std::int64_t due_ns_ = 0;
    std::int64_t seen_ns_ = 0;
  };

  /// How many workers may be awake for batches. The limit starts at the number of cores. While the workers wait for
  /// their links, it doubles about every 10 ms, until it allows all workers.
  unsigned limit() const noexcept { return limit_.load(std::memory_order_relaxed); }

  /// Measures. Called by a worker before each batch and after each rest.
  ///
  /// Cost: one reading of the clock; every 4 ms also one of /proc/thread-self/schedstat (1 us).
  void sample(Probe& mine) noexcept {
    if (!watching_) return;
    const std::int64_t now = now_ns();
    if (now < mine.due_ns_) return;
    mine.due_ns_ = now + probe_ns;
    wanted_ns_.fetch_add(mine.wanted_ns(), std::memory_order_relaxed);
    std::int64_t began = began_ns_.load(std::memory_order_relaxed);
    if (now - began < window_ns || !began_ns_.compare_exchange_strong(began, now, std::memory_order_relaxed)) return;
    const std::int64_t demand = wanted_ns_.exchange(0, std::memory_order_relaxed);
    const std::int64_t supply = (now - began) * cores_;
    limit_.store(next_limit(limit_.load(std::memory_order_relaxed), demand, supply), std::memory_order_relaxed);
  }

 private:
  static std::int64_t now_ns() noexcept { return std::chrono::steady_clock::now().time_since_epoch().count(); }

  /// The limit for the next window. `demand`: the core time that the workers wanted; `supply`: what the cores offered.
  ///
  /// Demand above 120 % of the supply: halves the surplus over the number of cores, because every surplus worker costs.
  /// Below 50 %: doubles the limit, because most workers wait for their links. Below 80 %: adds one worker, and only
  /// one, because the cores are nearly used up.
  unsigned next_limit(unsigned limit, std::int64_t demand, std::int64_t supply) const noexcept {
    if (5 * demand > 6 * supply) return limit - (limit - cores_ + 1) / 2;
    if (2 * demand < supply) return std::min(2 * limit, workers_);
    if (5 * demand < 4 * supply) return std::min(limit + 1, workers_);
    return limit;
  }

  static constexpr std::int64_t probe_ns = 4'000'000;
  static constexpr std::int64_t window_ns = 10'000'000;

  const unsigned workers_;
  const unsigned cores_;
  const bool watching_;
  alignas(cache_line) std::atomic<std::int64_t> wanted_ns_{0};
  std::atomic<std::int64_t> began_ns_{now_ns()};
  std::atomic<unsigned> limit_;
};

}  // namespace multifd::engine
