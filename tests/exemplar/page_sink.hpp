// SPDX-License-Identifier: MIT
//
// The exemplar of a PageSink: pages go to their places in a file that nobody maps, a zero page becomes a hole.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "multifd/ends/page_sink.hpp"

namespace exemplar {

using namespace multifd;

/// Blocks lie in the file one behind the other, in the order of the map. The descriptor stays the caller's.
struct IntoFile {
  static constexpr bool writes_memory = false;

  int fd = -1;

  class Sink;
};

class IntoFile::Sink {
 public:
  class Channel {
   public:
    [[nodiscard]] static Result<Channel> create(Sink& sink) {
      auto pages = PageBuffer::create();
      if (!pages) return std::unexpected(pages.error());
      return Channel(sink, std::move(*pages));
    }

    /// The bytes go to a buffer first.
    [[nodiscard]] Result<void> place(const ArrivingPages& pages, PageRuns& runs) noexcept {
      for (const std::uint64_t offset : pages.offsets)
        if (auto checked = sink_->map_.check(pages.block, offset); !checked) return checked;
      if (pages.normal_pages > 0) runs.add(pages_.data(), pages.normal_pages * sink_->map_.page_bytes());
      return {};
    }

    void begin(const ArrivingPages&) noexcept {}

    [[nodiscard]] Result<void> arrived(const ArrivingPages& pages) noexcept {
      const std::size_t page_bytes = sink_->map_.page_bytes();
      const std::uint64_t place = sink_->places_[index(pages.block)];
      for (std::size_t i = 0; i < pages.normal_pages; ++i)
        if (auto put = sink_->write(pages_.data() + i * page_bytes, place + pages.offsets[i]); !put) return put;
      for (const std::uint64_t offset : pages.zeros())
        if (::fallocate(sink_->fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(place + offset),
                        static_cast<off_t>(page_bytes)) != 0)
          return fail_errno(Stage::write, "fallocate");
      return {};
    }

   private:
    Channel(Sink& sink, PageBuffer pages) noexcept : sink_(&sink), pages_(std::move(pages)) {}
    Sink* sink_;
    PageBuffer pages_;
  };

  [[nodiscard]] static Result<std::unique_ptr<Sink>> create(const RamMap& map, const IntoFile& settings,
                                                            const ThreadHook&) {
    std::unique_ptr<Sink> sink(new Sink(map, settings.fd));
    std::uint64_t bytes = 0;
    for (const RamBlock& block : map.blocks()) {
      sink->places_.push_back(bytes);
      bytes += block.bytes;
    }
    if (::ftruncate(settings.fd, static_cast<off_t>(bytes)) != 0) return fail_errno(Stage::setup, "ftruncate");
    return sink;
  }

  void stop() noexcept {}

 private:
  Sink(const RamMap& map, int fd) noexcept : map_(map), fd_(fd) {}

  [[nodiscard]] Result<void> write(const std::byte* page, std::uint64_t place) const noexcept {
    for (std::size_t done = 0; done < map_.page_bytes();) {
      const ssize_t written = ::pwrite(fd_, page + done, map_.page_bytes() - done, static_cast<off_t>(place + done));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return fail_errno(Stage::write, "pwrite");
      done += static_cast<std::size_t>(written);
    }
    return {};
  }

  const RamMap& map_;
  const int fd_;
  std::vector<std::uint64_t> places_;  ///< by block
};
static_assert(check_page_sink<IntoFile>());

}  // namespace exemplar
