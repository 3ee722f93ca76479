// SPDX-License-Identifier: MIT
//
// Gathers pages into runs: neighbouring pages of a batch become one iovec, which is what makes large packets cheap
// on both sides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "multifd/buffers.hpp"
#include "multifd/result.hpp"

namespace multifd {

/// How many of the first offsets are those of pages that lie next to each other; 0 of none.
inline std::size_t adjacent_pages(std::span<const std::uint64_t> offsets, std::size_t page_bytes) noexcept {
  std::size_t count = std::min<std::size_t>(offsets.size(), 1);
  while (count > 0 && count < offsets.size() && offsets[count] == offsets[count - 1] + page_bytes) ++count;
  return count;
}

/// A preallocated array of runs, in the order the pages were added. Threads: one at a time; a channel has its own.
class PageRuns {
 public:
  /// Params: `most_pages`: no more may be added between two clear(). Errors: ENOMEM.
  /// Cost: 16 bytes a page, allocated here and not again.
  [[nodiscard]] static Result<PageRuns> create(std::size_t most_pages) noexcept {
    PageRuns runs;
    runs.runs_.reset(new (std::nothrow) iovec[most_pages]);
    if (!runs.runs_) return fail_errno(Stage::setup, "allocate iovecs", ENOMEM);
    return runs;
  }

  void clear() noexcept { count_ = 0; }

  /// Adds a page, or several adjacent ones.
  void add(std::byte* pages, std::size_t bytes) noexcept {
    if (count_ > 0) {
      iovec& last = runs_[count_ - 1];
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == pages) {
        last.iov_len += bytes;
        return;
      }
    }
    runs_[count_++] = {pages, bytes};
  }

  std::span<const iovec> view() const noexcept { return {runs_.get(), count_}; }

 private:
  std::unique_ptr<iovec[]> runs_;
  std::size_t count_ = 0;
};

}  // namespace multifd
