// SPDX-License-Identifier: MIT
//
// How this process gets a userfaultfd: the system call, or the device where that is all that is allowed. What is done with
// it is its owner's: write-protection (migrate/dirty/), missing pages (postcopy/).
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "multifd/result.hpp"

namespace multifd::detail {

/// Whose faults are delivered.
enum class FaultsOf : std::uint8_t {
  user_mode,  ///< needs no privilege
  everybody,  ///< the kernel's on a process' behalf, too
};

/// Opens a non-blocking one and says UFFDIO_API.
///
/// Params: `features`: UFFD_FEATURE_*; `needs`: what an error is to say is missing where the kernel lacks one, static text.
/// Returns: the descriptor, the caller's. Errors: errno of userfaultfd and of /dev/userfaultfd; Errc::not_supported.
/// Cost: a descriptor.
[[nodiscard]] inline Result<int> open_userfaultfd(FaultsOf whose, std::uint64_t features, const char* needs) noexcept {
  // Newer than the headers of some systems that this library supports.
  constexpr int user_mode_only = 1;                           // UFFD_USER_MODE_ONLY
  constexpr unsigned long new_userfaultfd = _IO(0xAA, 0x00);  // USERFAULTFD_IOC_NEW
  const int flags = O_CLOEXEC | O_NONBLOCK | (whose == FaultsOf::user_mode ? user_mode_only : 0);
  int fd = static_cast<int>(::syscall(SYS_userfaultfd, flags));
  // Kernels before 5.11 do not know the variant without privilege.
  if (fd < 0 && errno == EINVAL) fd = static_cast<int>(::syscall(SYS_userfaultfd, flags & ~user_mode_only));
  if (fd < 0) {
    // Some sandboxes allow only the device.
    const int refused = errno;
    const int device = ::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
      fd = ::ioctl(device, new_userfaultfd, flags);
      ::close(device);
    }
    if (fd < 0)
      return fail_errno(Stage::setup,
                        "userfaultfd: allow the system call (seccomp), or give access to /dev/userfaultfd", refused);
  }
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  if (::ioctl(fd, UFFDIO_API, &api) == 0) return fd;
  const int refused = errno;
  ::close(fd);
  if (refused == EINVAL) return fail(Errc::not_supported, Stage::setup, needs);
  return fail_errno(Stage::setup, "UFFDIO_API", refused);
}

}  // namespace multifd::detail
