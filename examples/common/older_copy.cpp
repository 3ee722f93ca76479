// SPDX-License-Identifier: MIT
#include "common/older_copy.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#if defined(MULTIFD_HAS_OPENSSL)
#include <multifd/migrate/gmac.hpp>
#endif

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include "common/part_file.hpp"

namespace program {
namespace {

/// In steps, so that a signal can end it.
constexpr std::uint64_t step_bytes = std::uint64_t{64} << 20;

/// Copies by hand what copy_file_range() does not, between some file systems.
void copy_bytes(int from, int to, std::uint64_t at, std::uint64_t end, const std::string& name) {
  std::vector<std::byte> bytes(std::min<std::uint64_t>(end - at, std::uint64_t{1} << 20));
  while (at < end) {
    const ssize_t got =
        ::pread(from, bytes.data(), std::min<std::uint64_t>(bytes.size(), end - at), static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_path(name);
    if (got == 0) throw Failure(name + ": became shorter while it was copied");
    for (ssize_t done = 0; done < got;) {
      const ssize_t put =
          ::pwrite(to, bytes.data() + done, static_cast<std::size_t>(got - done), static_cast<off_t>(at) + done);
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail_path("copy of " + name);
      done += put;
    }
    at += static_cast<std::uint64_t>(got);
  }
}

}  // namespace

multifd::KeyedDigests page_digests() {
#if defined(MULTIFD_HAS_OPENSSL)
  return multifd::migrate::gmac_digests();
#else
  return {};
#endif
}

nlohmann::json base_report(const std::optional<multifd::migrate::BaseReport>& done) {
  if (!done) return nullptr;
  return {
      {"pages", done->pages}, {"digest_bytes", done->digest_bytes}, {"seconds", multifd::migrate::seconds(done->time)}};
}

std::string base_note(const std::optional<multifd::migrate::BaseReport>& done) {
  if (!done || done->pages == 0) return {};
  return fmt::format(", {:.1f} % as in the receiver's older copy, compared in {:.2f} s by {} of digests",
                     100 * static_cast<double>(done->equal_pages) / static_cast<double>(done->pages),
                     multifd::migrate::seconds(done->time), format_bytes(static_cast<double>(done->digest_bytes)));
}

void copy_data(int older, const std::string& name, int to, const multifd::Interrupt* interrupt) {
  if (::ioctl(to, FICLONE, older) == 0) return;  // one call, and no bytes
  struct stat status{};
  if (::fstat(older, &status) != 0) fail_path(name);
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (::ftruncate(to, static_cast<off_t>(size)) != 0) fail_path("copy of " + name);
  bool by_kernel = true;
  for (const Run& run : data_of_file(older, size, 1)) {
    for (std::uint64_t at = run.offset; at < run.offset + run.bytes;) {
      if (interrupt != nullptr && interrupt->triggered())
        throw cause_of(Failure(multifd::Error{.code = multifd::Errc::cancelled}));
      const std::uint64_t end = std::min(at + step_bytes, run.offset + run.bytes);
      if (!by_kernel) {
        copy_bytes(older, to, at, end, name);
        at = end;
        continue;
      }
      auto from = static_cast<off_t>(at), into = from;
      const ssize_t copied = ::copy_file_range(older, &from, to, &into, end - at, 0);
      if (copied < 0 && errno == ENOSPC) fail_path("copy of " + name);
      // What it cannot do, and 0 for what it says that it has done to some virtual files, is done by hand.
      by_kernel = copied > 0;
      if (by_kernel) at += static_cast<std::uint64_t>(copied);
    }
  }
}

FileInPlace::FileInPlace(std::string path) : path_(std::move(path)), file_(open_regular(path_, O_RDWR)) {
  if (::flock(file_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    throw Failure(path_ + ": another program is writing to it: choose another file, or wait for its end");
  struct stat status{};
  if (::fstat(file_.get(), &status) != 0) fail_path(path_);
  if (status.st_size == 0) throw Failure(path_ + ": empty");
  mapping_ = Mapping::write_file(file_.get(), static_cast<std::uint64_t>(status.st_size), path_);
}

Summary FileInPlace::make_sparse(std::size_t page_bytes) const {
  return program::make_sparse(mapping_, file_.get(), page_bytes);
}

void FileInPlace::sync() {
  check_size(file_.get(), mapping_, path_);
  if (::fsync(file_.get()) != 0) fail_path(path_);
}

bool same_file(const std::string& one, const std::string& other) {
  struct stat a{}, b{};
  return ::stat(one.c_str(), &a) == 0 && ::stat(other.c_str(), &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

}  // namespace program
