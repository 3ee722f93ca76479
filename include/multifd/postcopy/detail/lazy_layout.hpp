// SPDX-License-Identifier: MIT
//
// Numbers for the units of all regions, one after the other in the order of addresses, and the way from an address or a
// block's offset to a number and back.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "multifd/postcopy/lazy_region.hpp"

namespace multifd::postcopy::detail {

/// Adjacent units of one region.
struct UnitRun {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  std::uint64_t end() const noexcept { return first + count; }
};

/// Threads: any. Immutable.
class LazyLayout {
 public:
  struct Part : LazyRegion {
    std::uint64_t first_unit = 0;
    std::uint64_t units() const noexcept { return bytes / unit_bytes; }
    std::uint64_t end_unit() const noexcept { return first_unit + units(); }
    std::uint64_t address_of(std::uint64_t unit) const noexcept { return address + (unit - first_unit) * unit_bytes; }
    std::byte* mapped(std::uint64_t unit) const noexcept { return mapping + (unit - first_unit) * unit_bytes; }
    /// Which bytes of its block.
    PageRange range(UnitRun run) const noexcept {
      return {block, offset + (run.first - first_unit) * unit_bytes, run.count * unit_bytes};
    }
  };

  LazyLayout() = default;
  /// `regions`: checked.
  explicit LazyLayout(std::span<const LazyRegion> regions) {
    for (const LazyRegion& region : regions) parts_.push_back({region, 0});
    std::ranges::sort(parts_, {}, &Part::address);
    for (Part& part : parts_) {
      part.first_unit = units_;
      units_ += part.units();
      largest_unit_ = std::max(largest_unit_, part.unit_bytes);
    }
    for (std::size_t i = 0; i < parts_.size(); ++i) by_block_.push_back(i);
    std::ranges::sort(by_block_, [this](std::size_t a, std::size_t b) { return before(parts_[a], parts_[b]); });
  }

  std::uint64_t units() const noexcept { return units_; }
  std::uint64_t largest_unit() const noexcept { return largest_unit_; }
  std::span<const Part> parts() const noexcept { return parts_; }

  const Part& part_of(std::uint64_t unit) const noexcept {
    return *std::prev(std::ranges::upper_bound(parts_, unit, {}, &Part::first_unit));
  }

  /// The unit at an address of the guest's process.
  std::optional<std::uint64_t> find(std::uint64_t address) const noexcept {
    const auto behind = std::ranges::upper_bound(parts_, address, {}, &Part::address);
    if (behind == parts_.begin()) return std::nullopt;
    const Part& part = *std::prev(behind);
    if (address >= part.end()) return std::nullopt;
    return part.first_unit + (address - part.address) / part.unit_bytes;
  }

  /// Calls `visit(UnitRun)` for what regions have of addresses: the units that lie in it whole.
  template <class Visit>
  void for_addresses(std::uint64_t begin, std::uint64_t end, Visit&& visit) const {
    for (const Part& part : parts_) {
      const std::uint64_t from = std::max(begin, part.address);
      const std::uint64_t to = std::min(end, part.end());
      if (from >= to) continue;
      const std::uint64_t first = (from - part.address + part.unit_bytes - 1) / part.unit_bytes;
      const std::uint64_t last = (to - part.address) / part.unit_bytes;
      if (first < last) visit(UnitRun{part.first_unit + first, last - first});
    }
  }

  /// Calls `visit(UnitRun)` for what regions have of a block's bytes, in the order of offsets: each unit that has one of
  /// them. `visit` returns whether to go on.
  template <class Visit>
  void for_range(const PageRange& range, Visit&& visit) const {
    auto at = std::ranges::partition_point(by_block_, [&](std::size_t i) {
      const Part& part = parts_[i];
      return part.block < range.block || (part.block == range.block && part.offset + part.bytes <= range.offset);
    });
    for (; at != by_block_.end(); ++at) {
      const Part& part = parts_[*at];
      if (part.block != range.block || part.offset >= range.end()) return;
      const std::uint64_t from = std::max(range.offset, part.offset) - part.offset;
      const std::uint64_t to = std::min(range.end(), part.offset + part.bytes) - part.offset;
      const std::uint64_t first = from / part.unit_bytes;
      const std::uint64_t last = (to + part.unit_bytes - 1) / part.unit_bytes;
      if (!visit(UnitRun{part.first_unit + first, last - first})) return;
    }
  }

 private:
  static bool before(const Part& a, const Part& b) noexcept {
    return a.block != b.block ? a.block < b.block : a.offset < b.offset;
  }

  std::vector<Part> parts_;
  std::vector<std::size_t> by_block_;
  std::uint64_t units_ = 0;
  std::uint64_t largest_unit_ = 0;
};

}  // namespace multifd::postcopy::detail
