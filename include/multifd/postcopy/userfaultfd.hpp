// SPDX-License-Identifier: MIT
//
// A userfaultfd: faults of a guest's threads as messages, and the calls that put pages where they wait. The guest may be
// another process, whose descriptor was handed over: nothing here reads or writes an address of the guest's.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>

#include "multifd/memory/open_userfaultfd.hpp"
#include "multifd/postcopy/lazy_region.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy {

/// What happened to the guest's memory.
struct UserfaultfdEvent {
  enum class Kind : std::uint8_t {
    fault,     ///< a thread waits at `address`
    removed,   ///< `bytes` at `address` are given back: a balloon, MADV_DONTNEED, a punched hole; zero from now on
    remapped,  ///< `bytes` moved from `address` to `to`
    unmapped,  ///< gone
    forked,    ///< a child process has the memory, too: its faults are not served, it finds missing pages empty
  };
  Kind kind{};
  bool minor = false;  ///< a fault: the page is in memory, and not shown to the guest yet
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
  std::uint64_t to = 0;
};

/// Whether faults of the kernel on the guest's behalf are served as well: system calls, KVM.
enum class KernelFaults : std::uint8_t {
  required,    ///< takes CAP_SYS_PTRACE, the sysctl vm.unprivileged_userfaultfd, or access to /dev/userfaultfd
  if_allowed,  ///< else those of the guest's own instructions only; a system call on a missing page gets EFAULT
};

/// Owns the descriptor, which is non-blocking.
///
/// Placing (copy(), zeropage(), continue_()) takes whole units and returns how many bytes are done with: placed, or found
/// to be there already, which is as good. Waiting threads are woken. Fewer than all when the memory's layout is changing:
/// read() has an event first, then go on behind what is done.
/// Errors of placing: Errc::guest_gone (the process has ended); errno: ENOENT where nothing is registered (any more).
///
/// Threads: any, all const methods.
class Userfaultfd {
 public:
  /// UFFD_FEATURE_* that create() asks for by itself.
  static constexpr std::uint64_t default_features = UFFD_FEATURE_EVENT_REMOVE;

  /// For memory of this process.
  /// Errors: errno of userfaultfd(2) and /dev/userfaultfd; Errc::not_supported (the kernel lacks one of the features).
  /// Cost: a descriptor.
  [[nodiscard]] static Result<Userfaultfd> create(std::uint64_t features = default_features,
                                                  KernelFaults kernel = KernelFaults::if_allowed) noexcept {
    constexpr const char* needs = "userfaultfd with the features that are asked for";
    Userfaultfd made;
    auto fd = multifd::detail::open_userfaultfd(multifd::detail::FaultsOf::everybody, features, needs);
    made.kernel_faults_ = fd.has_value();
    if (!fd && kernel == KernelFaults::if_allowed)
      fd = multifd::detail::open_userfaultfd(multifd::detail::FaultsOf::user_mode, features, needs);
    MULTIFD_TRY_ASSIGN(made.fd_, std::move(fd));
    made.features_ = features;
    return made;
  }

  /// For memory of another process, which has made it, said UFFDIO_API, and sent it here (SCM_RIGHTS). Owns `fd` from the
  /// call on, also when it fails.
  /// Errors: Errc::not_userfaultfd; errno of /proc/self/fd and fcntl().
  [[nodiscard]] static Result<Userfaultfd> adopt(int fd) noexcept {
    Userfaultfd adopted;
    adopted.fd_ = fd;
    adopted.kernel_faults_ = true;  // as far as its maker could have them
    char path[48];
    char link[64];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    const ssize_t length = ::readlink(path, link, sizeof link);
    if (length < 0) return fail_errno(Stage::setup, "adopt a userfaultfd: /proc/self/fd");
    if (std::string_view(link, static_cast<std::size_t>(length)) != "anon_inode:[userfaultfd]")
      return fail(Errc::not_userfaultfd, Stage::setup, "adopt a userfaultfd", 0, 0,
                  std::string_view(link, static_cast<std::size_t>(length)));
    // poll() says POLLERR of a blocking one, and of one that has not been told UFFDIO_API.
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
      return fail_errno(Stage::setup, "adopt a userfaultfd: O_NONBLOCK");
    pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
    if (::poll(&entry, 1, 0) < 0) return fail_errno(Stage::setup, "adopt a userfaultfd: poll");
    if ((entry.revents & POLLERR) != 0)
      return fail(Errc::not_userfaultfd, Stage::setup, "adopt a userfaultfd: its maker has not said UFFDIO_API");
    MULTIFD_TRY_ASSIGN(adopted.features_, read_features(fd));
    return adopted;
  }

  Userfaultfd(Userfaultfd&& other) noexcept { *this = std::move(other); }
  Userfaultfd& operator=(Userfaultfd&& other) noexcept {
    std::swap(fd_, other.fd_);
    features_ = other.features_;
    kernel_faults_ = other.kernel_faults_;
    return *this;
  }
  /// Closes. Where it was the last descriptor, threads that wait go on and find empty memory.
  ~Userfaultfd() {
    if (fd_ >= 0) ::close(fd_);
  }

  /// With FaultMode::minor both kinds of faults: pages that are not in memory yet are missing.
  /// Errors: errno: EINVAL (not mapped, or a kind of memory that has no such faults), EBUSY (another userfaultfd's), ENOMEM;
  ///   Errc::guest_gone.
  [[nodiscard]] Result<void> register_range(std::uint64_t address, std::uint64_t bytes, FaultMode mode) const noexcept {
    uffdio_register range{};
    range.range = {address, bytes};
    range.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (mode == FaultMode::minor) range.mode |= UFFDIO_REGISTER_MODE_MINOR;
    return call(UFFDIO_REGISTER, range, "UFFDIO_REGISTER", address);
  }

  /// Wakes who waits there. Errors: errno: EINVAL (not mapped); Errc::guest_gone.
  [[nodiscard]] Result<void> unregister(std::uint64_t address, std::uint64_t bytes) const noexcept {
    uffdio_range range{address, bytes};
    MULTIFD_TRY(call(UFFDIO_UNREGISTER, range, "UFFDIO_UNREGISTER", address));
    // The kernel wakes before it lets go, and a thread that faults in between (it holds the lock of its mapping only) would
    // wait for ever: seen with Linux 6.18.
    return wake(address, bytes);
  }

  /// Copies pages in, each unit at once and whole.
  [[nodiscard]] Result<std::uint64_t> copy(std::uint64_t address, std::span<const std::byte> pages,
                                           std::uint64_t unit_bytes) const noexcept {
    return place(address, pages.size(), unit_bytes, "UFFDIO_COPY", [&](std::uint64_t done) {
      uffdio_copy request{};
      request.dst = address + done;
      request.src = reinterpret_cast<std::uintptr_t>(pages.data()) + done;
      request.len = pages.size() - done;
      return Attempt{::ioctl(fd_, UFFDIO_COPY, &request), request.copy};
    });
  }

  /// Places zero pages: of anonymous memory one that all share, which costs no memory.
  [[nodiscard]] Result<std::uint64_t> zeropage(std::uint64_t address, std::uint64_t bytes,
                                               std::uint64_t unit_bytes) const noexcept {
    auto placed = place(address, bytes, unit_bytes, "UFFDIO_ZEROPAGE", [&](std::uint64_t done) {
      uffdio_zeropage request{};
      request.range = {address + done, bytes - done};
      return Attempt{::ioctl(fd_, UFFDIO_ZEROPAGE, &request), request.zeropage};
    });
    if (placed || placed.error().code != std::errc::invalid_argument) return placed;
    // hugetlbfs has none: from memory of ours that was never touched.
    void* const zeros = ::mmap(nullptr, unit_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeros == MAP_FAILED) return fail_errno(Stage::none, "mmap a zero page");
    std::uint64_t done = 0;
    while (done < bytes) {
      placed = copy(address + done, {static_cast<const std::byte*>(zeros), unit_bytes}, unit_bytes);
      if (!placed || *placed == 0) break;
      done += unit_bytes;
    }
    ::munmap(zeros, unit_bytes);
    if (!placed) return placed;
    return done;
  }

  /// Shows the guest pages that are in its shared memory. Errors: as placing; errno: EFAULT (they are not).
  [[nodiscard]] Result<std::uint64_t> continue_(std::uint64_t address, std::uint64_t bytes,
                                                std::uint64_t unit_bytes) const noexcept {
    return place(address, bytes, unit_bytes, "UFFDIO_CONTINUE", [&](std::uint64_t done) {
      uffdio_continue request{};
      request.range = {address + done, bytes - done};
      return Attempt{::ioctl(fd_, UFFDIO_CONTINUE, &request), request.mapped};
    });
  }

  /// Lets who waits there look again. Errors: errno.
  [[nodiscard]] Result<void> wake(std::uint64_t address, std::uint64_t bytes) const noexcept {
    uffdio_range range{address, bytes};
    return call(UFFDIO_WAKE, range, "UFFDIO_WAKE", address);
  }

  /// Reads what has happened, as many as there are and fit; 0: nothing. Does not wait. Errors: errno.
  [[nodiscard]] Result<std::size_t> read(std::span<UserfaultfdEvent> events) const noexcept {
    std::array<uffd_msg, most_at_once> messages;
    const std::size_t room = std::min(events.size(), messages.size());
    ssize_t got = 0;
    do got = ::read(fd_, messages.data(), room * sizeof(uffd_msg));
    while (got < 0 && errno == EINTR);
    if (got < 0) {
      if (errno == EAGAIN) return std::size_t{0};
      return fail_errno(Stage::read, "read a userfaultfd");
    }
    const auto count = static_cast<std::size_t>(got) / sizeof(uffd_msg);
    std::size_t told = 0;
    for (const uffd_msg& message : std::span(messages).first(count))
      if (translate(message, events[told])) ++told;
    return told;
  }
  /// How many events read() gives at most.
  static constexpr std::size_t most_at_once = 32;

  /// Whether the kernel refuses to place at the moment, because an event that is no fault has not been read or who caused it
  /// has not gone on yet. Cost: a system call that does nothing.
  bool layout_changes() const noexcept {
    uffdio_zeropage nothing{};  // the kernel says EAGAIN before it says EINVAL
    return ::ioctl(fd_, UFFDIO_ZEROPAGE, &nothing) < 0 && errno == EAGAIN;
  }

  std::uint64_t features() const noexcept { return features_; }
  bool serves_kernel_faults() const noexcept { return kernel_faults_; }
  /// Gives the descriptor away, and owns none from here on.
  int release() noexcept { return std::exchange(fd_, -1); }
  /// For poll(): readable when read() has something.
  int native_handle() const noexcept { return fd_; }

 private:
  struct Attempt {
    int result;
    std::int64_t done;  ///< bytes, when `result` is an EAGAIN behind some of them
  };

  Userfaultfd() = default;

  template <class Request>
  [[nodiscard]] Result<void> call(unsigned long number, Request& request, const char* op,
                                  std::uint64_t address) const noexcept {
    int result = 0;
    do result = ::ioctl(fd_, number, &request);
    while (result < 0 && errno == EINTR);
    if (result == 0) return {};
    // What is said of a process that has ended, too.
    if (errno == ENOMEM) errno = process_has_ended(address) ? ESRCH : ENOMEM;
    return std::unexpected(error_of(op, address));
  }

  /// Asks the kernel to copy a page that nobody may read, which changes nothing. It says ESRCH before it reads the page.
  bool process_has_ended(std::uint64_t address) const noexcept {
    const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    void* const page = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (page == MAP_FAILED) return false;
    uffdio_copy request{};
    request.dst = address;
    request.src = reinterpret_cast<std::uintptr_t>(page);
    request.len = bytes;
    const bool ended = ::ioctl(fd_, UFFDIO_COPY, &request) < 0 && errno == ESRCH;
    ::munmap(page, bytes);
    return ended;
  }

  static Error error_of(const char* op, std::uint64_t address) noexcept {
    Error error =
        errno == ESRCH ? fail(Errc::guest_gone, Stage::none, op).error() : fail_errno(Stage::none, op).error();
    error.detail = address;
    return error;
  }

  /// Repeats `attempt(done)` until all is done, or the layout is changing.
  template <class Try>
  [[nodiscard]] Result<std::uint64_t> place(std::uint64_t address, std::uint64_t bytes, std::uint64_t unit_bytes,
                                            const char* op, Try&& attempt) const noexcept {
    std::uint64_t done = 0;
    while (done < bytes) {
      const Attempt got = attempt(done);
      if (got.result == 0) return bytes;
      if (errno == EINTR) continue;
      if (errno == EAGAIN) {
        // Behind some pages: the next attempt says why it has stopped there.
        if (got.done <= 0) return done;
        done += static_cast<std::uint64_t>(got.done);
      } else if (errno == EEXIST) {
        // Somebody else was quicker, who has woken those that waited; a fault that was read late waits still.
        MULTIFD_TRY(wake(address + done, unit_bytes));
        done += unit_bytes;
      } else {
        return std::unexpected(error_of(op, address + done));
      }
    }
    return done;
  }

  /// False: nothing that anybody has to know.
  static bool translate(const uffd_msg& message, UserfaultfdEvent& event) noexcept {
    using Kind = UserfaultfdEvent::Kind;
    switch (message.event) {
      case UFFD_EVENT_PAGEFAULT:
        event = {.kind = Kind::fault,
                 .minor = (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0,
                 .address = message.arg.pagefault.address};
        return true;
      case UFFD_EVENT_REMOVE:
      case UFFD_EVENT_UNMAP:
        event = {.kind = message.event == UFFD_EVENT_REMOVE ? Kind::removed : Kind::unmapped,
                 .address = message.arg.remove.start,
                 .bytes = message.arg.remove.end - message.arg.remove.start};
        return true;
      case UFFD_EVENT_REMAP:
        event = {.kind = Kind::remapped,
                 .address = message.arg.remap.from,
                 .bytes = message.arg.remap.len,
                 .to = message.arg.remap.to};
        return true;
      case UFFD_EVENT_FORK:
        ::close(static_cast<int>(message.arg.fork.ufd));  // the child's own userfaultfd
        event = {.kind = Kind::forked};
        return true;
      default: return false;
    }
  }

  /// What UFFDIO_API was told, which only /proc says again: "API:\taa:8:1ffff".
  [[nodiscard]] static Result<std::uint64_t> read_features(int fd) noexcept {
    char path[48];
    std::snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    char text[1024];
    const int info = ::open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t got = info < 0 ? -1 : ::read(info, text, sizeof text - 1);
    if (info >= 0) ::close(info);
    if (got < 0) return fail_errno(Stage::setup, "adopt a userfaultfd: /proc/self/fdinfo");
    text[got] = '\0';
    const char* const api = std::strstr(text, "API:");
    const char* const features = api != nullptr ? std::strchr(api + 4, ':') : nullptr;
    if (features == nullptr) return std::uint64_t{0};
    return std::strtoull(features + 1, nullptr, 16) & 0x7fff'ffff;  // the top bit is the kernel's own
  }

  int fd_ = -1;
  std::uint64_t features_ = 0;
  bool kernel_faults_ = false;
};

}  // namespace multifd::postcopy
