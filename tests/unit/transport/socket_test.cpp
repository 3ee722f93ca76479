// SPDX-License-Identifier: MIT
#include "multifd/transport/socket.hpp"

#include <doctest/doctest.h>

#include <sys/resource.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "support/closed_port.hpp"
#include "unit/transport/pairs.hpp"

using namespace multifd;
using namespace std::chrono_literals;

namespace {

using test::ClosedPort;

/// A folder of its own for socket files.
struct TemporaryFolder {
  TemporaryFolder() {
    char name[] = "/tmp/multifd-test-XXXXXX";
    REQUIRE(::mkdtemp(name) != nullptr);
    path = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path); }
  Address address(const char* name = "socket") const {
    return {.kind = AddressKind::unix_socket, .path = path + "/" + name};
  }
  std::string path;
};

Address loopback(std::uint16_t port = 0) { return {.kind = AddressKind::tcp, .host = "127.0.0.1", .port = port}; }

/// Fills the queue of a listener that nobody serves, until a further connection would have to wait.
std::vector<FdTransport> fill_queue(const Address& address) {
  std::vector<FdTransport> waiting;
  for (int i = 0; i < 10; ++i) {
    auto link = connect_to(address, {.connect_timeout = 100ms});
    if (!link) {
      CHECK_MESSAGE(link.error().code == Errc::timed_out, describe(link.error()));
      return waiting;
    }
    waiting.push_back(std::move(*link));
  }
  FAIL("the queue never fills");
  return waiting;
}

int get_option(int fd, int level, int name) {
  int value = -1;
  socklen_t size = sizeof value;
  CHECK(::getsockopt(fd, level, name, &value, &size) == 0);
  return value;
}

bool is_cloexec(int fd) { return (::fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0; }
bool is_blocking(int fd) { return (::fcntl(fd, F_GETFL) & O_NONBLOCK) == 0; }

/// Calls `wait` and triggers `interrupt` while it waits: it must end soon after, as cancelled.
template <class Wait>
void check_interrupted(Interrupt& interrupt, Wait wait) {
  auto waiting = std::async(std::launch::async, wait);
  CHECK(waiting.wait_for(30ms) == std::future_status::timeout);
  const test::Stopwatch time;
  interrupt.trigger();
  const auto result = waiting.get();
  CHECK(time.elapsed() < test::no_hang);
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == Errc::cancelled, describe(result.error()));
  // It stays triggered: the next wait does not begin.
  const auto again = wait();
  REQUIRE_FALSE(again.has_value());
  CHECK(again.error().code == Errc::cancelled);
}

/// A container may have no /etc/hosts, and then no name at all.
bool localhost_is_known() {
  const bool known = Listener::listen({.host = "localhost"}, 1).has_value();
  if (!known) MESSAGE("the name localhost is not known here");
  return known;
}

}  // namespace

TEST_CASE("channels connect over every kind of address") {
  const TemporaryFolder folder;
  for (const Address& address :
       {loopback(), Address{.host = "localhost"}, Address{.host = ""}, Address{.host = "::1"}, folder.address()}) {
    CAPTURE(to_string(address));
    if (address.host == "localhost" && !localhost_is_known()) continue;
    auto listener = Listener::listen(address, 9);
    if (!listener && address.host == "::1" && listener.error().code == std::errc::address_not_available) {
      MESSAGE("no IPv6 here");
      continue;
    }
    REQUIRE_MESSAGE(listener.has_value(), describe(listener.error()));
    const Address bound = listener->local_address();
    CHECK(bound.kind == address.kind);
    CHECK((bound.port != 0) == (bound.kind == AddressKind::tcp));
    CHECK(parse_address(to_string(bound)) == bound);
    auto here = connect_channels(bound, 8);
    REQUIRE_MESSAGE(here.has_value(), describe(here.error()));
    auto there = listener->accept_channels(8, 10s);
    REQUIRE_MESSAGE(there.has_value(), describe(there.error()));
    REQUIRE(here->size() == 8);
    REQUIRE(there->size() == 8);
    for (std::size_t id = 0; id < 8; ++id) {
      const std::byte sent[] = {std::byte(id), std::byte{7}};
      REQUIRE(write_all((*here)[id], std::span<const std::byte>(sent)).has_value());
      std::byte received[2];
      REQUIRE(read_exact((*there)[id], std::span<std::byte>(received)).has_value());
      CHECK(received[0] == sent[0]);
      for (const int fd : {(*here)[id].native_handle(), (*there)[id].native_handle(), listener->native_handle()}) {
        CHECK(is_cloexec(fd));
        CHECK(is_blocking(fd) == (fd != listener->native_handle()));
      }
    }
  }
}

TEST_CASE("a listener on any host is reached over IPv4 and over IPv6") {
  auto listener = Listener::listen(*parse_address("tcp::0"), 4);
  REQUIRE(listener.has_value());
  const std::uint16_t port = listener->local_address().port;
  CHECK(connect_to(loopback(port)).has_value());
  if (localhost_is_known()) CHECK(tcp_connect("localhost", port, 1).has_value());
  CHECK(connect_to({.port = port}).has_value());
}

TEST_CASE("sockets have the options that were asked for") {
  const SocketOptions options{.send_buffer_bytes = 65536,
                              .receive_buffer_bytes = 131072,
                              .no_delay = true,
                              .keepalive = true,
                              .keepalive_idle = 11s,
                              .keepalive_interval = 3s,
                              .keepalive_probes = 4,
                              .user_timeout = 12345ms};
  auto listener = Listener::listen(loopback(), 4, options);
  REQUIRE(listener.has_value());
  auto here = connect_to(listener->local_address(), options);
  REQUIRE(here.has_value());
  auto there = listener->accept(10s);
  REQUIRE(there.has_value());
  for (const int fd : {here->native_handle(), there->native_handle()}) {
    // Linux doubles buffer sizes for its own book-keeping.
    CHECK(get_option(fd, SOL_SOCKET, SO_SNDBUF) == 2 * 65536);
    CHECK(get_option(fd, SOL_SOCKET, SO_RCVBUF) == 2 * 131072);
    CHECK(get_option(fd, IPPROTO_TCP, TCP_NODELAY) == 1);
    CHECK(get_option(fd, SOL_SOCKET, SO_KEEPALIVE) == 1);
    CHECK(get_option(fd, IPPROTO_TCP, TCP_KEEPIDLE) == 11);
    CHECK(get_option(fd, IPPROTO_TCP, TCP_KEEPINTVL) == 3);
    CHECK(get_option(fd, IPPROTO_TCP, TCP_KEEPCNT) == 4);
    CHECK(get_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT) == 12345);
  }
  const auto refused = connect_to(listener->local_address(), {.send_buffer_bytes = -1});
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == Errc::bad_option);
}

TEST_CASE("connections on one machine have send buffers of a packet, unless others are asked for") {
  const auto send_buffer = [](const FdTransport& end) {
    return get_option(end.native_handle(), SOL_SOCKET, SO_SNDBUF);
  };
  auto listener = Listener::listen(loopback(), 4);
  REQUIRE(listener.has_value());
  auto here = connect_to(listener->local_address());
  REQUIRE(here.has_value());
  auto there = listener->accept(10s);
  REQUIRE(there.has_value());
  // What a host makes of that number (net.core.wmem_max) is the same for all.
  auto asked = connect_to(listener->local_address(), {.send_buffer_bytes = local_send_buffer_bytes});
  REQUIRE(asked.has_value());
  CHECK(send_buffer(*here) == send_buffer(*asked));
  CHECK(send_buffer(*there) == send_buffer(*asked));
  // A listener on any address does not know who will come.
  auto any = Listener::listen(*parse_address("tcp::0"), 4);
  REQUIRE(any.has_value());
  auto from_here = connect_to(loopback(any->local_address().port));
  REQUIRE(from_here.has_value());
  auto stranger = any->accept(10s);
  REQUIRE(stranger.has_value());
  CHECK(send_buffer(*stranger) != send_buffer(*asked));

  const TemporaryFolder folder;
  auto near = Listener::listen(folder.address(), 4);
  REQUIRE(near.has_value());
  auto neighbour = connect_to(folder.address());
  REQUIRE(neighbour.has_value());
  CHECK(send_buffer(*neighbour) == send_buffer(*asked));
}

TEST_CASE("a loopback connection is not paced, unless a congestion control is asked for") {
  const auto congestion_control = [](const FdTransport& end) {
    char name[16] = "";
    socklen_t size = sizeof name - 1;
    CHECK(::getsockopt(end.native_handle(), IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0);
    return std::string(name);
  };
  auto listener = Listener::listen(loopback(), 4);
  REQUIRE(listener.has_value());
  auto here = connect_to(listener->local_address());
  REQUIRE(here.has_value());
  auto there = listener->accept(10s);
  REQUIRE(there.has_value());
  CHECK(congestion_control(*here) == loopback_congestion_control);
  CHECK(congestion_control(*there) == loopback_congestion_control);

  std::string other;  // any that this kernel lets everybody choose
  std::ifstream allowed("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
  while (allowed >> other && other == loopback_congestion_control) {
  }
  if (!other.empty() && other != loopback_congestion_control) {
    auto chosen = connect_to(listener->local_address(), {.congestion_control = other});
    REQUIRE(chosen.has_value());
    CHECK(congestion_control(*chosen) == other);
  }
  const auto unknown = connect_to(listener->local_address(), {.congestion_control = "no such thing"});
  REQUIRE_FALSE(unknown.has_value());
  CHECK(std::string_view(unknown.error().op) == "TCP_CONGESTION");
}

TEST_CASE("connecting says what went wrong") {
  const TemporaryFolder folder;
  const ClosedPort closed;
  const auto error_of = [](const Address& address) {
    const test::Stopwatch time;
    const auto link = connect_to(address, {.connect_timeout = 40s});
    REQUIRE_FALSE(link.has_value());
    CHECK(link.error().stage == Stage::connect);
    CHECK(time.elapsed() < test::no_hang);
    return link.error();
  };
  const auto is_op = [](const Error& error, const char* op) { return std::string(error.op) == op; };

  Error error = error_of(loopback(closed.port));
  CHECK(error.code == std::errc::connection_refused);
  CHECK(error.code == Condition::peer_gone);
  CHECK(is_op(error, "connect"));

  // A label of more than 63 characters is no name: known without asking the network.
  error = error_of({.host = std::string(70, 'x') + ".invalid", .port = 1});
  CHECK(is_op(error, "resolve"));
  CHECK(error.code.category().name() == std::string("resolve"));
  CHECK(describe(error).size() > 20);

  error = error_of(loopback(0));
  CHECK(error.code == Errc::bad_address);
  error = error_of(folder.address("nobody"));
  CHECK(error.code == std::errc::no_such_file_or_directory);
  error = error_of({.kind = AddressKind::unix_socket, .path = std::string(200, 'x')});
  CHECK(error.code == Errc::bad_address);
  error = error_of({.kind = AddressKind::unix_socket, .path = std::string("a\0b", 3)});
  CHECK(error.code == Errc::bad_address);
  std::ofstream(folder.path + "/file") << "no socket";
  error = error_of(folder.address("file"));
  CHECK(error.code == std::errc::connection_refused);
}

TEST_CASE("connecting ends at its time limit") {
  const TemporaryFolder folder;
  for (const Address& address : {loopback(), folder.address()}) {
    CAPTURE(to_string(address));
    auto listener = Listener::listen(address, 1);
    REQUIRE(listener.has_value());
    const auto waiting = fill_queue(listener->local_address());
    const test::Stopwatch time;
    const auto link = connect_to(listener->local_address(), {.connect_timeout = 150ms});
    CHECK(time.elapsed() >= std::chrono::milliseconds(150));
    CHECK(time.elapsed() < test::no_hang);
    REQUIRE_FALSE(link.has_value());
    CHECK(link.error().code == Errc::timed_out);
    CHECK(link.error().stage == Stage::connect);
    CHECK(std::string(link.error().op) == "connect");

    // One limit for all channels together, and the error says which one it was.
    const test::Stopwatch all;
    const auto links = connect_channels(listener->local_address(), 8, {.connect_timeout = 150ms});
    CHECK(all.elapsed() < test::no_hang);
    REQUIRE_FALSE(links.has_value());
    CHECK(links.error().channel == 0);
  }
}

TEST_CASE("a UNIX connection gets through once the full queue is served") {
  const TemporaryFolder folder;
  auto listener = Listener::listen(folder.address(), 1);
  REQUIRE(listener.has_value());
  const auto waiting = fill_queue(listener->local_address());
  auto connecting = std::async(std::launch::async, [&] { return connect_to(listener->local_address()).has_value(); });
  CHECK(connecting.wait_for(30ms) == std::future_status::timeout);
  REQUIRE(listener->accept(5s).has_value());
  CHECK(connecting.get());
}

TEST_CASE("channel counts of 0 and above 255 are refused before anything happens") {
  const ClosedPort closed;
  auto listener = Listener::listen(loopback(), 1);
  REQUIRE(listener.has_value());
  for (const unsigned channels : {0U, 256U, ~0U}) {
    CAPTURE(channels);
    const auto links = connect_channels(loopback(closed.port), channels);
    REQUIRE_FALSE(links.has_value());
    CHECK(links.error().code == Errc::bad_channel_count);
    CHECK(links.error().detail == channels);
    const auto accepted = listener->accept_channels(channels, 10s);
    REQUIRE_FALSE(accepted.has_value());
    CHECK(accepted.error().code == Errc::bad_channel_count);
  }
}

TEST_CASE("accepting ends at its time limit and says how many came") {
  auto listener = Listener::listen(loopback(), 4);
  REQUIRE(listener.has_value());
  const test::Stopwatch time;
  const auto none = listener->accept(50ms);
  CHECK(time.elapsed() >= std::chrono::milliseconds(50));
  REQUIRE_FALSE(none.has_value());
  CHECK(none.error().code == Errc::timed_out);
  CHECK(none.error().stage == Stage::accept);

  const auto two = connect_channels(listener->local_address(), 2);
  REQUIRE(two.has_value());
  const auto three = listener->accept_channels(3, 50ms);
  REQUIRE_FALSE(three.has_value());
  CHECK(three.error().code == Errc::timed_out);
  CHECK(three.error().detail == 2);
}

TEST_CASE("an Interrupt ends connecting, accepting and peeking") {
  const TemporaryFolder folder;
  for (const Address& address : {loopback(), folder.address()}) {
    CAPTURE(to_string(address));
    auto listener = Listener::listen(address, 1);
    REQUIRE(listener.has_value());
    const auto check = [](auto wait) {
      auto interrupt = Interrupt::create();
      REQUIRE(interrupt.has_value());
      check_interrupted(*interrupt, [&] { return wait(&*interrupt); });
    };
    check([&](Interrupt* interrupt) { return listener->accept(no_timeout, interrupt); });
    check([&](Interrupt* interrupt) { return listener->accept_channels(3, 1h, interrupt); });

    auto here = connect_to(listener->local_address());
    auto there = listener->accept(5s);
    REQUIRE((here && there));
    check([&](Interrupt* interrupt) { return peek_magic(*there, no_timeout, interrupt); });

    const auto waiting = fill_queue(listener->local_address());
    check([&](Interrupt* interrupt) {
      return connect_to(listener->local_address(), {.connect_timeout = 1h, .interrupt = interrupt});
    });
  }
}

TEST_CASE("the listener's options bring the default Interrupt") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  auto listener = Listener::listen(loopback(), 1, {.interrupt = &*interrupt});
  REQUIRE(listener.has_value());
  check_interrupted(*interrupt, [&] { return listener->accept(no_timeout); });
}

TEST_CASE("an address in use is refused") {
  const TemporaryFolder folder;
  for (const Address& address : {loopback(), Address{.host = ""}, folder.address()}) {
    CAPTURE(to_string(address));
    auto listener = Listener::listen(address, 1);
    REQUIRE(listener.has_value());
    const auto second = Listener::listen(listener->local_address(), 1);
    REQUIRE_FALSE(second.has_value());
    CHECK(second.error().code == std::errc::address_in_use);
    CHECK(second.error().stage == Stage::accept);
    CHECK(connect_to(listener->local_address()).has_value());  // the first one is unharmed
  }
}

TEST_CASE("a TCP port can be listened on again at once") {
  auto listener = Listener::listen(loopback(), 1);
  REQUIRE(listener.has_value());
  const Address address = listener->local_address();
  auto here = connect_to(address);
  auto there = listener->accept(5s);
  REQUIRE((here && there));
  REQUIRE(there->finish().has_value());  // this side closes first: its port goes to TIME_WAIT
  REQUIRE(here->finish().has_value());
  {
    const FdTransport gone = std::move(*there);
  }
  {
    const Listener gone = std::move(*listener);
  }
  CHECK(Listener::listen(address, 1).has_value());
}

TEST_CASE("UNIX socket files: a stale one is replaced, others are not, the own one is removed") {
  namespace fs = std::filesystem;
  const TemporaryFolder folder;
  const Address address = folder.address();

  SUBCASE("stale") {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const auto target = detail::unix_sockaddr(address, Stage::accept);
    REQUIRE(::bind(fd, reinterpret_cast<const sockaddr*>(&*target), sizeof *target) == 0);
    ::close(fd);
    REQUIRE(fs::is_socket(address.path));
    auto listener = Listener::listen(address, 1);
    REQUIRE(listener.has_value());
    CHECK(connect_to(address).has_value());
  }
  SUBCASE("busy, with a full queue") {
    auto listener = Listener::listen(address, 1);
    const auto waiting = fill_queue(address);
    const auto second = Listener::listen(address, 1);
    REQUIRE_FALSE(second.has_value());
    CHECK(second.error().code == std::errc::address_in_use);
    CHECK(fs::is_socket(address.path));
  }
  SUBCASE("a file that is no socket") {
    std::ofstream(address.path) << "precious";
    const auto listener = Listener::listen(address, 1);
    REQUIRE_FALSE(listener.has_value());
    CHECK(listener.error().code == std::errc::address_in_use);
    CHECK(fs::file_size(address.path) == 8);
  }
  SUBCASE("a symbolic link to a socket") {
    {
      const auto target = Listener::listen(folder.address("target"), 1);
    }
    fs::create_symlink(folder.path + "/target", address.path);
    CHECK_FALSE(Listener::listen(address, 1).has_value());
    CHECK(fs::is_symlink(address.path));
  }
  SUBCASE("the own one") {
    {
      auto listener = Listener::listen(address, 1);
      REQUIRE(listener.has_value());
      const Listener moved = std::move(*listener);
      CHECK(fs::is_socket(address.path));
    }
    CHECK_FALSE(fs::exists(address.path));
  }
  SUBCASE("another one that has taken its place") {
    {
      const auto listener = Listener::listen(address, 1);
      REQUIRE(listener.has_value());
      fs::rename(address.path, folder.path + "/old");
      std::ofstream(address.path) << "another";
    }
    CHECK(fs::exists(address.path));
  }
}

TEST_CASE("peek_magic tells the first four bytes and takes none") {
  constexpr std::byte hello[] = {std::byte{0x11}, std::byte{0x22}, std::byte{0x33}, std::byte{0xf4}, std::byte{5}};
  constexpr std::uint32_t magic_of_hello = 0x112233f4;
  for (const auto make : {test::tcp_pair, test::unix_pair}) {
    CAPTURE(make == test::tcp_pair);
    const auto send = [&](test::FdPair& pair, std::size_t from, std::size_t to) {
      REQUIRE(write_all(pair.first, std::span<const std::byte>(hello).subspan(from, to - from)).has_value());
    };
    const auto error_of = [](test::FdPair& pair, std::chrono::milliseconds timeout) {
      const auto magic = peek_magic(pair.second, timeout);
      REQUIRE_FALSE(magic.has_value());
      CHECK(magic.error().stage == Stage::accept);
      return magic.error();
    };
    const auto check_all_there = [&](test::FdPair& pair) {
      for (int i = 0; i < 2; ++i) {
        const auto magic = peek_magic(pair.second, 5s);
        REQUIRE(magic.has_value());
        CHECK(*magic == magic_of_hello);
      }
      std::byte received[5];
      REQUIRE(read_exact(pair.second, std::span<std::byte>(received)).has_value());
      CHECK(std::equal(received, received + 5, hello));
    };

    test::FdPair pair = make();
    send(pair, 0, 5);
    check_all_there(pair);

    // Byte by byte, while it waits, and without spinning.
    pair = make();
    timespec before{}, after{};
    auto peeking = std::async(std::launch::async, [&] {
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
      const auto magic = peek_magic(pair.second, 10s);
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
      return magic;
    });
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(peeking.wait_for(60ms) == std::future_status::timeout);
      send(pair, i, i + 1);
    }
    const auto magic = peeking.get();
    REQUIRE(magic.has_value());
    CHECK(*magic == magic_of_hello);
    const long cpu_us = (after.tv_sec - before.tv_sec) * 1000000 + (after.tv_nsec - before.tv_nsec) / 1000;
    CHECK(cpu_us < 100000);  // of the 240 ms that it waited
    send(pair, 4, 5);
    check_all_there(pair);

    pair = make();
    CHECK(error_of(pair, 30ms).code == Errc::timed_out);
    send(pair, 0, 3);
    CHECK(error_of(pair, 30ms).code == Errc::timed_out);
    send(pair, 3, 5);
    check_all_there(pair);

    pair = make();
    REQUIRE(pair.first.finish().has_value());
    CHECK(error_of(pair, 5s).code == Errc::peer_closed);

    // An end after three bytes, while it waits and before.
    pair = make();
    send(pair, 0, 3);
    auto waiting = std::async(std::launch::async, [&] { return error_of(pair, 5s); });
    CHECK(waiting.wait_for(30ms) == std::future_status::timeout);
    REQUIRE(pair.first.finish().has_value());
    for (const Error& error : {waiting.get(), error_of(pair, 5s)}) {
      CHECK(error.code == Errc::truncated_hello);
      CHECK(error.detail == 3);
    }

    pair = make();
    pair.first.shutdown();
    CHECK(error_of(pair, 5s).code == Condition::peer_gone);
  }
}

TEST_CASE("peek_magic of a pipe is an error") {
  test::FdPair pair = test::pipe_pair();
  const auto magic = peek_magic(pair.second, 1s);
  REQUIRE_FALSE(magic.has_value());
  CHECK(magic.error().code == std::errc::not_a_socket);
}

TEST_CASE("a Listener that was moved from accepts nothing and says so") {
  auto listener = Listener::listen(loopback(), 4);
  REQUIRE(listener.has_value());
  const Listener other = std::move(*listener);
  CHECK(listener->accept(no_timeout).error().code == Errc::already_closed);
  CHECK(listener->accept_channels(1, 0ms).error().code == Errc::already_closed);
  const auto more = listener->any_waiting([](std::span<const std::byte>) { return true; });
  REQUIRE_FALSE(more.has_value());
  CHECK(more.error().code == Errc::already_closed);
  CHECK(listener->poll_handle() == -1);
}

TEST_CASE("running out of descriptors is an error and no loop") {
  auto listener = Listener::listen(loopback(), 4);
  REQUIRE(listener.has_value());
  auto waiting = connect_to(listener->local_address());
  REQUIRE(waiting.has_value());
  rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &old) == 0);
  rlimit none = old;
  none.rlim_cur = 3;  // poll() itself wants room for its two entries
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const auto accepted = listener->accept(1s);
  const auto connected = connect_to(listener->local_address());
  const auto listening = Listener::listen(loopback(), 1);
  const auto interrupt = Interrupt::create();
  ::setrlimit(RLIMIT_NOFILE, &old);
  REQUIRE_FALSE(accepted.has_value());
  CHECK(accepted.error().code == std::errc::too_many_files_open);
  REQUIRE_FALSE(connected.has_value());
  CHECK(connected.error().code == std::errc::too_many_files_open);
  CHECK_FALSE(listening.has_value());
  CHECK_FALSE(interrupt.has_value());
}
