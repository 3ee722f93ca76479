// SPDX-License-Identifier: MIT
//
// The exemplar of an Outlet: a format that is no packet. Each page goes to its place in a file, a zero page is a hole.
// Between the [format] marks is all that it takes; the engine brings threads, hand-off, zero checks, cap, statistics, cancel
// and the first error, and is not changed for it. tests/house.py holds the length.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/engine/pipeline.hpp"
#include "multifd/memory/page_runs.hpp"

namespace exemplar {

using namespace multifd;

// [format]
/// What the outlets of one file share: where each block begins in the file, and a barrier. A packet's reader orders epochs;
/// a file has none, so no channel writes pages of an epoch before all have written those of the epochs before.
struct FileShared {
  FileShared(const RamMap& ram, std::size_t channel_count) : page_bytes(ram.page_bytes()), channels(channel_count) {
    for (const RamBlock& block : ram.blocks()) {
      places.push_back(bytes);
      bytes += block.bytes;
    }
  }

  const std::size_t page_bytes;
  const std::size_t channels;
  std::vector<std::uint64_t> places;  ///< by block: file offset of its first page
  std::uint64_t bytes = 0;            ///< size of the file
  engine::Monitor barrier;
  std::uint64_t closings = 0;  ///< under the monitor: epochs closed, summed up over the channels
};

/// A model of engine::Outlet. The descriptor stays the caller's.
class FileOutlet {
 public:
  FileOutlet(FileShared& shared, int fd) noexcept : shared_(&shared), fd_(fd) {}

  /// Gives the file its size. A device has its own (EINVAL).
  Result<engine::Sent> begin() noexcept {
    if (::ftruncate(fd_, static_cast<off_t>(shared_->bytes)) != 0 && errno != EINVAL)
      return fail_errno(Stage::write, "ftruncate");
    return engine::Sent{};
  }

  Result<engine::Sent> send(const engine::PageList& pages, engine::Meter& meter) noexcept {
    const std::uint64_t page_bytes = shared_->page_bytes;
    const std::uint64_t place = shared_->places[index(pages.id)];
    const std::uint64_t bytes = pages.normal_pages * page_bytes;
    if (auto granted = meter.acquire(bytes); !granted) return std::unexpected(granted.error());
    std::size_t done = 0;
    // Neighbours in memory are neighbours in the file, unless they are copies.
    for (const iovec& run : pages.runs) {
      for (std::size_t at = 0; at < run.iov_len;) {
        const std::size_t count =
            adjacent_pages(pages.offsets.subspan(done, (run.iov_len - at) / page_bytes), page_bytes);
        const std::span part(static_cast<const std::byte*>(run.iov_base) + at, count * page_bytes);
        if (auto written = write_at(part, place + pages.offsets[done]); !written)
          return std::unexpected(written.error());
        done += count;
        at += part.size();
      }
    }
    while (done < pages.offsets.size()) {
      const std::size_t count = adjacent_pages(pages.offsets.subspan(done), page_bytes);
      if (::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(place + pages.offsets[done]),
                      static_cast<off_t>(count * page_bytes)) != 0)
        return fail_errno(Stage::write, "fallocate");
      done += count;
    }
    meter.wrote();
    return engine::Sent{.payload_bytes = bytes, .wire_bytes = bytes};
  }

  /// Nothing is kept back.
  Result<void> push_out(engine::Meter&) noexcept { return {}; }

  Result<engine::Sent> close_epoch(std::uint64_t epoch, engine::Meter&) noexcept {
    FileShared& shared = *shared_;
    shared.barrier.update([&] { ++shared.closings; });
    const auto all_closed = [&] { return shared.closings >= (epoch + 1) * shared.channels; };
    engine::Monitor::Lock held = shared.barrier.lock();
    shared.barrier.wait(held, all_closed);
    if (!all_closed()) return fail(Errc::cancelled, Stage::sync);
    return engine::Sent{};
  }

  Result<void> end() noexcept { return {}; }
  void shutdown() noexcept { shared_->barrier.stop(); }

 private:
  Result<void> write_at(std::span<const std::byte> bytes, std::uint64_t offset) noexcept {
    while (!bytes.empty()) {
      const ssize_t written = ::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return fail_errno(Stage::write, "pwrite");
      bytes = bytes.subspan(static_cast<std::size_t>(written));
      offset += static_cast<std::uint64_t>(written);
    }
    return {};
  }

  FileShared* shared_;
  int fd_;
};
static_assert(engine::check_outlet<FileOutlet>());

template <ZeroPagePolicy Z, PageSource From = FromGuest, class Outlet = FileOutlet>
struct FileSender {
  using Pipeline = engine::Pipeline<Outlet, Z, From>;

  /// `fds`: one for each channel, of one file.
  static Result<FileSender> open(const RamMap& ram, const std::vector<int>& fds, engine::PipelineOptions options = {}) {
    FileSender sender{.shared = std::make_unique<FileShared>(ram, fds.size()), .pipeline = nullptr};
    auto pipeline =
        Pipeline::open(ram, static_cast<unsigned>(fds.size()), Z{}, std::move(options),
                       [&](unsigned channel) -> Result<Outlet> { return Outlet(*sender.shared, fds[channel]); });
    if (!pipeline) return std::unexpected(pipeline.error());
    sender.pipeline = std::move(*pipeline);
    return sender;
  }

  std::unique_ptr<FileShared> shared;
  std::unique_ptr<Pipeline> pipeline;  ///< behind what its outlets use, so that it ends first
};
// [format end]

}  // namespace exemplar
