// SPDX-License-Identifier: MIT
//
// The memory of another process, served through the userfaultfd that it has handed over.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "unit/postcopy/lazy_guest.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

constexpr std::uint64_t guest_bytes = std::uint64_t{8} << 20;

/// A VMM that makes its memory and a userfaultfd, hands the descriptor over, and reads its memory: once, or for ever. After
/// fork() in a program with threads only system calls are safe.
class Vmm {
 public:
  enum class Reads { all_once, for_ever };
  Vmm(const FakeStore& store, Reads reads) {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    pid_ = ::fork();
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) run(ends[1], store, reads);
    ::close(ends[1]);
    iovec data{&address_, sizeof address_};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    REQUIRE(::recvmsg(ends[0], &message, MSG_CMSG_CLOEXEC) == sizeof address_);
    REQUIRE(CMSG_FIRSTHDR(&message) != nullptr);
    std::memcpy(&fd_, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd_);
    ::close(ends[0]);
    pidfd_ = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));
    REQUIRE(pidfd_ >= 0);
  }
  Vmm(const Vmm&) = delete;
  Vmm& operator=(const Vmm&) = delete;
  ~Vmm() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    ::close(pidfd_);
  }

  /// How many pages were wrong, or -1 when it has not ended by itself.
  int wrong_pages() {
    int status = 0;
    REQUIRE(::waitpid(std::exchange(pid_, -1), &status, 0) > 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  void kill() { REQUIRE(::kill(pid_, SIGKILL) == 0); }
  LazyRegion region() const { return {.address = address_, .bytes = guest_bytes}; }
  int take_fd() { return std::exchange(fd_, -1); }
  int pidfd() const { return pidfd_; }

 private:
  [[noreturn]] static void run(int socket, const FakeStore& store, Reads reads) {
    void* const memory = ::mmap(nullptr, guest_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto fd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC));  // blocking, as some hand it over
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = UFFD_FEATURE_EVENT_REMOVE;
    std::uint64_t address = reinterpret_cast<std::uintptr_t>(memory);
    uffdio_register range{};
    range.range = {address, guest_bytes};
    range.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (memory == MAP_FAILED || fd < 0 || ::ioctl(fd, UFFDIO_API, &api) != 0 ||
        ::ioctl(fd, UFFDIO_REGISTER, &range) != 0)
      ::_exit(101);
    iovec data{&address, sizeof address};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &data;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (::sendmsg(socket, &message, MSG_NOSIGNAL) != sizeof address) ::_exit(102);
    const std::uint64_t pages = guest_bytes / page_size;
    const auto* const words = static_cast<const volatile std::uint64_t*>(memory);
    int wrong = 0;
    std::uint64_t page = 0;
    for (std::uint64_t i = 0; reads == Reads::for_ever || i < pages; ++i) {
      page = (page + 911) % pages;  // all of them, not in order
      const bool given = i > pages / 2 && page < 16;
      for (std::uint64_t word = 0; word < page_size / 8; word += 100)
        if (words[page * page_size / 8 + word] != (given ? 0 : store.word(0, page))) ++wrong;
      if (i == pages / 2) ::madvise(memory, 16 * page_size, MADV_DONTNEED);
    }
    ::_exit(wrong > 99 ? 99 : wrong);
  }

  pid_t pid_ = -1;
  std::uint64_t address_ = 0;
  int fd_ = -1;
  int pidfd_ = -1;
};

std::unique_ptr<LazyMemory> serve(Vmm& vmm, FakeStore& store, LazyMemoryOptions options) {
  auto fd = Userfaultfd::adopt(vmm.take_fd());
  REQUIRE_MESSAGE(fd.has_value(), text(fd));
  CHECK(fd->features() == UFFD_FEATURE_EVENT_REMOVE);
  const LazyRegion region = vmm.region();
  options.registration = RegionRegistration::by_the_vmm;
  auto lazy = LazyMemory::open(std::move(*fd), std::span(&region, 1), store, std::move(options));
  REQUIRE_MESSAGE(lazy.has_value(), text(lazy));
  REQUIRE((*lazy)->start().has_value());
  return std::move(*lazy);
}

}  // namespace

TEST_CASE("Another process reads right bytes, and zeros where it has given memory back") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("another process");
  for (const unsigned workers : {0u, 2u}) {
    FakeStore store({guest_bytes}, {.slowest = 20us});
    Vmm vmm(store, Vmm::Reads::all_once);
    const auto lazy = serve(vmm, store, {.workers = workers, .pidfd = vmm.pidfd()});
    if (workers > 0) {
      const auto done = lazy->wait(no_hang);
      CHECK_MESSAGE((done.has_value() || done.error().code == Errc::guest_gone), text(done));
    }
    CHECK(vmm.wrong_pages() == 0);
  }
}

TEST_CASE("A process that is killed is noticed, by its pidfd at once and without at the next page") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("killed process");
  for (const bool pidfd : {true, false}) {
    CAPTURE(pidfd);
    FakeStore store({guest_bytes}, {.slowest = 2000us});
    Vmm vmm(store, Vmm::Reads::for_ever);
    const auto lazy = serve(vmm, store, {.workers = pidfd ? 0u : 1u, .pidfd = pidfd ? vmm.pidfd() : -1});
    REQUIRE(eventually([&] { return lazy->stats().faults > 2; }));
    vmm.kill();
    CHECK(code_of(lazy->wait(no_hang)) == Errc::guest_gone);
    CHECK(lazy->status() == LazyMemoryStatus::failed);
  }
}

TEST_CASE("Of a process that has ended every call says so, whatever the kernel says") {
  if (!have_userfaultfd()) return;
  const FakeStore store({guest_bytes});
  Vmm vmm(store, Vmm::Reads::for_ever);
  const auto fd = Userfaultfd::adopt(vmm.take_fd());
  REQUIRE_MESSAGE(fd.has_value(), text(fd));
  const std::uint64_t address = vmm.region().address;
  CHECK(fd->register_range(address, guest_bytes, FaultMode::missing).has_value());
  vmm.kill();
  pollfd ended{.fd = vmm.pidfd(), .events = POLLIN, .revents = 0};
  REQUIRE(::poll(&ended, 1, 10'000) == 1);
  const std::vector<std::byte> page(page_size);
  CHECK(code_of(fd->copy(address, page, page_size)) == Errc::guest_gone);
  CHECK(code_of(fd->zeropage(address, page_size, page_size)) == Errc::guest_gone);
  CHECK(code_of(fd->continue_(address, page_size, page_size)) == Errc::guest_gone);
  CHECK(code_of(fd->register_range(address, guest_bytes, FaultMode::missing)) == Errc::guest_gone);
  CHECK(code_of(fd->unregister(address, guest_bytes)) == Errc::guest_gone);
}
