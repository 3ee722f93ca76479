// SPDX-License-Identifier: MIT
//
// Copies ranges of guest-physical memory out of an image, by several threads, for every format that has them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "multifd/image/file.hpp"
#include "multifd/image/guest_physical.hpp"
#include "multifd/image/mapped_ram_reader.hpp"
#include "multifd/image/workers.hpp"

namespace multifd::image {

/// What went into a file.
struct WrittenMemory {
  std::uint64_t normal_pages = 0;
  std::uint64_t zero_pages = 0;
};

namespace detail {

/// Pieces of up to 32 MiB of the ranges, by number.
class RangePieces {
 public:
  struct Piece {
    std::size_t range;
    std::uint64_t first;  ///< in the range, bytes
    std::uint64_t bytes;
  };
  static constexpr std::uint64_t most = 32 * 1024 * 1024;

  explicit RangePieces(std::span<const PhysicalRange> ranges) : ranges_(ranges) {
    for (const PhysicalRange& range : ranges) {
      first_.push_back(count_);
      count_ += (range.bytes + most - 1) / most;
    }
  }
  std::uint64_t count() const noexcept { return count_; }
  Piece at(std::uint64_t piece) const noexcept {
    const auto index = static_cast<std::size_t>(std::ranges::upper_bound(first_, piece) - first_.begin() - 1);
    const std::uint64_t first = (piece - first_[index]) * most;
    return {index, first, std::min(most, ranges_[index].bytes - first)};
  }

 private:
  std::span<const PhysicalRange> ranges_;
  std::vector<std::uint64_t> first_;  ///< number of a range's first piece
  std::uint64_t count_ = 0;
};

/// A buffer for each thread. Errors: Errc::bad_channel_count.
class WorkBuffers {
 public:
  static constexpr std::size_t bytes = 1024 * 1024;

  [[nodiscard]] static Result<WorkBuffers> create(const WorkOptions& options) {
    if (options.threads == 0 || options.threads > max_channels)
      return fail(Errc::bad_channel_count, Stage::setup, "image: threads", options.threads);
    WorkBuffers buffers;
    buffers.all_ = std::make_unique_for_overwrite<std::byte[]>(options.threads * bytes);
    return buffers;
  }
  std::span<std::byte> of(unsigned worker) const noexcept { return {&all_[worker * bytes], bytes}; }

 private:
  std::unique_ptr<std::byte[]> all_;
};

/// Copies each range's pages to its place in the file. Params: `places`: as many as ranges: where a range begins.
[[nodiscard]] inline Result<WrittenMemory> copy_ranges(const MappedRamReader& image,
                                                       std::span<const PhysicalRange> ranges,
                                                       std::span<const std::uint64_t> places, File& out,
                                                       const WorkOptions& options) {
  const auto buffers = WorkBuffers::create(options);
  if (!buffers) return std::unexpected(buffers.error());
  const RangePieces pieces(ranges);
  const std::uint64_t page = image.page_bytes();
  std::vector<WrittenMemory> written(options.threads);
  auto done = in_threads(options, pieces.count(), [&](std::uint64_t number, unsigned worker) -> Result<void> {
    const RangePieces::Piece piece = pieces.at(number);
    const PhysicalRange& range = ranges[piece.range];
    const std::span<std::byte> buffer = buffers->of(worker);
    std::uint64_t copied = 0;
    const auto copy = [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
      copied += bytes;
      for (std::uint64_t part; bytes > 0; offset += part, bytes -= part) {
        part = std::min<std::uint64_t>(bytes, buffer.size());
        const std::span<std::byte> some = buffer.first(static_cast<std::size_t>(part));
        MULTIFD_TRY(image.file().read(image.blocks()[range.block].pages_offset + offset, some));
        MULTIFD_TRY(out.write(places[piece.range] + (offset - range.offset), some));
      }
      return {};
    };
    MULTIFD_TRY(image.for_each_run(range.block, (range.offset + piece.first) / page, piece.bytes / page, copy));
    written[worker].normal_pages += copied / page;
    written[worker].zero_pages += (piece.bytes - copied) / page;
    if (options.on_progress) options.on_progress(piece.bytes);
    return {};
  });
  if (!done) return std::unexpected(done.error());
  WrittenMemory sum;
  for (const WrittenMemory& each : written) {
    sum.normal_pages += each.normal_pages;
    sum.zero_pages += each.zero_pages;
  }
  return sum;
}

/// Errors: Errc::bad_range: a layout that is not of this image.
[[nodiscard]] inline Result<void> check_ranges(const MappedRamReader& image, std::span<const PhysicalRange> ranges) {
  std::uint64_t end = 0;
  for (const PhysicalRange& range : ranges) {
    const std::uint64_t bytes = range.block < image.blocks().size() ? image.blocks()[range.block].used_length : 0;
    if (range.bytes == 0 || range.offset > bytes || range.bytes > bytes - range.offset || range.address < end ||
        range.end() < range.address || (range.bytes | range.offset | range.address) % image.page_bytes() != 0)
      return fail(Errc::bad_range, Stage::setup, "image: range", range.offset, bytes);
    end = range.end();
    // Shared memory that the file does not hold is not to be taken for zeros.
    if (image.blocks()[range.block].pages_offset == 0)
      return fail(Errc::block_without_memory, Stage::setup, "image: range", 0, 0, image.blocks()[range.block].idstr);
  }
  return {};
}

}  // namespace detail

}  // namespace multifd::image
