// SPDX-License-Identifier: MIT
//
// Reads this process's page tables, many pages at a time: by PAGEMAP_SCAN where the kernel has it (Linux 6.7), from the
// entries of /proc/self/pagemap elsewhere. No memory is read, mapped or made resident. For which memory the answers
// mean anything is decided in zero/detail/memory_areas.hpp.
#pragma once

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include "multifd/result.hpp"

namespace multifd {

/// How page tables are read.
enum class PagemapReading : std::uint8_t {
  best,     ///< PAGEMAP_SCAN, or the entries where the kernel is too old
  entries,  ///< always the entries: for tests of what older kernels get
};

namespace detail {

/// struct page_region and struct pm_scan_arg of linux/fs.h, which many systems have in an older version.
struct PagemapRegion {
  std::uint64_t begin, end, categories;
};
struct PagemapScan {
  std::uint64_t size = sizeof(PagemapScan);
  std::uint64_t flags = 0;
  std::uint64_t begin = 0, end = 0, walk_end = 0;
  std::uint64_t regions = 0, region_count = 0, max_pages = 0;
  std::uint64_t category_inverted = 0, category_mask = 0, category_anyof_mask = 0, return_mask = 0;
};
static_assert(sizeof(PagemapScan) == 96);
inline constexpr unsigned long pagemap_scan_request = _IOWR('f', 16, PagemapScan);
inline constexpr std::uint64_t pagemap_protect = 1u << 0;     // PM_SCAN_WP_MATCHING: write-protect what was found
inline constexpr std::uint64_t pagemap_only_async = 1u << 1;  // PM_SCAN_CHECK_WPASYNC: EPERM elsewhere
inline constexpr std::uint64_t page_is_written = 1u << 1;
inline constexpr std::uint64_t page_is_present = 1u << 3;
inline constexpr std::uint64_t page_is_swapped = 1u << 4;
inline constexpr std::uint64_t page_is_pfnzero = 1u << 5;

/// Threads: one at a time.
class Pagemap {
 public:
  /// Errors: errno of opening /proc/self/pagemap, which may be missing or not permitted.
  [[nodiscard]] static Result<Pagemap> open(PagemapReading reading) noexcept {
    Pagemap map;
    map.fd_ = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map.fd_ < 0) return fail_errno(Stage::setup, "open /proc/self/pagemap");
    map.can_scan_ = reading == PagemapReading::best;
    map.buffer_.reset(new (std::nothrow) Buffer);
    if (!map.buffer_) return fail_errno(Stage::setup, "allocate pagemap buffer", ENOMEM);
    return map;
  }
  Pagemap(Pagemap&& other) noexcept
      : fd_(std::exchange(other.fd_, -1)), can_scan_(other.can_scan_), buffer_(std::move(other.buffer_)) {}
  Pagemap& operator=(Pagemap&&) = delete;
  ~Pagemap() {
    if (fd_ >= 0) ::close(fd_);
  }

  /// Calls on_data(begin, end) for each run of pages that hold data, in order of addresses: pages that are present,
  /// swapped, or being swapped. The kernel's zero page, which a read maps, counts as no data; the entries cannot tell
  /// it from data.
  ///
  /// Params: `begin`, `end`: page aligned.
  template <class OnData>
  [[nodiscard]] Result<void> for_each_data(std::uintptr_t begin, std::uintptr_t end, OnData&& on_data) {
    return for_each(begin, end, page_is_present | page_is_swapped, on_data);
  }

  /// The same for those that are there alone: none that is swapped, or looks like it.
  template <class OnData>
  [[nodiscard]] Result<void> for_each_present(std::uintptr_t begin, std::uintptr_t end, OnData&& on_data) {
    return for_each(begin, end, page_is_present, on_data);
  }

  /// Calls on_written(begin, end) for each run of pages that were written since they were last protected, and
  /// write-protects them again: in one step for each page, so that no write falls between the two.
  ///
  /// Params: `begin`, `end`: page aligned; memory that a userfaultfd with WP_ASYNC watches.
  /// Errors: errno: EPERM when some of it is not watched, ENOTTY before Linux 6.7. What on_written got before is valid.
  template <class OnWritten>
  [[nodiscard]] Result<void> take_written(std::uintptr_t begin, std::uintptr_t end, OnWritten&& on_written) {
    // These masks and no others: the kernel then also counts a page as written that was discarded meanwhile.
    const int error = scan({.flags = pagemap_protect | pagemap_only_async,
                            .begin = begin,
                            .end = end,
                            .category_mask = page_is_written,
                            .return_mask = page_is_written},
                           on_written);
    if (error != 0) return fail_errno(Stage::none, "PAGEMAP_SCAN", error);
    return {};
  }

  /// Write-protects all pages that are there; a page that comes into being later counts as written. Params, Errors: as
  /// take_written().
  [[nodiscard]] Result<void> protect_written(std::uintptr_t begin, std::uintptr_t end) noexcept {
    PagemapScan all{.flags = pagemap_protect | pagemap_only_async,
                    .begin = begin,
                    .end = end,
                    .category_mask = page_is_written,
                    .return_mask = page_is_written};
    while (::ioctl(fd_, pagemap_scan_request, &all) < 0)
      if (errno != EINTR) return fail_errno(Stage::none, "PAGEMAP_SCAN");
    return {};
  }

 private:
  union Buffer {
    std::array<PagemapRegion, 4096> regions;
    std::array<std::uint64_t, 16384> entries;
  };

  Pagemap() = default;

  template <class OnData>
  [[nodiscard]] Result<void> for_each(std::uintptr_t begin, std::uintptr_t end, std::uint64_t any_of, OnData& on_data) {
    if (can_scan_) {
      const int error = scan({.begin = begin,
                              .end = end,
                              .category_inverted = page_is_pfnzero,
                              .category_mask = page_is_pfnzero,
                              .category_anyof_mask = any_of,
                              .return_mask = page_is_present},
                             on_data);
      if (error == 0) return {};
      // The errors by which older kernels, sandboxes and emulators refuse a request that they do not know.
      if (error != ENOTTY && error != EINVAL && error != ENOSYS) return fail_errno(Stage::setup, "PAGEMAP_SCAN", error);
      can_scan_ = false;
    }
    constexpr std::uint64_t entry_present = std::uint64_t{1} << 63, entry_swapped = std::uint64_t{1} << 62;
    return read_entries(begin, end, entry_present | ((any_of & page_is_swapped) != 0 ? entry_swapped : 0), on_data);
  }

  /// Returns an errno, or 0. Runs that `on_run` got before an error are valid.
  template <class OnRun>
  int scan(PagemapScan scan, OnRun& on_run) {
    scan.regions = reinterpret_cast<std::uintptr_t>(buffer_->regions.data());
    scan.region_count = buffer_->regions.size();
    for (; scan.begin < scan.end; scan.begin = scan.walk_end) {
      const int found = ::ioctl(fd_, pagemap_scan_request, &scan);
      if (found < 0) {
        if (errno == EINTR) continue;
        return errno;
      }
      for (int i = 0; i < found; ++i) {
        const PagemapRegion& region = buffer_->regions[static_cast<std::size_t>(i)];
        on_run(static_cast<std::uintptr_t>(region.begin), static_cast<std::uintptr_t>(region.end));
      }
      if (scan.walk_end <= scan.begin) return EINVAL;  // does not happen; the loop would never end
    }
    return 0;
  }

  template <class OnData>
  [[nodiscard]] Result<void> read_entries(std::uintptr_t begin, std::uintptr_t end, std::uint64_t any_of,
                                          OnData& on_data) {
    const auto page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    std::uintptr_t run = end;  // where the current run began; `end`: there is none
    for (std::uintptr_t at = begin; at < end;) {
      const std::size_t wanted = std::min(buffer_->entries.size(), (end - at) / page_bytes);
      const ssize_t got = ::pread(fd_, buffer_->entries.data(), wanted * 8, static_cast<off_t>(at / page_bytes * 8));
      if (got < 0 && errno == EINTR) continue;
      if (got < 8) return fail_errno(Stage::setup, "read /proc/self/pagemap", got < 0 ? errno : EIO);
      for (std::size_t i = 0; i < static_cast<std::size_t>(got) / 8; ++i, at += page_bytes) {
        const bool data = (buffer_->entries[i] & any_of) != 0;
        if (data && run == end) run = at;
        if (!data && run != end) on_data(std::exchange(run, end), at);
      }
    }
    if (run != end) on_data(run, end);
    return {};
  }

  int fd_ = -1;
  bool can_scan_ = false;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace detail

}  // namespace multifd
