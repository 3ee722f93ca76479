// SPDX-License-Identifier: MIT
#include "thread_guest.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "guest_code.hpp"
#include "guest_memory.hpp"

// Newer than the headers of some supported systems.
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace live {
namespace {

/// A thread that leaves the signals of the process to the others.
template <class Function>
std::thread quiet_thread(const char* name, Function function) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  try {
    thread = std::thread([name, function] {
      pthread_setname_np(pthread_self(), name);
      function();
    });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

/// Returns: a descriptor, or -1 and errno. Writes of the guest thread are faults of user mode, so the variant
/// that needs no privilege is enough; kernels before 5.11 do not know it, and some sandboxes allow only the
/// device.
int open_userfaultfd() {
  int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
  if (fd < 0 && errno == EINVAL) fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  if (fd >= 0) return fd;
  const int refused = errno;
  const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
  if (device < 0) {
    errno = refused;
    return -1;
  }
  fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  const int error = errno;
  close(device);
  errno = error;
  return fd;
}

/// The pages of one range that were written since they were last asked for.
///
/// All pages are write-protected. The first write to one faults; the handler thread sets its bit and lifts
/// the protection. Setting the bit and lifting, and taking the bit and protecting, are each done under one
/// lock: otherwise a fetch could fall between the two halves of the handler's work, which would then lift a
/// protection whose bit has been taken, and all later writes to that page would go unseen.
class WriteLog {
 public:
  WriteLog(std::span<std::byte> memory, Failure& failure)
      : memory_(memory), failure_(failure), bitmap_(bitmap_words(memory.size()), 0), fd_(open_userfaultfd()) {
    if (fd_ < 0)
      throw std::runtime_error(
          fmt::format("userfaultfd: {}; allow the system call (seccomp), or run with access to /dev/userfaultfd",
                      std::strerror(errno)));
    try {
      start();
    } catch (...) {
      close(fd_);
      if (stop_event_ >= 0) close(stop_event_);
      throw;
    }
  }

  ~WriteLog() {
    const std::uint64_t one = 1;
    // Cannot fail: the counter starts at 0.
    [[maybe_unused]] const auto written = write(stop_event_, &one, sizeof one);
    handler_.join();
    close(stop_event_);
    close(fd_);  // lifts all protections, and wakes a thread that waits in a fault
  }

  /// Takes the bits and protects their pages again.
  void fetch(std::span<std::uint64_t> bitmap) {
    const std::size_t pages = memory_.size() / guest_page_size;
    if (std::string why = failure_.get(); !why.empty()) throw std::runtime_error(why);
    std::size_t page = 0;
    while (page < pages) {
      const std::lock_guard lock(mutex_);
      // A few runs per lock, so that neither a faulting guest nor this waits long for the other.
      for (const std::size_t pause = page + 64 * 64; page < pages && page < pause;) {
        const std::uint64_t word = bitmap_[page / 64] >> (page % 64);
        if (word == 0) {
          page = (page / 64 + 1) * 64;
          continue;
        }
        page += static_cast<std::size_t>(std::countr_zero(word));
        const std::size_t run_begin = page;
        while (page < pages && (bitmap_[page / 64] >> (page % 64) & 1) != 0) {
          const std::uint64_t bit = std::uint64_t{1} << (page % 64);
          bitmap_[page / 64] &= ~bit;
          bitmap[page / 64] |= bit;
          ++page;
        }
        if (const int error = set_protection(run_begin, page - run_begin, UFFDIO_WRITEPROTECT_MODE_WP); error != 0)
          throw std::runtime_error(fmt::format("userfaultfd cannot protect memory again: {}", std::strerror(error)));
      }
    }
  }

 private:
  void start() {
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
    if (ioctl(fd_, UFFDIO_API, &api) < 0)
      throw std::runtime_error(
          fmt::format("userfaultfd without write-protection: {}; needs Linux 5.7 or later", std::strerror(errno)));
    populate();
    uffdio_register range{};
    range.range = {reinterpret_cast<std::uint64_t>(memory_.data()), memory_.size()};
    range.mode = UFFDIO_REGISTER_MODE_WP;
    if (ioctl(fd_, UFFDIO_REGISTER, &range) < 0)
      throw std::runtime_error(fmt::format("userfaultfd cannot watch guest memory: {}", std::strerror(errno)));
    stop_event_ = eventfd(0, EFD_CLOEXEC);
    if (stop_event_ < 0) throw std::runtime_error(fmt::format("eventfd: {}", std::strerror(errno)));
    handler_ = quiet_thread("dirty-log", [this] { handle_faults(); });
    // Only now, when the handler thread can lift the protection: the guest may run already.
    if (const int error = set_protection(0, memory_.size() / guest_page_size, UFFDIO_WRITEPROTECT_MODE_WP);
        error != 0) {
      const std::uint64_t one = 1;
      [[maybe_unused]] const auto written = write(stop_event_, &one, sizeof one);
      handler_.join();
      throw std::runtime_error(fmt::format("userfaultfd cannot protect guest memory: {}", std::strerror(error)));
    }
  }

  /// Protection sticks to pages that are there. Reading maps the shared page of zeros where nothing was
  /// written yet.
  void populate() {
    if (madvise(memory_.data(), memory_.size(), MADV_POPULATE_READ) == 0) return;
    for (std::size_t at = 0; at < memory_.size(); at += guest_page_size)
      static_cast<void>(std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(memory_.data() + at))
                            .load(std::memory_order_relaxed));
  }

  /// Returns: 0 or errno. Lifting a protection also wakes the thread that waits for it.
  int set_protection(std::size_t first_page, std::size_t pages, std::uint64_t mode) {
    uffdio_writeprotect request{};
    request.range = {reinterpret_cast<std::uint64_t>(memory_.data() + first_page * guest_page_size),
                     pages * guest_page_size};
    request.mode = mode;
    // EAGAIN: the address space was changing.
    while (ioctl(fd_, UFFDIO_WRITEPROTECT, &request) < 0)
      if (errno != EAGAIN && errno != EINTR) return errno;
    return 0;
  }

  void handle_faults() {
    std::string why = serve();
    if (why.empty()) return;
    // Without a handler the guest would wait in its next fault for ever. Let it write, unseen, and say so.
    uffdio_range range{reinterpret_cast<std::uint64_t>(memory_.data()), memory_.size()};
    ioctl(fd_, UFFDIO_UNREGISTER, &range);
    failure_.set(std::move(why));
  }

  /// Returns: why faults can no longer be served, or nothing when told to stop.
  std::string serve() {
    std::array<pollfd, 2> wait = {{{fd_, POLLIN, 0}, {stop_event_, POLLIN, 0}}};
    for (;;) {
      if (poll(wait.data(), wait.size(), -1) < 0) {
        if (errno == EINTR) continue;
        return fmt::format("dirty log: poll: {}", std::strerror(errno));
      }
      if (wait[1].revents != 0) return {};
      uffd_msg message;
      const ssize_t got = read(fd_, &message, sizeof message);
      if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
      if (got != static_cast<ssize_t>(sizeof message))
        return fmt::format("dirty log: read of userfaultfd: {}", std::strerror(got < 0 ? errno : EIO));
      if (message.event != UFFD_EVENT_PAGEFAULT || (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) == 0)
        return fmt::format("dirty log: unexpected userfaultfd event {}", +message.event);
      const std::uint64_t offset = message.arg.pagefault.address - reinterpret_cast<std::uint64_t>(memory_.data());
      const std::size_t page = offset / guest_page_size;

      const std::lock_guard lock(mutex_);
      bitmap_[page / 64] |= std::uint64_t{1} << (page % 64);
      if (const int error = set_protection(page, 1, 0); error != 0)
        return fmt::format("dirty log: userfaultfd cannot lift a protection: {}", std::strerror(error));
    }
  }

  std::span<std::byte> memory_;
  Failure& failure_;
  std::mutex mutex_;
  std::vector<std::uint64_t> bitmap_;  // under mutex_
  int fd_ = -1;
  int stop_event_ = -1;
  std::thread handler_;
};

class ThreadGuest final : public Guest {
 public:
  explicit ThreadGuest(const GuestConfig& config) : config_(config), memory_(config.memory_bytes) {}

  // The log is there until the guest has stopped: its thread may wait in a fault.
  ~ThreadGuest() override { stop(); }

  std::string_view backend() const override { return "thread"; }
  std::span<std::byte> memory() override { return memory_.bytes(); }

  void boot() override {
    // Each page is protected on its own, so huge pages would only be split. No matter if the kernel has none.
    madvise(memory_.bytes().data(), memory_.bytes().size(), MADV_NOHUGEPAGE);
    fill_memory(memory_.bytes(), config_);
    registers_ = boot_program(memory_.bytes(), config_);
  }

  void run() override {
    if (thread_.joinable()) throw std::runtime_error("the guest runs already");
    check_resumable(memory_.bytes(), registers_);
    stopping_.store(false, std::memory_order_relaxed);
    pacer_.start(mailbox_word(memory_.bytes(), MailboxWord::dirty_bytes_per_s), config_.quiet);
    thread_ = quiet_thread("vcpu0", [this] { vcpu_loop(); });
  }

  void stop() override {
    if (!thread_.joinable()) return;
    stopping_.store(true, std::memory_order_relaxed);
    pacer_.interrupt();
    thread_.join();
  }

  void start_dirty_log() override {
    log_.reset();
    log_ = std::make_unique<WriteLog>(memory_.bytes(), failure_);
  }

  void fetch_dirty(std::span<std::uint64_t> bitmap) override {
    if (log_ == nullptr) throw std::runtime_error("fetch_dirty without start_dirty_log");
    if (bitmap.size() < bitmap_words(memory_.bytes().size()))
      throw std::runtime_error("fetch_dirty: the bitmap is too short");
    log_->fetch(bitmap);
  }

  void stop_dirty_log() override { log_.reset(); }

  std::vector<std::byte> save_state() override {
    if (thread_.joinable()) throw std::runtime_error("save_state of a running guest");
    return encode_state(backend(), memory_.bytes().size(), std::as_bytes(std::span(&registers_, 1)));
  }

  void load_state(std::span<const std::byte> bytes) override {
    if (thread_.joinable()) throw std::runtime_error("load_state into a running guest");
    const auto payload = decode_state(bytes, backend(), memory_.bytes().size(), sizeof(Registers));
    Registers registers;
    std::memcpy(&registers, payload.data(), sizeof registers);
    check_resumable(memory_.bytes(), registers);
    registers_ = registers;
  }

  GuestReport report() override {
    GuestReport report = read_mailbox(memory_.bytes());
    report.failure = failure_.get();
    return report;
  }

 private:
  void vcpu_loop() {
    Registers registers = registers_;
    const auto memory = memory_.bytes();
    const std::uint64_t pages_per_exit = mailbox_word(memory, MailboxWord::pages_per_exit);
    while (!stopping_.load(std::memory_order_relaxed)) {
      step(memory, registers);
      if (--registers.countdown == 0) {
        registers.countdown = pages_per_exit;
        pacer_.wait(pages_per_exit);
      }
    }
    registers_ = registers;
  }

  GuestConfig config_;
  GuestMemory memory_;
  Registers registers_;  // while the guest runs, its thread has a copy
  Pacer pacer_;
  Failure failure_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
  std::unique_ptr<WriteLog> log_;
};

}  // namespace

std::unique_ptr<Guest> make_thread_guest(const GuestConfig& config) { return std::make_unique<ThreadGuest>(config); }

}  // namespace live
