// SPDX-License-Identifier: MIT
//
// A userfaultfd in asynchronous write-protect mode (Linux 6.7): the kernel lifts the protection itself at the first write,
// and PAGEMAP_SCAN (memory/pagemap.hpp) finds where. No thread serves faults.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "multifd/memory/open_userfaultfd.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate::detail {

/// Threads: one at a time.
class WriteProtectedMemory {
 public:
  /// Errors: errno of userfaultfd and of /dev/userfaultfd; Errc::not_supported where the kernel has no
  ///   UFFD_FEATURE_WP_ASYNC.
  [[nodiscard]] static Result<WriteProtectedMemory> open() noexcept {
    constexpr std::uint64_t wp_async = std::uint64_t{1}
                                       << 15;  // UFFD_FEATURE_WP_ASYNC, newer than some systems' headers
    WriteProtectedMemory memory;
    // No fault is ever delivered, so nothing is missed without privilege.
    MULTIFD_TRY_ASSIGN(memory.fd_,
                       multifd::detail::open_userfaultfd(multifd::detail::FaultsOf::user_mode, wp_async,
                                                         "userfaultfd with UFFD_FEATURE_WP_ASYNC (Linux 6.7)"));
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

  int fd_ = -1;
};

}  // namespace multifd::migrate::detail
