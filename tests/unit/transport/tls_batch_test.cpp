// SPDX-License-Identifier: MIT
//
// How many records a system call moves, and that a read neither waits for what has not come nor loses what has.
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include <dlfcn.h>
#include <doctest/doctest.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <future>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "support/tls_links.hpp"

namespace {

thread_local unsigned sends = 0, receives = 0;  // system calls of this thread

}  // namespace

using Send = ssize_t(int, const msghdr*, int);
using Receive = ssize_t(int, msghdr*, int);

extern "C" {
// A sanitizer's, where there is one.
[[gnu::weak]] Send __interceptor_sendmsg;
[[gnu::weak]] Receive __interceptor_recvmsg;

// The executable's go before the C library's.
ssize_t sendmsg(int fd, const msghdr* message, int flags) {
  static Send* const next =
      __interceptor_sendmsg != nullptr ? __interceptor_sendmsg : reinterpret_cast<Send*>(dlsym(RTLD_NEXT, "sendmsg"));
  ++sends;
  return next(fd, message, flags);
}
ssize_t recvmsg(int fd, msghdr* message, int flags) {
  static Receive* const next = __interceptor_recvmsg != nullptr
                                   ? __interceptor_recvmsg
                                   : reinterpret_cast<Receive*>(dlsym(RTLD_NEXT, "recvmsg"));
  ++receives;
  return next(fd, message, flags);
}
}

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t record_bytes = 16 * 1024;  // a record's content

std::vector<std::byte> random_bytes(std::size_t size) {
  std::vector<std::byte> bytes(size);
  Rng rng(seed());
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng());
  return bytes;
}

/// Links whose sockets hold fifteen full records.
template <class P>
auto roomy_links(const TlsOptions& options = {}) {
  auto plain = unix_links(1);
  const int room = 1 << 20;
  REQUIRE(::setsockopt(plain.sender[0].native_handle(), SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
  return tls_links_of<P>(std::move(plain), "keys.psk", options);
}

/// What has come to a link's socket, record by record, taken away from it.
template <class Link>
std::vector<std::vector<std::byte>> intercept(Link& link) {
  std::vector<std::byte> all(1 << 20);
  std::size_t count = 0;
  for (ssize_t got = 1; got > 0; count += static_cast<std::size_t>(std::max<ssize_t>(got, 0)))
    got = ::recv(link.native_handle(), all.data() + count, all.size() - count, MSG_DONTWAIT);
  std::vector<std::vector<std::byte>> records;
  for (std::size_t at = 0; at < count;) {
    const std::size_t size =
        5 + (std::to_integer<std::size_t>(all[at + 3]) << 8 | std::to_integer<std::size_t>(all[at + 4]));
    records.emplace_back(all.begin() + static_cast<std::ptrdiff_t>(at),
                         all.begin() + static_cast<std::ptrdiff_t>(at + size));
    at += size;
  }
  return records;
}

template <class Link>
void pass_on(Link& sender, std::span<const std::byte> bytes) {
  REQUIRE(::send(sender.native_handle(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == std::ssize(bytes));
}

/// One read with room for more than has come.
template <class Link>
Result<std::size_t> read_into(Link& link, std::vector<std::byte>& got, std::chrono::milliseconds limit = 20s) {
  std::vector<std::byte> room(8 * record_bytes);
  const iovec buffer = mutable_buffer(std::span<std::byte>(room));
  auto count = link.read_some(std::span(&buffer, 1), limit, nullptr);
  if (count) got.insert(got.end(), room.begin(), room.begin() + static_cast<std::ptrdiff_t>(*count));
  return count;
}

}  // namespace

TEST_CASE_TEMPLATE("Several records leave in one system call, and come in one", P, TLS_SIDES) {
  const Watchdog watchdog("system calls");
  auto links = roomy_links<P>();
  const auto bytes = random_bytes(15 * record_bytes);
  sends = 0;
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes)).has_value());
  CHECK(sends == 4);  // 1, 2, 4, and 8 records
  std::vector<std::byte> got(bytes.size());
  const iovec buffer = mutable_buffer(std::span<std::byte>(got));
  receives = 0;
  CHECK(links.receiver[0].read_some(std::span(&buffer, 1)).value_or(0) == bytes.size());
  CHECK(receives == 1);
  CHECK((got == bytes));
}

TEST_CASE_TEMPLATE("With a time limit a write is one record", P, TLS_SIDES) {
  auto links = roomy_links<P>();
  const auto bytes = random_bytes(15 * record_bytes);
  const iovec buffer = const_buffer(std::span<const std::byte>(bytes));
  for (int i = 0; i < 3; ++i)
    CHECK(links.sender[0].write_some(std::span(&buffer, 1), 20s, nullptr).value_or(0) == record_bytes);
}

TEST_CASE_TEMPLATE("A small read leaves the next records at the socket, where others look for them", P, TLS_SIDES) {
  auto links = roomy_links<P>();
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(random_bytes(4 * record_bytes))).has_value());
  std::byte first[4];
  REQUIRE(read_exact(links.receiver[0], std::span<std::byte>(first)).has_value());
  int unread = 0;
  REQUIRE(::ioctl(links.receiver[0].native_handle(), FIONREAD, &unread) == 0);
  CHECK(static_cast<std::size_t>(unread) >= 3 * record_bytes);
}

TEST_CASE_TEMPLATE("A read returns what has come whole, and goes on behind part of a record", P, TLS_SIDES) {
  const Watchdog watchdog("part of a record");
  for (const std::size_t part : {std::size_t{3}, std::size_t{5}, std::size_t{1000}}) {
    CAPTURE(part);
    auto links = roomy_links<P>();
    const auto bytes = random_bytes(3 * record_bytes);
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes)).has_value());
    auto records = intercept(links.receiver[0]);
    REQUIRE(records.size() == 3);
    std::vector<std::byte> got;
    const std::span<const std::byte> second(records[1]);
    records[0].insert(records[0].end(), second.begin(), second.begin() + static_cast<std::ptrdiff_t>(part));
    pass_on(links.sender[0], records[0]);
    CHECK(read_into(links.receiver[0], got).value_or(0) == record_bytes);
    CHECK(code_of(read_into(links.receiver[0], got, 20ms)) == Errc::timed_out);
    pass_on(links.sender[0], second.subspan(part));
    CHECK(read_into(links.receiver[0], got).value_or(0) == record_bytes);
    pass_on(links.sender[0], records[2]);
    CHECK(read_into(links.receiver[0], got).value_or(0) == record_bytes);
    CHECK((got == bytes));
  }
}

TEST_CASE_TEMPLATE("A read does not wait behind a record without data", P, TLS_SIDES) {
  const Watchdog watchdog("new keys");
  auto links = roomy_links<P>({.records_per_key = 1});
  const auto bytes = random_bytes(2 * record_bytes);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes)).has_value());
  auto records = intercept(links.receiver[0]);
  REQUIRE(records.size() == 3);
  REQUIRE(records[1].size() < 100);  // KeyUpdate
  records[0].insert(records[0].end(), records[1].begin(), records[1].end());
  pass_on(links.sender[0], records[0]);
  std::vector<std::byte> got;
  CHECK(read_into(links.receiver[0], got).value_or(0) == record_bytes);
  CHECK(code_of(read_into(links.receiver[0], got, 20ms)) == Errc::timed_out);
  pass_on(links.sender[0], records[2]);
  CHECK(read_into(links.receiver[0], got).value_or(0) == record_bytes);
  CHECK((got == bytes));
}

TEST_CASE_TEMPLATE("The end of a stream is read behind the records that came with it, in order or not", P, TLS_SIDES) {
  const Watchdog watchdog("ends");
  for (const bool in_order : {true, false}) {
    auto links = roomy_links<P>();
    const auto bytes = random_bytes(4 * record_bytes);
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(bytes)).has_value());
    if (in_order)
      REQUIRE(links.sender[0].finish().has_value());
    else
      REQUIRE(::shutdown(links.sender[0].native_handle(), SHUT_WR) == 0);
    std::vector<std::byte> got;
    CHECK(read_into(links.receiver[0], got).value_or(0) == bytes.size());
    CHECK((got == bytes));
    for (int i = 0; i < 2; ++i) {
      const auto end = read_into(links.receiver[0], got);
      if (in_order) CHECK_MESSAGE(end.value_or(9) == 0, text(end));
      if (!in_order) CHECK_MESSAGE(code_of(end) == Errc::tls_truncated, text(end));
    }
  }
}

TEST_CASE_TEMPLATE("A stream that ends in a record is cut, wherever that is", P, TLS_SIDES) {
  const Watchdog watchdog("cut records");
  for (const std::size_t missing : {std::size_t{1}, std::size_t{5}, std::size_t{1000}, record_bytes}) {
    CAPTURE(missing);
    auto links = roomy_links<P>({.end = TlsEnd::fin});
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(random_bytes(record_bytes))).has_value());
    const auto records = intercept(links.receiver[0]);
    REQUIRE(records.size() == 1);
    pass_on(links.sender[0], std::span(records[0]).first(records[0].size() - missing));
    std::vector<std::byte> got;
    CHECK(code_of(read_into(links.receiver[0], got, 20ms)) == Errc::timed_out);
    REQUIRE(::shutdown(links.sender[0].native_handle(), SHUT_WR) == 0);
    const auto end = read_into(links.receiver[0], got);
    CHECK_MESSAGE(code_of(end) == Errc::tls_truncated, text(end));
  }
}

#if defined(MULTIFD_HAS_TLS)
TEST_CASE_TEMPLATE("A peer that takes small records only gets all bytes", L, TLS_LIBRARIES) {
  const Watchdog watchdog("small records");
  auto plain = tcp_links(1);
  const auto bytes = random_bytes(40 * record_bytes);
  auto peer = std::async([&] {
    const TlsCredentials theirs = credentials("keys.psk", TlsRole::client);
    gnutls_session_t session = nullptr;
    REQUIRE(::gnutls_init(&session, GNUTLS_CLIENT) == 0);
    REQUIRE(theirs.apply(session, TlsCipher::automatic) == 0);
    REQUIRE(::gnutls_record_set_max_recv_size(session, 512) == 0);
    ::gnutls_transport_set_int(session, plain.sender[0].native_handle());
    int code = 0;
    do code = ::gnutls_handshake(session);
    while (code < 0 && ::gnutls_error_is_fatal(code) == 0);
    REQUIRE(code == 0);
    std::vector<std::byte> got(bytes.size());
    for (std::size_t count = 0; count < got.size();) {
      const ssize_t more = ::gnutls_record_recv(session, got.data() + count, got.size() - count);
      if (more < 0 && ::gnutls_error_is_fatal(static_cast<int>(more)) == 0) continue;
      if (more <= 0) break;
      count += static_cast<std::size_t>(more);
    }
    ::gnutls_deinit(session);
    return got;
  });
  auto link = tls_handshake(std::move(plain.receiver[0]), credentials<L>("keys.psk", TlsRole::server));
  REQUIRE_MESSAGE(link.has_value(), text(link));
  const auto written = write_all(*link, std::span<const std::byte>(bytes));
  CHECK_MESSAGE(written.has_value(), text(written));
  CHECK(link->finish().has_value());
  CHECK((peer.get() == bytes));
}
#endif
#else
#include <doctest/doctest.h>

TEST_CASE("TLS is not in this build") { MESSAGE("neither GnuTLS nor OpenSSL was found, or both are off"); }
#endif
