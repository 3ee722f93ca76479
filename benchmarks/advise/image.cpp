// SPDX-License-Identifier: MIT
#include "advise/image.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include <multifd/zero/buffer_is_zero.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/descriptor.hpp"
#include "common/program.hpp"
#include "corpus.hpp"

namespace advise {
namespace {

using program::Failure;

std::uint64_t up_to_pages(std::uint64_t bytes) { return (bytes + page_bytes - 1) / page_bytes * page_bytes; }

/// Reads until `to` is full or the file ends; the rest of `to` is zero already.
void read_at(int fd, std::span<std::byte> to, std::uint64_t at, const std::string& path) {
  while (!to.empty()) {
    const ssize_t got = ::pread(fd, to.data(), to.size(), static_cast<off_t>(at));
    if (got == 0) return;
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw Failure(fmt::format("{}: {}", path, std::strerror(errno)));
    to = to.subspan(static_cast<std::size_t>(got));
    at += static_cast<std::uint64_t>(got);
  }
}

}  // namespace

Image read_image(const std::string& path, std::uint64_t sample_bytes) {
  // Not blocking: opening a pipe would wait for its writer before anybody can see that it is no file.
  const program::Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status{};
  if (fd.get() < 0 || ::fstat(fd.get(), &status) != 0) throw Failure(fmt::format("{}: {}", path, std::strerror(errno)));
  if (!S_ISREG(status.st_mode)) throw Failure(path + ": not a regular file");
  if (status.st_size == 0) throw Failure(path + ": empty");

  const std::uint64_t bytes = up_to_pages(static_cast<std::uint64_t>(status.st_size));
  const bool whole = bytes <= std::max(sample_bytes, window_bytes);
  const std::uint64_t windows = whole ? 1 : std::max<std::uint64_t>(1, sample_bytes / window_bytes);
  const std::uint64_t each = whole ? bytes : window_bytes;
  Image image{.name = path, .bytes = bytes, .windows = windows, .memory = program::Mapping::anonymous(windows * each)};
  for (std::uint64_t i = 0; i < windows; ++i) {
    // The first window at the start, the last one at the end.
    const std::uint64_t at = windows == 1 ? 0 : (bytes - each) / page_bytes * i / (windows - 1) * page_bytes;
    read_at(fd.get(), image.sample().subspan(i * each, each), at, path);
  }
  return image;
}

Image make_image(const std::vector<std::string>& patterns, std::uint64_t bytes, std::uint64_t sample_bytes,
                 std::uint64_t seed) {
  const std::uint64_t sampled = std::min(up_to_pages(bytes), up_to_pages(sample_bytes));
  const std::uint64_t each = sampled / patterns.size() / page_bytes * page_bytes;
  if (each == 0) throw program::Usage(fmt::format("--size: less than one page of {} bytes per pattern", page_bytes));
  Image image{.name = fmt::format("pattern {}", fmt::join(patterns, " + ")),
              .bytes = up_to_pages(bytes),
              .windows = 1,
              .memory = program::Mapping::anonymous(each * patterns.size())};
  for (std::size_t i = 0; i < patterns.size(); ++i)
    corpus::fill(image.sample().subspan(i * each, each), patterns[i], seed + i);
  return image;
}

void look_at(Image& image, const multifd::Interrupt& interrupt) {
  // Pages that were never written are all the kernel's one page of zeros, and reading that is not like reading memory.
  image.memory.populate(&interrupt);
  const std::span<std::byte> sample = image.sample();
  constexpr std::size_t extent_pages = (std::size_t{2} << 20) / page_bytes;
  image.zero.assign(sample.size() / page_bytes, false);
  image.zero_pages = 0;
  std::size_t extents = 0;
  std::size_t touched = 0;
  for (std::size_t first = 0; first < image.zero.size(); first += extent_pages) {
    const std::size_t end = std::min(first + extent_pages, image.zero.size());
    std::size_t here = 0;
    for (std::size_t page = first; page < end; ++page) {
      image.zero[page] = multifd::buffer_is_zero(sample.data() + page * page_bytes, page_bytes);
      here += image.zero[page];
    }
    image.zero_pages += here;
    ++extents;
    touched += here < end - first;
  }
  image.facts = {.bytes = static_cast<double>(image.bytes),
                 .page_bytes = page_bytes,
                 .zero_share = static_cast<double>(image.zero_pages) / static_cast<double>(image.zero.size()),
                 .touched_share = static_cast<double>(touched) / static_cast<double>(extents)};
}

}  // namespace advise
