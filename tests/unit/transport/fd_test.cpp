// SPDX-License-Identifier: MIT
#include "multifd/transport/fd.hpp"

#include <doctest/doctest.h>

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <future>
#include <memory>
#include <ostream>
#include <thread>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using test::FdPair;

namespace {

constexpr auto patience = 10s;

struct Kind {
  const char* name;
  FdPair (*make)();
};
const Kind all_kinds[] = {{"tcp", test::tcp_pair}, {"unix", test::unix_pair}, {"pipe", test::pipe_pair}};

Result<std::size_t> read_byte(FdTransport& transport) {
  std::byte byte;
  const iovec buffer = mutable_buffer(std::span(&byte, 1));
  return transport.read_some(std::span(&buffer, 1));
}

Result<std::size_t> write_byte(FdTransport& transport) {
  const std::byte byte{1};
  const iovec buffer = const_buffer(std::span(&byte, 1));
  return transport.write_some(std::span(&buffer, 1));
}

/// Reads until the stream ends: the number of bytes, or the error.
Result<std::size_t> drain(FdTransport& transport) {
  std::vector<std::byte> bytes(1 << 16);
  const iovec buffer = mutable_buffer(bytes);
  for (std::size_t sum = 0;;) {
    const auto count = transport.read_some(std::span(&buffer, 1));
    if (!count) return count;
    if (*count == 0) return sum;
    sum += *count;
  }
}

Result<void> write_until_it_fails(FdTransport& transport) {
  const std::vector<std::byte> bytes(1 << 16);
  for (;;) {
    if (auto result = write_all(transport, std::span<const std::byte>(bytes)); !result) return result;
  }
}

/// Waits until the stream takes no more bytes, so that its writer is about to block or blocks already.
void wait_until_full(int fd) {
  pollfd entry{.fd = fd, .events = POLLOUT, .revents = 0};
  const test::Stopwatch time;
  for (int full = 0; full < 5 && time.elapsed() < std::chrono::milliseconds(5000);) {
    full = ::poll(&entry, 1, 0) == 0 ? full + 1 : 0;
    ::poll(nullptr, 0, 2);
  }
}

}  // namespace

TEST_CASE("FdTransport is move-only") {
  static_assert(!std::is_copy_constructible_v<FdTransport> && !std::is_copy_assignable_v<FdTransport>);
  static_assert(std::is_nothrow_move_constructible_v<FdTransport> && std::is_nothrow_move_assignable_v<FdTransport>);
  FdPair pair = test::unix_pair();
  const int fd = pair.first.native_handle();
  FdTransport moved = std::move(pair.first);
  CHECK(moved.native_handle() == fd);
  CHECK(pair.first.native_handle() == -1);
  pair.first.shutdown();  // of nothing
  const auto written = write_byte(pair.first);
  REQUIRE_FALSE(written.has_value());
  FdPair other = test::unix_pair();
  other.first = std::move(moved);  // closes what it was
  const auto end = read_byte(other.second);
  REQUIRE(end.has_value());
  CHECK(*end == 0);
  CHECK(write_byte(other.first).has_value());
}

TEST_CASE("adopt refuses what is no stream, and closes it") {
  const auto refused = FdTransport::adopt(-1);
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == std::errc::bad_file_descriptor);

  const int datagrams = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  const auto wrong_type = FdTransport::adopt(datagrams);
  REQUIRE_FALSE(wrong_type.has_value());
  CHECK(wrong_type.error().code == Errc::not_supported);
  CHECK(::fcntl(datagrams, F_GETFD) == -1);
}

TEST_CASE("finish lets the peer read everything, also when the transport is destroyed at once") {
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    constexpr std::size_t size = 3 << 20;
    auto writing = std::async(std::launch::async, [writer = std::move(pair.first)]() mutable {
      FdTransport mine = std::move(writer);
      const std::vector<std::byte> bytes(size);
      auto result = write_all(mine, std::span<const std::byte>(bytes));
      return result ? mine.finish() : result;
    });
    const auto received = drain(pair.second);
    CHECK(writing.get().has_value());
    REQUIRE(received.has_value());
    CHECK(*received == size);
  }
}

TEST_CASE("destruction after finish loses nothing that the peer had no room for yet") {
  for (const Kind& kind : {all_kinds[0], all_kinds[1]}) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    const std::vector<std::byte> bytes(1 << 16);
    std::size_t sent = 0;
    for (ssize_t count = 0; count >= 0; sent += static_cast<std::size_t>(std::max<ssize_t>(count, 0))) {
      count = ::send(pair.first.native_handle(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    }
    REQUIRE(errno == EAGAIN);
    REQUIRE(pair.first.finish().has_value());
    {
      const FdTransport gone = std::move(pair.first);
    }
    const auto received = drain(pair.second);
    REQUIRE(received.has_value());
    CHECK(*received == sent);
  }
}

TEST_CASE("after finish the stream takes no more") {
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    REQUIRE(pair.first.finish().has_value());
    const auto written = write_byte(pair.first);
    REQUIRE_FALSE(written.has_value());
    CHECK(written.error().stage == Stage::write);
  }
}

TEST_CASE("TCP: shutdown makes the peer see a reset and not an end") {
  FdPair pair = test::tcp_pair();
  SUBCASE("idle peer") {}
  SUBCASE("peer that blocks in a read") {
    auto reading = std::async(std::launch::async, [&] { return drain(pair.second); });
    REQUIRE(reading.wait_for(30ms) == std::future_status::timeout);
    pair.first.shutdown();
    REQUIRE(reading.wait_for(patience) == std::future_status::ready);
    const auto result = reading.get();
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == std::errc::connection_reset);
    return;
  }
  SUBCASE("after data that the peer has not read") { REQUIRE(write_byte(pair.first).has_value()); }
  SUBCASE("with the own reader blocked") {
    auto reading = std::async(std::launch::async, [&] { return drain(pair.first); });
    REQUIRE(reading.wait_for(30ms) == std::future_status::timeout);
    pair.first.shutdown();
    REQUIRE(reading.wait_for(patience) == std::future_status::ready);
    const auto own = reading.get();
    REQUIRE_FALSE(own.has_value());
    CHECK(own.error().code == Errc::cancelled);
  }
  pair.first.shutdown();
  const auto result = drain(pair.second);
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == std::errc::connection_reset);
  CHECK(result.error().code == Condition::peer_gone);
  CHECK(result.error().stage == Stage::read);
}

TEST_CASE("TCP: destruction without finish makes the peer see a reset") {
  FdPair pair = test::tcp_pair();
  REQUIRE(write_byte(pair.first).has_value());
  {
    const FdTransport gone = std::move(pair.first);
  }
  const auto result = drain(pair.second);
  REQUIRE_FALSE(result.has_value());
  CHECK(result.error().code == std::errc::connection_reset);
}

TEST_CASE("TCP: a kernel that refuses to reset a connection in use still gets it ended") {
  // Linux 6.5 and 6.6 do: here a filter of the thread that calls shutdown() refuses in their place.
  static const auto refuse_connect = [] {
    sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_connect, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EBUSY),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog filter{.len = sizeof program / sizeof *program, .filter = program};
    return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
  };
  FdPair pair = test::tcp_pair();
  std::future<Result<void>> writing;
  std::future<Result<std::size_t>> reading;
  bool writer = false;
  SUBCASE("blocked writer: the peer sees a reset") {
    writer = true;
    writing = std::async(std::launch::async, [&] { return write_until_it_fails(pair.first); });
    wait_until_full(pair.first.native_handle());
  }
  SUBCASE("blocked reader") {
    reading = std::async(std::launch::async, [&] { return drain(pair.first); });
    REQUIRE(reading.wait_for(30ms) == std::future_status::timeout);
  }
  bool filtered = false;
  std::thread([&] {
    filtered = refuse_connect();
    if (filtered) pair.first.shutdown();
  }).join();
  if (!filtered) {
    pair.first.shutdown();
    MESSAGE("no seccomp here: the fallback was not tested");
  }
  if (writer) {
    REQUIRE(writing.wait_for(patience) == std::future_status::ready);
    CHECK_FALSE(writing.get().has_value());
    {
      const FdTransport gone = std::move(pair.first);
    }
    const auto result = drain(pair.second);
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code == std::errc::connection_reset);
  } else {
    REQUIRE(reading.wait_for(patience) == std::future_status::ready);
    CHECK_FALSE(reading.get().has_value());
  }
}

TEST_CASE("shutdown ends a blocked read and a blocked write, and everything after") {
  for (const Kind& kind : all_kinds) {
    for (const bool non_blocking : {false, true}) {
      CAPTURE(kind.name);
      CAPTURE(non_blocking);
      FdPair pair = kind.make();
      if (non_blocking) {
        for (FdTransport* end : {&pair.first, &pair.second}) {
          REQUIRE(::fcntl(end->native_handle(), F_SETFL, O_NONBLOCK | O_RDWR) == 0);
        }
      }
      auto reading = std::async(std::launch::async, [&] { return drain(pair.second); });
      REQUIRE(reading.wait_for(30ms) == std::future_status::timeout);
      pair.second.shutdown();
      REQUIRE(reading.wait_for(patience) == std::future_status::ready);
      const auto read = reading.get();
      REQUIRE_FALSE(read.has_value());
      CHECK(read.error().code == Errc::cancelled);
      CHECK_FALSE(read_byte(pair.second).has_value());

      pair = kind.make();
      auto writing = std::async(std::launch::async, [&] { return write_until_it_fails(pair.first); });
      wait_until_full(pair.first.native_handle());
      REQUIRE(writing.wait_for(0ms) == std::future_status::timeout);
      pair.first.shutdown();
      REQUIRE(writing.wait_for(patience) == std::future_status::ready);
      const auto written = writing.get();
      REQUIRE_FALSE(written.has_value());
      CHECK(written.error().code == Errc::cancelled);
      CHECK_FALSE(write_byte(pair.first).has_value());
      CHECK_FALSE(pair.first.finish().has_value());
    }
  }
}

TEST_CASE("shutdown from several threads while others read and write") {
  for (const Kind& kind : {all_kinds[0], all_kinds[1]}) {
    CAPTURE(kind.name);
    for (int round = 0; round < 20; ++round) {
      FdPair pair = kind.make();
      auto reading = std::async(std::launch::async, [&] { return drain(pair.first); });
      auto writing = std::async(std::launch::async, [&] { return write_until_it_fails(pair.first); });
      auto peer = std::async(std::launch::async, [&] { return drain(pair.second); });
      std::thread one([&] { pair.first.shutdown(); });
      std::thread other([&] { pair.first.shutdown(); });
      one.join();
      other.join();
      REQUIRE(reading.wait_for(patience) == std::future_status::ready);
      REQUIRE(writing.wait_for(patience) == std::future_status::ready);
      REQUIRE(peer.wait_for(patience) == std::future_status::ready);
    }
  }
}

TEST_CASE("a non-blocking socket waits for data and for room") {
  for (const Kind& kind : {all_kinds[0], all_kinds[1]}) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    for (FdTransport* end : {&pair.first, &pair.second}) {
      REQUIRE(::fcntl(end->native_handle(), F_SETFL, O_NONBLOCK | O_RDWR) == 0);
    }
    constexpr std::size_t size = 20 << 20;
    auto reading = std::async(std::launch::async, [&] { return drain(pair.second); });
    REQUIRE(reading.wait_for(20ms) == std::future_status::timeout);
    const std::vector<std::byte> bytes(size);
    REQUIRE(write_all(pair.first, std::span<const std::byte>(bytes)).has_value());
    REQUIRE(pair.first.finish().has_value());
    const auto received = reading.get();
    REQUIRE(received.has_value());
    CHECK(*received == size);
  }
}

TEST_CASE("a read and a write with a time limit end by it, by an Interrupt, and by shutdown, and take what is there") {
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    Interrupt interrupt = Interrupt::create().value();
    const std::vector<std::byte> bytes(1 << 20);
    std::vector<std::byte> room(1 << 20);
    const iovec in = mutable_buffer(room);
    const iovec out = const_buffer(std::span<const std::byte>(bytes));
    const auto read = [&](std::chrono::milliseconds limit, const Interrupt* by = nullptr) {
      return pair.second.read_some(std::span(&in, 1), limit, by);
    };
    const auto write = [&](std::chrono::milliseconds limit, const Interrupt* by = nullptr) {
      return pair.first.write_some(std::span(&out, 1), limit, by);
    };
    CHECK(read(0ms).error().code == Errc::timed_out);
    CHECK(read(5ms).error().code == Errc::timed_out);
    REQUIRE(write_byte(pair.first).has_value());
    CHECK(read(patience) == std::size_t{1});
    std::size_t sent = 0;
    for (;;) {  // until there is no room
      const auto wrote = write(20ms);
      if (!wrote) {
        CHECK(wrote.error().code == Errc::timed_out);
        break;
      }
      sent += *wrote;
    }
    // Room that comes later, and bytes.
    auto writing = std::async(std::launch::async, [&] { return write(patience); });
    std::size_t got = read(patience).value();
    while (writing.wait_for(0ms) != std::future_status::ready) got += read(1ms).value_or(0);
    sent += writing.get().value();
    while (got < sent) got += read(patience).value();
    CHECK(got == sent);
    auto waiting = std::async(std::launch::async, [&] { return read(patience, &interrupt); });
    CHECK(waiting.wait_for(20ms) == std::future_status::timeout);  // nothing tells that a call blocks
    interrupt.trigger();
    CHECK(waiting.get().error().code == Errc::cancelled);
    CHECK(write(patience, &interrupt).error().code == Errc::cancelled);
    auto cut = std::async(std::launch::async, [&] { return read(patience); });
    CHECK(cut.wait_for(20ms) == std::future_status::timeout);
    pair.second.shutdown();
    const auto ended = cut.get();
    CHECK((!ended && ended.error().code == Errc::cancelled));
  }
}

TEST_CASE("writing nothing, with a time limit or without, returns 0 at once") {
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    auto pair = std::make_shared<FdPair>(kind.make());
    auto writing = std::make_shared<std::promise<std::size_t>>();
    auto total = writing->get_future();
    std::thread([pair, writing] {
      const iovec empty[] = {{nullptr, 0}, {nullptr, 0}};
      std::size_t sum = 0;
      for (const ConstBuffers nothing : {ConstBuffers(), ConstBuffers(empty)})
        for (const auto timeout : {0ms, 60'000ms})
          sum += pair->first.write_some(nothing, timeout, nullptr).value_or(99);
      writing->set_value(sum);
    }).detach();  // a call that never returns keeps what it uses
    REQUIRE(total.wait_for(20s) == std::future_status::ready);
    CHECK(total.get() == 0);
  }
}

TEST_CASE(
    "a socket's own time limits show nobody: calls wait on, the program's choice stays, and a moved one knows them") {
  for (const bool choice : {false, true}) {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    const timeval chosen{.tv_sec = 0, .tv_usec = 40'000};
    if (choice) REQUIRE(::setsockopt(fds[1], SOL_SOCKET, SO_RCVTIMEO, &chosen, sizeof chosen) == 0);
    FdTransport writer = test::adopt(fds[0]);
    FdTransport adopted = test::adopt(fds[1]);
    FdTransport reader(std::move(adopted));
    auto reading = std::async(std::launch::async, [&] { return read_byte(reader); });
    CHECK((reading.wait_for(700ms) == std::future_status::timeout) == !choice);  // more than two of its limits
    if (!choice) {
      const char byte = 'x';
      const iovec buffer{const_cast<char*>(&byte), 1};
      REQUIRE(writer.write_some(std::span(&buffer, 1)).has_value());
    }
    const auto read = reading.get();
    CHECK(read.has_value() == !choice);
    if (choice) CHECK(read.error().code == Errc::timed_out);
  }
}

TEST_CASE("a socket that is adopted a second time has no time limit of the program's") {
  FdPair pair = test::unix_pair();
  FdTransport again = test::adopt(::dup(pair.second.native_handle()));
  auto reading = std::async(std::launch::async, [&] { return read_byte(again); });
  std::this_thread::sleep_for(400ms);  // longer than the limit that adopt() gives a socket
  const char byte = 'x';
  const iovec buffer{const_cast<char*>(&byte), 1};
  REQUIRE(pair.first.write_some(std::span(&buffer, 1)).has_value());
  const auto read = reading.get();
  CHECK(read.has_value());
}

TEST_CASE("a receive time limit that the program set is a timeout and no endless wait") {
  FdPair pair = test::unix_pair();
  const timeval limit{.tv_sec = 0, .tv_usec = 20000};
  REQUIRE(::setsockopt(pair.second.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
  const auto read = read_byte(pair.second);
  REQUIRE_FALSE(read.has_value());
  CHECK(read.error().code == Errc::timed_out);
}

namespace {
std::atomic<int> signals_seen = 0;
}

TEST_CASE("signals do not disturb a blocked read") {
  struct sigaction action{};
  struct sigaction old{};
  action.sa_handler = [](int) { ++signals_seen; };  // without SA_RESTART
  REQUIRE(sigaction(SIGUSR1, &action, &old) == 0);
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    signals_seen = 0;
    std::promise<pthread_t> thread_id;
    auto reading = std::async(std::launch::async, [&] {
      thread_id.set_value(pthread_self());
      return read_byte(pair.second);
    });
    const pthread_t reader = thread_id.get_future().get();
    for (int i = 0; i < 5; ++i) {
      pthread_kill(reader, SIGUSR1);
      CHECK(reading.wait_for(5ms) == std::future_status::timeout);
    }
    CHECK(signals_seen > 0);
    REQUIRE(write_byte(pair.first).has_value());
    const auto read = reading.get();
    REQUIRE(read.has_value());
    CHECK(*read == 1);
  }
  sigaction(SIGUSR1, &old, nullptr);
}

TEST_CASE("a write to a peer that is gone is an error and raises no SIGPIPE") {
  struct sigaction action{};
  struct sigaction old{};
  action.sa_handler = [](int) { ++signals_seen; };
  REQUIRE(sigaction(SIGPIPE, &action, &old) == 0);
  signals_seen = 0;
  for (const Kind& kind : all_kinds) {
    CAPTURE(kind.name);
    FdPair pair = kind.make();
    {
      const FdTransport gone = std::move(pair.second);
    }
    const auto written = write_until_it_fails(pair.first);
    REQUIRE_FALSE(written.has_value());
    CHECK(written.error().code == Condition::peer_gone);
  }
  CHECK(signals_seen == 0);
  sigset_t mask;
  REQUIRE(pthread_sigmask(SIG_BLOCK, nullptr, &mask) == 0);
  CHECK(sigismember(&mask, SIGPIPE) == 0);
  CHECK(sigpending(&mask) == 0);
  CHECK(sigismember(&mask, SIGPIPE) == 0);
  sigaction(SIGPIPE, &old, nullptr);
}
