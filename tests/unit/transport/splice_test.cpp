// SPDX-License-Identifier: MIT
#include "multifd/transport/splice.hpp"

#include <doctest/doctest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <type_traits>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/any_transport.hpp"
#include "multifd/transport/capped.hpp"
#include "support/memory.hpp"
#include "support/skip.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using test::FdPair;
using test::tcp_pair;
using test::unix_pair;

namespace {

static_assert(HasAnswers<SpliceTransport> && HasTimeLimits<SpliceTransport> && HasReadFull<SpliceTransport>);
static_assert(HasPinnedWrites<AnyTransport<FdTransport, SpliceTransport>> && HasPinnedWrites<Capped<SpliceTransport>>);
static_assert(!HasPinnedWrites<FdTransport> && !HasPinnedWrites<AnyTransport<FdTransport>> &&
              !HasPinnedWrites<Capped<FdTransport>>);
static_assert(std::is_nothrow_move_constructible_v<SpliceTransport>);

/// A writer over a socket, and the other end.
struct Pair {
  explicit Pair(FdPair pair) : writer(std::move(pair.first)), reader(std::move(pair.second)) {}
  SpliceTransport writer;
  FdTransport reader;
};

std::vector<std::byte> read(FdTransport& reader, std::size_t bytes) {
  std::vector<std::byte> got(bytes);
  const auto done = read_exact(reader, std::span(got));
  REQUIRE_MESSAGE(done.has_value(), test::text(done));
  return got;
}

bool all_are(std::span<const std::byte> bytes, int value) {
  return std::ranges::all_of(bytes, [&](std::byte byte) { return byte == static_cast<std::byte>(value); });
}

bool sigpipe_is_pending() {
  sigset_t pending;
  ::sigpending(&pending);
  return sigismember(&pending, SIGPIPE) == 1;
}

/// Opens no more descriptors, as long as it lives.
class NoDescriptors {
 public:
  NoDescriptors() {
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    rlimit now = before_;
    now.rlim_cur = 0;
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &now) == 0);
  }
  ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

}  // namespace

TEST_CASE("write_some() copies, and what write_pinned() gets is read when the peer reads it") {
  for (const auto make : {unix_pair, tcp_pair}) {
    Pair ends(make());
    const test::Block memory(8 * 4096);
    memory.fill(std::byte{1});
    REQUIRE(write_all(ends.writer, std::span<const std::byte>(memory.bytes())).has_value());
    iovec pages = const_buffer(memory.bytes());
    REQUIRE(write_all_pinned(ends.writer, std::span(&pages, 1)).has_value());
    CHECK(ends.writer.pins());
    memory.fill(std::byte{2});
    CHECK(all_are(read(ends.reader, memory.size()), 1));
    CHECK(all_are(read(ends.reader, memory.size()), 2));
  }
}

TEST_CASE("Memory that is given back after it was sent still arrives") {
  for (const auto make : {unix_pair, tcp_pair}) {
    Pair ends(make());
    constexpr std::size_t bytes = 16 * 4096;
    {
      const test::Block memory(bytes);
      memory.fill(std::byte{7});
      iovec pages = const_buffer(memory.bytes());
      REQUIRE(write_all_pinned(ends.writer, std::span(&pages, 1)).has_value());
    }
    const test::Block other(bytes);  // what the kernel may have found for it
    other.fill(std::byte{9});
    CHECK(all_are(read(ends.reader, bytes), 7));
  }
}

TEST_CASE("A write_pinned() that nobody reads returns with what has left, and nothing stays in the pipe") {
  for (const bool blocking : {true, false}) {
    CAPTURE(blocking);
    Pair ends(unix_pair());
    if (!blocking) REQUIRE(::fcntl(ends.writer.native_handle(), F_SETFL, O_NONBLOCK) == 0);
    const test::Block memory(4 << 20);
    for (std::size_t at = 0; at < memory.size(); at += 8) std::memcpy(memory.data() + at, &at, 8);
    std::array<iovec, 2> parts{const_buffer(memory.bytes().first(5)), const_buffer(memory.bytes().subspan(5))};
    const auto first = ends.writer.write_pinned(parts);
    REQUIRE_MESSAGE(first.has_value(), test::text(first));
    CHECK(*first > 0);
    CHECK(*first < memory.size());
    auto rest = std::async(std::launch::async,
                           [&] { return write_all_pinned(ends.writer, drop_front(std::span(parts), *first)); });
    CHECK(test::same_bytes(read(ends.reader, memory.size()), memory.bytes()));
    const auto done = rest.get();
    CHECK_MESSAGE(done.has_value(), test::text(done));
    CHECK(ends.writer.pins());
  }
}

TEST_CASE("A peer that is gone is an error and no signal, whether the thread has SIGPIPE blocked or not") {
  for (const auto make : {unix_pair, tcp_pair}) {
    for (const int how : {SIG_BLOCK, SIG_UNBLOCK}) {
      sigset_t pipe, before;
      sigemptyset(&pipe);
      sigaddset(&pipe, SIGPIPE);
      ::pthread_sigmask(how, &pipe, &before);
      FdPair pair = make();
      SpliceTransport writer(std::move(pair.first));
      {
        const FdTransport gone(std::move(pair.second));
      }
      const test::Block memory(64 * 4096);
      Result<std::size_t> count = 0;
      for (int i = 0; count && i < 100; ++i) {  // over TCP the first ones may be taken
        const iovec pages = const_buffer(memory.bytes());
        count = writer.write_pinned(std::span(&pages, 1));
      }
      CHECK_FALSE(count.has_value());
      if (!count) CHECK(count.error().code == Condition::peer_gone);
      CHECK_FALSE(sigpipe_is_pending());
      ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
  }
}

TEST_CASE("Where there is no pipe, or it would go into none, bytes are copied") {
  SUBCASE("no descriptor is left") {
    Pair ends(unix_pair());
    const test::Block memory(8 * 4096);
    memory.fill(std::byte{1});
    {
      const NoDescriptors none;
      iovec pages = const_buffer(memory.bytes());
      REQUIRE(write_all_pinned(ends.writer, std::span(&pages, 1)).has_value());
    }
    CHECK_FALSE(ends.writer.pins());
    memory.fill(std::byte{2});
    CHECK(all_are(read(ends.reader, memory.size()), 1));
  }
  SUBCASE("a pipe, not a socket") {
    Pair ends(test::pipe_pair());
    const test::Block memory(4096);
    memory.fill(std::byte{1});
    iovec pages = const_buffer(memory.bytes());
    REQUIRE(write_all_pinned(ends.writer, std::span(&pages, 1)).has_value());
    CHECK_FALSE(ends.writer.pins());
    memory.fill(std::byte{2});
    CHECK(all_are(read(ends.reader, memory.size()), 1));
  }
}

TEST_CASE("A user who has as much memory in pipes as the kernel grants copies") {
  // In a process of its own, because it is not root any more.
  const pid_t child = ::fork();
  if (child == 0) {
    constexpr int works = 0, skipped = 1, wrong = 2;
    if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) ::_exit(skipped);
    bool refused = false;
    for (int i = 0; i < 400 && !refused; ++i) {
      int ends[2];
      refused = ::pipe(ends) != 0 || ::fcntl(ends[1], F_SETPIPE_SZ, 1 << 20) < 0;
    }
    int sockets[2];
    if (!refused || ::socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) != 0) ::_exit(skipped);
    auto link = FdTransport::adopt(sockets[0]);
    if (!link) ::_exit(wrong);
    SpliceTransport writer(std::move(*link));
    static char bytes[8192] = {7}, got[8192];
    iovec buffer = const_buffer(bytes, sizeof bytes);
    const bool written = write_all_pinned(writer, std::span(&buffer, 1)).has_value() && !writer.pins();
    const bool arrived = ::recv(sockets[1], got, sizeof got, MSG_WAITALL) == sizeof got && got[0] == 7;
    ::_exit(written && arrived ? works : wrong);
  }
  REQUIRE(child > 0);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 1) return test::skip("no limit of pipes here");
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("Memory whose pages the kernel does not lend is copied, and other memory still is not") {
#if defined(SYS_memfd_secret)
  const int file = static_cast<int>(::syscall(SYS_memfd_secret, O_CLOEXEC));
#else
  const int file = -1;
#endif
  if (file < 0) return test::skip("no memfd_secret() here");
  const detail::UniqueFd owned(file);
  REQUIRE(::ftruncate(file, 4096) == 0);
  void* const secret = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (secret == MAP_FAILED) return test::skip("no memfd_secret() here");
  std::memset(secret, 3, 4096);
  Pair ends(unix_pair());
  const test::Block memory(4096);
  memory.fill(std::byte{1});
  std::array<iovec, 3> parts{const_buffer(memory.bytes()), const_buffer(secret, 4096), const_buffer(memory.bytes())};
  REQUIRE(write_all_pinned(ends.writer, std::span(parts)).has_value());
  CHECK(ends.writer.pins());
  const auto got = read(ends.reader, 3 * 4096);
  CHECK(all_are(std::span(got).first(4096), 1));
  CHECK(all_are(std::span(got).subspan(4096, 4096), 3));
  CHECK(all_are(std::span(got).last(4096), 1));
  ::munmap(secret, 4096);
}

TEST_CASE("Under the cap of a path pages are copied, and without one they are not") {
  for (const std::uint64_t rate : {std::uint64_t{0}, std::uint64_t{1} << 40}) {
    auto [out, in] = unix_pair();
    const auto path = std::make_shared<PathShared>(rate);
    Capped<SpliceTransport> writer(std::move(out), path);
    const test::Block memory(8 * 4096);
    memory.fill(std::byte{1});
    iovec pages = const_buffer(memory.bytes());
    REQUIRE(write_all_pinned(writer, std::span(&pages, 1)).has_value());
    CHECK(path->written_bytes() == memory.size());
    memory.fill(std::byte{2});
    CHECK(all_are(read(in, memory.size()), rate == 0 ? 2 : 1));
  }
}
