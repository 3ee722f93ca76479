// SPDX-License-Identifier: MIT
//
// The prefetch list of all guests: what is read at the start, and what their faults add to it.
#pragma once

#include <multifd/postcopy/prefetch_list.hpp>

#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

namespace pager {

/// Threads: any, all methods. Throws Failure, in all calls but where it says otherwise.
class Recorder {
 public:
  /// Reads `prefetch`, if there is one; where that is what is recorded into, too, it may be missing.
  /// Params: paths, empty: none.
  Recorder(const std::string& prefetch, std::string record, std::span<const multifd::postcopy::StoreBlock> blocks,
           std::uint64_t page_bytes);

  /// What was read.
  const std::vector<multifd::postcopy::PageRange>& prefetch() const noexcept { return prefetch_; }
  bool records() const noexcept { return !path_.empty(); }

  /// Adds a guest's pages behind those that are noted, each once, and writes the file anew. A file that cannot be written
  /// is a warning: guests go on.
  void add(std::span<const multifd::postcopy::PageRange> ranges) noexcept;

 private:
  bool note(const multifd::postcopy::PageRange& range);
  void write() const;

  const std::string path_;
  const std::span<const multifd::postcopy::StoreBlock> blocks_;
  const std::uint64_t page_bytes_;
  std::vector<multifd::postcopy::PageRange> prefetch_;
  std::mutex mutex_;
  /// By block. By what was noted and not by the blocks' sizes, which a page server claims.
  std::vector<std::unordered_set<std::uint64_t>> noted_;
  std::vector<multifd::postcopy::PageRange> ranges_;
};

}  // namespace pager
