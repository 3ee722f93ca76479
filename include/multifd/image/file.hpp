// SPDX-License-Identifier: MIT
//
// A regular file that is read and written at offsets, by several threads.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "multifd/image/random_access.hpp"

namespace multifd::image {

/// An open file. Owns its descriptor.
///
/// Threads: any number, all calls; what is written at one time must not overlap.
/// Lifetime: the destructor closes the descriptor, and says nothing of what close() says: what has to be on the disk needs
///   fsync() before.
class File final : public RandomAccess {
 public:
  /// Takes an open descriptor over, also when it fails.
  /// Errors: Errc::not_supported: neither a regular file nor a block device; errno of fstat().
  [[nodiscard]] static Result<File> adopt(int fd) noexcept {
    File file(fd);
    struct stat status{};
    if (::fstat(fd, &status) != 0) return fail_errno(Stage::setup, "image: fstat");
    if (S_ISREG(status.st_mode)) {
      file.bytes_ = static_cast<std::uint64_t>(status.st_size);
    } else if (S_ISBLK(status.st_mode)) {
      const off_t end = ::lseek(fd, 0, SEEK_END);
      if (end < 0) return fail_errno(Stage::setup, "image: lseek");
      file.bytes_ = static_cast<std::uint64_t>(end);
    } else {
      return fail(Errc::not_supported, Stage::setup, "image: not a regular file");
    }
    return file;
  }

  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), bytes_(other.bytes_) {}
  File& operator=(File&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~File() override {
    if (fd_ >= 0) ::close(fd_);
  }

  int native_handle() const noexcept { return fd_; }

  /// As it was when the file was opened, or as resize() has set it.
  std::uint64_t bytes() const noexcept override { return bytes_; }

  /// The aligned 64 KiB around it: what lies near is needed soon, and reading that much takes little longer than a page.
  Extent read_together(std::uint64_t offset) const noexcept override {
    constexpr std::uint64_t size = 64 * 1024;
    const std::uint64_t begin = offset / size * size;
    return {.offset = begin, .bytes = std::min(size, bytes_ - begin)};
  }

  /// Errors: errno of pwrite().
  [[nodiscard]] Result<void> write(std::uint64_t offset, std::span<const std::byte> from) noexcept {
    while (!from.empty()) {
      const ssize_t written = ::pwrite(fd_, from.data(), from.size(), static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return fail_errno(Stage::write, "image: pwrite", written < 0 ? errno : ENOSPC);
      from = from.subspan(static_cast<std::size_t>(written));
      offset += static_cast<std::uint64_t>(written);
    }
    return {};
  }

  /// Sets the size; what is new is a hole. Errors: errno of ftruncate(); a device has its own size, and stays as it is.
  [[nodiscard]] Result<void> resize(std::uint64_t bytes) noexcept {
    if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0 && errno != EINVAL)
      return fail_errno(Stage::write, "image: ftruncate");
    bytes_ = bytes;
    return {};
  }

  /// Makes a hole. Returns whether the file system can.
  bool punch(const Extent& extent) noexcept {
    return ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(extent.offset),
                       static_cast<off_t>(extent.bytes)) == 0;
  }

 private:
  [[nodiscard]] Result<void> do_read(std::uint64_t offset, std::span<std::byte> to) const noexcept override {
    const std::uint64_t begin = offset;
    while (!to.empty()) {
      const ssize_t got = ::pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return fail_errno(Stage::read, "image: pread");
      if (got == 0) return fail(Errc::truncated_image, Stage::read, "image", begin, offset);
      to = to.subspan(static_cast<std::size_t>(got));
      offset += static_cast<std::uint64_t>(got);
    }
    return {};
  }

  [[nodiscard]] Result<Extent> do_next_data(std::uint64_t from) const noexcept override {
    if (from >= bytes_) return Extent{.offset = bytes_};
    const off_t begin = ::lseek(fd_, static_cast<off_t>(from), SEEK_DATA);
    if (begin < 0 && errno == ENXIO) return Extent{.offset = bytes_};
    // A file system without holes, or a device: all of it may be data.
    if (begin < 0) return Extent{.offset = from, .bytes = bytes_ - from};
    const off_t end = ::lseek(fd_, begin, SEEK_HOLE);
    const auto first = static_cast<std::uint64_t>(begin);
    const std::uint64_t last = end < 0 ? bytes_ : std::min(static_cast<std::uint64_t>(end), bytes_);
    if (first >= last) return Extent{.offset = bytes_};  // the file has become shorter
    return Extent{.offset = first, .bytes = last - first};
  }

  explicit File(int fd) noexcept : fd_(fd) {}

  int fd_;
  std::uint64_t bytes_ = 0;
};

}  // namespace multifd::image
