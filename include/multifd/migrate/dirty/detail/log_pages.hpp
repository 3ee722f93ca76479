// SPDX-License-Identifier: MIT
//
// From the pages of a log, which are the host's, to those of a map, and back. A log's page is reported as every page of
// the map that it touches, and cleared only when all of it will be sent.
//
//   map of 16 KiB   |       0       |       1       |          log page 5 is reported as page 1, and cleared with page 1
//   log             | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
//   map of 1 KiB    |................0123........... log page 4 is reported as its four pages, and cleared with all four
#pragma once

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace multifd::migrate::detail {

/// The first set bit from `at` on; `end` when there is none before it.
inline std::uint64_t next_set(std::span<const std::uint64_t> words, std::uint64_t at, std::uint64_t end) noexcept {
  while (at < end) {
    const std::uint64_t rest = words[at / 64] >> at % 64;
    if (rest != 0) return std::min(end, at + static_cast<unsigned>(std::countr_zero(rest)));
    at += 64 - at % 64;
  }
  return end;
}

/// The first clear bit from `at` on; `end` when there is none before it.
inline std::uint64_t next_clear(std::span<const std::uint64_t> words, std::uint64_t at, std::uint64_t end) noexcept {
  while (at < end) {
    const std::uint64_t rest = ~words[at / 64] >> at % 64;
    if (rest != 0) return std::min(end, at + static_cast<unsigned>(std::countr_zero(rest)));
    at += 64 - at % 64;
  }
  return end;
}

/// Sets the bits from `first` to `end` - 1.
inline void set_bits(std::span<std::uint64_t> words, std::uint64_t first, std::uint64_t end) noexcept {
  while (first < end) {
    const std::uint64_t run = std::min(64 - first % 64, end - first);
    words[first / 64] |= ~std::uint64_t{0} >> (64 - run) << first % 64;
    first += run;
  }
}

inline std::size_t host_page_bytes() noexcept { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

/// Threads: any; a plain value.
class LogPages {
 public:
  explicit LogPages(std::size_t map_page_bytes, std::size_t log_page_bytes = host_page_bytes()) noexcept
      : map_shift_(static_cast<unsigned>(std::countr_zero(map_page_bytes))),
        log_shift_(static_cast<unsigned>(std::countr_zero(log_page_bytes))) {}

  std::size_t bytes() const noexcept { return std::size_t{1} << log_shift_; }
  /// Pages of the log in so many bytes.
  std::uint64_t in(std::uint64_t bytes) const noexcept { return bytes >> log_shift_; }

  /// Reports the bytes from `begin` to `end` - 1 of a block, at least one.
  void report_bytes(std::uint64_t begin, std::uint64_t end, std::span<std::uint64_t> bitmap) const noexcept {
    set_bits(bitmap, begin >> map_shift_, ((end - 1) >> map_shift_) + 1);
  }

  /// Reports a piece of a log: `pages` pages, of which the first lies at byte `at` of the block.
  /// Cost: one OR a word where the pages are of one size and the words fall together, else one step a run of set bits.
  void report(std::span<const std::uint64_t> log, std::uint64_t pages, std::uint64_t at,
              std::span<std::uint64_t> bitmap) const noexcept {
    const std::uint64_t first = at >> log_shift_;
    if (log_shift_ == map_shift_ && first % 64 == 0) {
      const auto to = bitmap.subspan(first / 64);
      for (std::size_t i = 0; i < pages / 64; ++i) to[i] |= log[i];
      if (pages % 64 != 0) to[pages / 64] |= log[pages / 64] & ~std::uint64_t{0} >> (64 - pages % 64);
      return;
    }
    for (std::uint64_t begin = next_set(log, 0, pages), end = 0; begin < pages; begin = next_set(log, end, pages)) {
      end = next_clear(log, begin, pages);
      report_bytes(at + (begin << log_shift_), at + (end << log_shift_), bitmap);
    }
  }

  /// The other way: calls on_run(first, end) for each run of a piece of log's pages that lie wholly in pages of the map
  /// whose bit is set. Numbers count from the piece's begin.
  ///
  /// Params: `bitmap`: bit 0 is the map's page `first_page`; `at`, `bytes`: the piece, in bytes of the block.
  template <class OnRun>
  void for_each_covered_run(std::span<const std::uint64_t> bitmap, std::uint64_t first_page, std::uint64_t at,
                            std::uint64_t bytes, OnRun&& on_run) const noexcept {
    const std::uint64_t lead = first_page << map_shift_;
    if (at + bytes <= lead) return;
    // Only the bits that the piece touches.
    const std::uint64_t first = at <= lead ? 0 : (at - lead) >> map_shift_;
    const std::uint64_t last = std::min<std::uint64_t>(bitmap.size() * 64, ((at + bytes - lead - 1) >> map_shift_) + 1);
    for (std::uint64_t begin = next_set(bitmap, first, last), end = 0; begin < last;
         begin = next_set(bitmap, end, last)) {
      end = next_clear(bitmap, begin, last);
      const std::uint64_t from = std::max(at, lead + (begin << map_shift_)) - at;
      const std::uint64_t to = std::min(at + bytes, lead + (end << map_shift_)) - at;
      const std::uint64_t run = (from + bytes_mask()) >> log_shift_, run_end = to >> log_shift_;
      if (run < run_end) on_run(run, run_end);
    }
  }

 private:
  std::uint64_t bytes_mask() const noexcept { return (std::uint64_t{1} << log_shift_) - 1; }

  unsigned map_shift_, log_shift_;
};

}  // namespace multifd::migrate::detail
