// SPDX-License-Identifier: MIT
//
// What a LazyMemory is told, and what it tells.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "multifd/options.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy {

/// Where a LazyMemory stands.
enum class LazyMemoryStatus : std::uint8_t {
  opened,     ///< faults wait: start() comes
  active,     ///< pages come
  paused,     ///< all fetchers were lost; the guest runs on what it has. That a lane is lost shows at the next fault
  complete,   ///< all pages are there; the userfaultfd has let go of the memory
  failed,     ///< no page comes any more: threads of the guest that wait for one do so until the guest is ended
  cancelled,  ///< as failed, by cancel()
};

constexpr std::string_view to_string(LazyMemoryStatus status) noexcept {
  constexpr std::string_view names[] = {"opened", "active", "paused", "complete", "failed", "cancelled"};
  return names[static_cast<std::size_t>(status)];
}

/// A change of the status.
struct LazyMemoryEvent {
  LazyMemoryStatus status{};
  const Error* error = nullptr;  ///< paused, failed, cancelled: why; valid during the call
};
/// Called at each change behind start(), one call at a time, in their order, by a thread of the LazyMemory or the one that
/// calls cancel(). Must return soon, must not throw, and must not call the LazyMemory.
using LazyMemoryHook = std::function<void(const LazyMemoryEvent&)>;

/// Who registers the regions with the userfaultfd.
enum class RegionRegistration : std::uint8_t {
  here,        ///< LazyMemory::open()
  by_the_vmm,  ///< the process that handed the descriptor over has done so
};

struct LazyMemoryOptions {
  unsigned fault_threads = 1;  ///< that read faults, 1 to 64; with urgent_lane each has a fetcher of its own
  unsigned workers =
      2;  ///< that fetch the rest in the background, 0 to 64, each with a fetcher; 0: only what is asked for
  bool urgent_lane =
      true;  ///< fault threads fetch themselves, FetchKind::urgent; without, workers do; needs workers then
  /// Added to the workers' niceness, 0 to 19, so that they leave processors to the guest and to fault threads. With 10 on two
  /// busy processors a touch's p99 was 35 to 190 us instead of 2.8 to 11 ms; all pages were there after twice the time.
  unsigned worker_nice = 10;
  /// How many pages behind a fault come before the rest; 0: none. Apart from these, a fault thread places what its fetching has
  /// brought near (PageFetcher::fetched_together()): a frame of a compressed image.
  unsigned neighbours = 32;
  /// What an earlier run needed, in that order: comes before the rest; zero pages, too.
  std::vector<PageRange> prefetch{};
  /// Note the order of faults for recorded(); 8 bytes a page at most. What a fault's fetching brings near is not placed with it
  /// then, because a page that is there causes no fault: more faults while it is on.
  bool record = false;
  /// Which pages are missing, by block: bit i % 64 of word i / 64 stands for page i of the store's size. A block that is
  /// not there, and one without words: all of its pages. A unit is fetched whole when one of its pages is missing.
  std::vector<std::vector<std::uint64_t>> missing{};
  RegionRegistration registration = RegionRegistration::here;  ///< a VMM of another process may have registered them
  int pidfd =
      -1;  ///< of the process whose memory it is (pidfd_open), not owned: its end is noticed at once; -1: at the next page
  ThreadHook thread_hook{};   ///< roles "fault", "page" and "lazy"
  LazyMemoryHook on_event{};  ///< told of each change of the status
};

/// Counters. Of different threads they may be some pages apart.
struct LazyMemoryStats {
  std::uint64_t faults = 0;            ///< that were read from the userfaultfd
  std::uint64_t faults_fetched = 0;    ///< of these: the page had to be fetched first
  std::uint64_t faults_zero = 0;       ///< the page was known to be zero
  std::uint64_t faults_there = 0;      ///< the page was there already
  std::uint64_t urgent_pages = 0;      ///< placed by fault threads, because a fault waited
  std::uint64_t background_pages = 0;  ///< placed by workers, and by fault threads behind a fault's page
  std::uint64_t zero_pages = 0;        ///< found to be zero, which only a fault or the prefetch list places
  std::uint64_t removed_pages = 0;     ///< given back by the guest: zero from then on
  std::uint64_t twice = 0;             ///< pages that came again: a fault and a worker had asked for the same one
  std::uint64_t remaining_pages = 0;   ///< of which nothing is known yet
  std::uint64_t lost_fetchers = 0;     ///< that had to be opened anew
  std::uint64_t gate_waits = 0;        ///< times that a worker waited for urgent requests
  std::uint64_t gate_wait_ns = 0;      ///< how long, in all
};

}  // namespace multifd::postcopy
