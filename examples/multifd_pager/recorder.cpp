// SPDX-License-Identifier: MIT
#include "multifd_pager/recorder.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <utility>

#include "common/limits.hpp"
#include "common/part_file.hpp"
#include "common/program.hpp"
#include "common/tell.hpp"

namespace pager {
namespace {

using namespace multifd;
using postcopy::PageRange;
using program::Failure;

/// No list of what a guest needs first is longer; one of all pages of 64 GiB, each with a line of its own, would be.
constexpr std::size_t most_bytes = 256 * 1024 * 1024;

/// Throws Failure.
std::string read_file(const std::string& path) {
  const program::Descriptor file = program::open_regular(path, O_RDONLY);
  std::string text;
  for (;;) {
    const std::size_t old = text.size();
    if (old > most_bytes) throw Failure(fmt::format("{}: longer than any list of pages ({} bytes)", path, most_bytes));
    text.resize(old + 256 * 1024);
    const ssize_t count = ::read(file.get(), text.data() + old, text.size() - old);
    text.resize(old + static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) program::fail_path(path);
    if (count == 0) return text;
  }
}

}  // namespace

Recorder::Recorder(const std::string& prefetch, std::string record, std::span<const postcopy::StoreBlock> blocks,
                   std::uint64_t page_bytes)
    : path_(std::move(record)), blocks_(blocks), page_bytes_(page_bytes) {
  const auto there = [](const std::string& path) { return ::access(path.c_str(), F_OK) == 0; };
  if (!prefetch.empty() && (prefetch != path_ || there(prefetch)))
    prefetch_ = program::need(postcopy::parse_prefetch_list(read_file(prefetch), blocks, page_bytes), prefetch);
  if (path_.empty()) return;
  // Nothing but a list of this guest's is written over.
  if (path_ != prefetch && there(path_))
    (void)program::need(postcopy::parse_prefetch_list(read_file(path_), blocks, page_bytes), path_);
  noted_.resize(blocks.size());
  for (const PageRange& range : prefetch_) (void)note(range);
  write();  // what cannot be written is said now
}

bool Recorder::note(const PageRange& range) {
  auto& noted = noted_[index(range.block)];
  bool fresh = false;
  for (std::uint64_t at = range.offset; at < range.end(); at += page_bytes_) {
    if (!noted.insert(at / page_bytes_).second) continue;
    fresh = true;
    if (!ranges_.empty() && ranges_.back().block == range.block && ranges_.back().end() == at)
      ranges_.back().bytes += page_bytes_;
    else
      ranges_.push_back({.block = range.block, .offset = at, .bytes = page_bytes_});
  }
  return fresh;
}

void Recorder::add(std::span<const PageRange> ranges) noexcept {
  if (path_.empty()) return;
  try {
    const std::lock_guard lock(mutex_);
    bool fresh = false;
    for (const PageRange& range : ranges) fresh = note(range) || fresh;
    if (fresh) write();
  } catch (const std::exception& error) {
    program::tell("warning: --record: {}\n", program::text_of(error));
  }
}

void Recorder::write() const {
  const std::string part = path_ + ".part";
  {
    const program::Descriptor file = program::open_regular(part, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    program::write_text(file.get(), postcopy::prefetch_list_text(ranges_, blocks_, page_bytes_), part);
  }
  // In the place of an older list at once: a pager that is killed leaves one or the other.
  if (::rename(part.c_str(), path_.c_str()) != 0) program::fail_path(path_);
}

}  // namespace pager
