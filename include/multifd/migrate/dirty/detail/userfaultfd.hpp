// SPDX-License-Identifier: MIT
//
// A userfaultfd in asynchronous write-protect mode (Linux 6.7): the kernel lifts the protection itself at the first write,
// and PAGEMAP_SCAN (memory/pagemap.hpp) finds where. No thread serves faults.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "multifd/result.hpp"

namespace multifd::migrate::detail {

// Newer than the headers of some systems that this library supports.
inline constexpr int user_mode_only = 1;                                   // UFFD_USER_MODE_ONLY
inline constexpr unsigned long new_userfaultfd = _IO(0xAA, 0x00);          // USERFAULTFD_IOC_NEW
inline constexpr std::uint64_t feature_wp_async = std::uint64_t{1} << 15;  // UFFD_FEATURE_WP_ASYNC

/// Threads: one at a time.
class WriteProtectedMemory {
 public:
  /// Errors: errno of userfaultfd and of /dev/userfaultfd; Errc::not_supported where the kernel has no
  ///   UFFD_FEATURE_WP_ASYNC.
  [[nodiscard]] static Result<WriteProtectedMemory> open() noexcept {
    WriteProtectedMemory memory;
    memory.fd_ = open_fd();
    if (memory.fd_ < 0)
      return fail_errno(Stage::setup,
                        "userfaultfd: allow the system call (seccomp), or give access to /dev/userfaultfd");
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = feature_wp_async;
    if (::ioctl(memory.fd_, UFFDIO_API, &api) < 0) {
      if (errno == EINVAL)
        return fail(Errc::not_supported, Stage::setup, "userfaultfd with UFFD_FEATURE_WP_ASYNC (Linux 6.7)");
      return fail_errno(Stage::setup, "UFFDIO_API");
    }
    return memory;
  }
  WriteProtectedMemory(WriteProtectedMemory&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  WriteProtectedMemory& operator=(WriteProtectedMemory&&) = delete;
  /// Closing lifts all protection.
  ~WriteProtectedMemory() {
    if (fd_ >= 0) ::close(fd_);
  }

  /// Errors: errno: EBUSY when another userfaultfd has the memory, EPERM when it is a file that cannot be written.
  [[nodiscard]] Result<void> watch(std::span<const std::byte> memory) noexcept {
    uffdio_register range{};
    range.range = {reinterpret_cast<std::uintptr_t>(memory.data()), memory.size()};
    range.mode = UFFDIO_REGISTER_MODE_WP;
    if (::ioctl(fd_, UFFDIO_REGISTER, &range) < 0) return fail_errno(Stage::none, "UFFDIO_REGISTER");
    return {};
  }

  /// Errors: errno.
  [[nodiscard]] Result<void> leave(std::span<const std::byte> memory) noexcept {
    uffdio_range range{reinterpret_cast<std::uintptr_t>(memory.data()), memory.size()};
    if (::ioctl(fd_, UFFDIO_UNREGISTER, &range) < 0) return fail_errno(Stage::none, "UFFDIO_UNREGISTER");
    return {};
  }

 private:
  WriteProtectedMemory() = default;

  /// The variant that needs no privilege first: no fault is ever delivered, so nothing is missed. Kernels before 5.11 do
  /// not know it, and some sandboxes allow only the device.
  static int open_fd() noexcept {
    int fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only));
    if (fd < 0 && errno == EINVAL) fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    if (fd >= 0) return fd;
    const int refused = errno;
    const int device = ::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
      fd = ::ioctl(device, new_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only);
      ::close(device);
    }
    if (fd < 0) errno = refused;
    return fd;
  }

  int fd_ = -1;
};

}  // namespace multifd::migrate::detail
