// SPDX-License-Identifier: MIT
//
// Every model of Transport through the contract that users can run on their own, and transports that break
// one rule each, to see that the contract notices.
#include "multifd/testing/transport_contract.hpp"

#include <doctest/doctest.h>

#include <sys/socket.h>
#include <unistd.h>

#include <concepts>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "multifd/testing/fault_transport.hpp"
#include "multifd/testing/memory_transport.hpp"
#include "multifd/transport/any_transport.hpp"
#include "multifd/transport/capped.hpp"
#include "multifd/transport/socket.hpp"
#include "multifd/transport/splice.hpp"
#include "support/skip.hpp"

using namespace multifd;
using namespace std::chrono_literals;
using testing::FaultTransport;
using testing::memory_transport_pair;
using testing::MemoryTransport;

namespace {

using FdPair = std::pair<FdTransport, FdTransport>;

FdPair over(const Address& address) {
  auto listener = Listener::listen(address, 1);
  REQUIRE(listener.has_value());
  auto here = connect_to(listener->local_address());
  REQUIRE(here.has_value());
  auto there = listener->accept(10s);
  REQUIRE(there.has_value());
  return {std::move(*here), std::move(*there)};
}

FdPair adopt(int one, int other) {
  auto first = FdTransport::adopt(one);
  auto second = FdTransport::adopt(other);
  REQUIRE((first && second));
  return {std::move(*first), std::move(*second)};
}

void check(const ContractReport& report) {
  CHECK_MESSAGE(report.ok(), report.text());
  CHECK(report.notes.empty());
}

constexpr TransportContractOptions reset_seen{.after_shutdown = AfterShutdown::error, .patience = 20s};
constexpr TransportContractOptions end_seen{.after_shutdown = AfterShutdown::end, .patience = 20s};

}  // namespace

TEST_CASE("FdTransport over TCP keeps the Transport contract") {
  check(check_transport_contract<FdTransport>([] { return over({.host = "127.0.0.1"}); }, reset_seen));
}

TEST_CASE("FdTransport over MPTCP keeps the Transport contract, and resets as TCP does") {
  const SocketOptions mptcp{.mptcp = true};
  auto listener = Listener::listen({.host = "127.0.0.1"}, 1, mptcp);
  if (!listener) return test::skip("no MPTCP here: " + describe(listener.error()));
  check(check_transport_contract<FdTransport>(
      [&] {
        auto here = connect_to(listener->local_address(), mptcp);
        REQUIRE(here.has_value());
        auto there = listener->accept(10s);
        REQUIRE(there.has_value());
        return FdPair(std::move(*here), std::move(*there));
      },
      reset_seen));
}

TEST_CASE("FdTransport over a UNIX socket keeps the Transport contract") {
  char folder[] = "/tmp/multifd-test-XXXXXX";
  REQUIRE(::mkdtemp(folder) != nullptr);
  const Address address{.kind = AddressKind::unix_socket, .path = std::string(folder) + "/socket"};
  check(check_transport_contract<FdTransport>([&] { return over(address); }, end_seen));
  ::rmdir(folder);
}

TEST_CASE("FdTransport over a socketpair keeps the Transport contract") {
  check(check_transport_contract<FdTransport>(
      [] {
        int fds[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
        return adopt(fds[0], fds[1]);
      },
      end_seen));
}

TEST_CASE("FdTransport over a pipe keeps the Transport contract") {
  check(check_transport_contract<FdTransport>(
      [] {
        int fds[2];
        REQUIRE(::pipe2(fds, O_CLOEXEC) == 0);
        return adopt(fds[1], fds[0]);
      },
      {.after_shutdown = AfterShutdown::end_when_destroyed, .patience = 20s}));
}

namespace {

/// Writes by write_pinned(), from copies that stay.
struct Pinned {
  SpliceTransport next;
  std::vector<std::vector<std::byte>> kept = {};

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    std::vector<std::byte>& bytes = kept.emplace_back(total_bytes(buffers));
    std::vector<iovec> copies;
    for (std::size_t at = 0; const iovec& buffer : buffers) {
      if (buffer.iov_len > 0) std::memcpy(bytes.data() + at, buffer.iov_base, buffer.iov_len);
      copies.push_back({bytes.data() + at, buffer.iov_len});
      at += buffer.iov_len;
    }
    auto count = next.write_pinned(copies);
    CHECK(next.pins());
    return count;
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return next.read_some(buffers); }
  Result<void> finish() noexcept { return next.finish(); }
  void shutdown() noexcept { next.shutdown(); }
};

template <class T>
std::pair<T, T> spliced(FdPair pair) {
  return {T{SpliceTransport(std::move(pair.first))}, T{SpliceTransport(std::move(pair.second))}};
}

}  // namespace

TEST_CASE_TEMPLATE("SpliceTransport keeps the Transport contract, with copies and by write_pinned()", T,
                   SpliceTransport, Pinned) {
  check(check_transport_contract<T>([] { return spliced<T>(over({.host = "127.0.0.1"})); }, reset_seen));
  check(check_transport_contract<T>(
      [] {
        int fds[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
        return spliced<T>(adopt(fds[0], fds[1]));
      },
      end_seen));
}

TEST_CASE("MemoryTransport keeps the Transport contract") {
  for (const std::size_t capacity : {1000UL, 1UL << 20}) {
    CAPTURE(capacity);
    check(check_transport_contract<MemoryTransport>([=] { return memory_transport_pair(capacity); }, reset_seen));
  }
}

TEST_CASE("MemoryTransport with short reads and writes keeps the Transport contract") {
  check(check_transport_contract<MemoryTransport>([] { return memory_transport_pair(1 << 16, {.max_io_bytes = 61}); },
                                                  reset_seen));
}

TEST_CASE("FaultTransport without faults, and with short ones, keeps the Transport contract") {
  using Fault = FaultTransport<MemoryTransport>;
  for (const std::size_t limit : {61UL, 1UL << 30}) {
    CAPTURE(limit);
    check(check_transport_contract<Fault>(
        [=] {
          auto pair = memory_transport_pair(1 << 16);
          return std::pair<Fault, Fault>(Fault(std::move(pair.first), {.max_io_bytes = limit}),
                                         Fault(std::move(pair.second), {.max_io_bytes = limit}));
        },
        reset_seen));
  }
}

namespace {

using Any = AnyTransport<FdTransport, MemoryTransport>;
static_assert(check_transport<Any>() && HasAnswers<Any> && HasReadFull<Any>);

/// A transport of primitives alone, so that the optional parts of an AnyTransport show.
struct Bare {
  Result<std::size_t> write_some(ConstBuffers) noexcept { return 0; }
  Result<std::size_t> read_some(MutableBuffers) noexcept { return 0; }
  Result<void> finish() noexcept { return {}; }
  void shutdown() noexcept {}
};
static_assert(check_transport<AnyTransport<FdTransport, Bare>>());
static_assert(!HasAnswers<AnyTransport<FdTransport, Bare>> && HasReadFull<AnyTransport<FdTransport, Bare>>);
static_assert(!HasReadFull<AnyTransport<MemoryTransport, Bare>>);
static_assert(HasTimeLimits<AnyTransport<FdTransport>> && !HasTimeLimits<AnyTransport<FdTransport, Bare>>);
static_assert(!std::constructible_from<Any, Bare>);

template <class T>
std::pair<Any, Any> held(std::pair<T, T> pair) {
  return {std::move(pair.first), std::move(pair.second)};
}

}  // namespace

TEST_CASE("AnyTransport keeps the Transport contract, whichever transport it holds") {
  check(check_transport_contract<Any>([] { return held(over({.host = "127.0.0.1"})); }, reset_seen));
  check(check_transport_contract<Any>([] { return held(memory_transport_pair(1000)); }, reset_seen));
}

TEST_CASE("AnyTransport says which transport it holds, and stays that when it moves") {
  Any one = std::move(held(over({.host = "127.0.0.1"})).first);
  CHECK(one.get_if<FdTransport>() != nullptr);
  CHECK(one.get_if<MemoryTransport>() == nullptr);
  CHECK_FALSE(one.secured());
  CHECK(one.cipher().empty());
  one = memory_transport_pair(1000).first;
  CHECK(one.get_if<MemoryTransport>() != nullptr);
  std::vector<FdTransport> plain;
  plain.push_back(over({.host = "127.0.0.1"}).first);
  const int descriptor = plain[0].native_handle();
  using Plain = AnyTransport<FdTransport>;
  const std::vector<Plain> all = Plain::all_of(std::move(plain));
  REQUIRE(all.size() == 1);
  CHECK(all[0].native_handle() == descriptor);
}

TEST_CASE("AnyTransport's calls with a time limit end by the limit and by an Interrupt, and lose nothing") {
  using Plain = AnyTransport<FdTransport>;
  auto [one, other] = over({.host = "127.0.0.1"});
  Plain writer(std::move(one));
  Plain reader(std::move(other));
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  std::vector<std::byte> bytes(1 << 20);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 31);
  const iovec room = mutable_buffer(std::span(bytes));
  CHECK(reader.read_some(std::span(&room, 1), 20ms, nullptr).error().code == Errc::timed_out);
  // A blocking socket that nobody reads: each write takes what there is room for, and the last one ends by its limit.
  std::size_t written = 0;
  for (;;) {
    const iovec buffer = const_buffer(std::span<const std::byte>(bytes).subspan(written % bytes.size()));
    const auto put = writer.write_some(std::span(&buffer, 1), 50ms, nullptr);
    if (!put) {
      CHECK(put.error().code == Errc::timed_out);
      break;
    }
    written += *put;
  }
  CHECK(written > 0);
  interrupt->trigger();
  CHECK(writer.write_some(std::span(&room, 1), no_timeout, &*interrupt).error().code == Errc::cancelled);
  CHECK(reader.read_some(std::span(&room, 1), no_timeout, &*interrupt).error().code == Errc::cancelled);
  CHECK(writer.finish().has_value());
  std::size_t read = 0;
  bool equal = true;
  for (std::vector<std::byte> got(1 << 16);;) {
    const iovec to = mutable_buffer(std::span(got));
    const auto count = reader.read_some(std::span(&to, 1), 10s, nullptr);
    REQUIRE(count.has_value());
    if (*count == 0) break;
    for (std::size_t i = 0; i < *count; ++i) equal = equal && got[i] == bytes[(read + i) % bytes.size()];
    read += *count;
  }
  CHECK(read == written);
  CHECK(equal);
}

namespace {

static_assert(check_transport<Capped<FdTransport>>() && check_transport<Capped<Bare>>());
static_assert(HasAnswers<Capped<FdTransport>> && HasReadFull<Capped<FdTransport>> &&
              HasTimeLimits<Capped<FdTransport>>);
static_assert(!HasAnswers<Capped<Bare>> && !HasReadFull<Capped<Bare>> && !HasTimeLimits<Capped<Bare>>);

}  // namespace

TEST_CASE("Capped keeps the Transport contract, with a cap and without") {
  // So high a cap that the contract's bytes are cut into pieces and soon through.
  for (const std::uint64_t rate : {std::uint64_t{0}, std::uint64_t{1} << 40}) {
    CAPTURE(rate);
    const auto capped = [rate](auto pair) {
      using T = decltype(pair.first);
      const auto path = std::make_shared<PathShared>(rate);
      return std::pair<Capped<T>, Capped<T>>(Capped<T>(std::move(pair.first), path),
                                             Capped<T>(std::move(pair.second), path));
    };
    check(
        check_transport_contract<Capped<FdTransport>>([&] { return capped(over({.host = "127.0.0.1"})); }, reset_seen));
    check(check_transport_contract<Capped<MemoryTransport>>([&] { return capped(memory_transport_pair(1000)); },
                                                            reset_seen));
  }
}

TEST_CASE("Capped keeps the Transport contract when its writes wait for the cap") {
  // A cap under which bytes_arrive ends in time, and a write without a reader waits for the cap, not for the stream.
  check(check_transport_contract<Capped<MemoryTransport>>(
      [] {
        auto pair = memory_transport_pair(1 << 20);
        const auto path = std::make_shared<PathShared>(8'000'000);
        return std::pair<Capped<MemoryTransport>, Capped<MemoryTransport>>(
            Capped<MemoryTransport>(std::move(pair.first), path),
            Capped<MemoryTransport>(std::move(pair.second), path));
      },
      reset_seen));
}

namespace {

enum class Broken { drops_byte, reorders, finish_resets, finish_lost, shutdown_is_orderly, shutdown_does_nothing };

/// A MemoryTransport that breaks one rule.
struct Bad {
  MemoryTransport next;
  Broken broken;

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept {
    auto count = next.write_some(buffers);
    // Says that it wrote one more than it did.
    if (broken == Broken::drops_byte && count && *count < total_bytes(buffers)) ++*count;
    return count;
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept {
    auto count = next.read_some(buffers);
    if (broken == Broken::reorders && count && *count >= 2) {
      for (const iovec& buffer : buffers) {
        auto* bytes = static_cast<std::byte*>(buffer.iov_base);
        if (buffer.iov_len >= 2) return std::swap(bytes[0], bytes[1]), count;
      }
    }
    return count;
  }
  Result<void> finish() noexcept {
    if (broken == Broken::finish_resets) next.shutdown();
    if (broken == Broken::finish_resets || broken == Broken::finish_lost) return {};
    return next.finish();
  }
  void shutdown() noexcept {
    if (broken == Broken::shutdown_does_nothing) return;
    if (broken == Broken::shutdown_is_orderly) return static_cast<void>(next.finish());
    next.shutdown();
  }
};

/// `patience`: long, so that a busy machine changes nothing; shorter for a transport whose fault is a call that never ends.
std::string failures(Broken broken, std::chrono::milliseconds patience = 20s) {
  auto make = [broken] {
    auto pair = memory_transport_pair(1000);
    return std::pair<Bad, Bad>(Bad{std::move(pair.first), broken}, Bad{std::move(pair.second), broken});
  };
  return check_transport_contract<Bad>(make, {.after_shutdown = AfterShutdown::error, .patience = patience}).text();
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("the Transport contract notices a transport that breaks it") {
  CHECK(contains(failures(Broken::drops_byte, 1s), "did not come to an end"));
  CHECK(contains(failures(Broken::reorders), "other bytes arrived"));
  CHECK(contains(failures(Broken::finish_resets), "finish(): reading failed"));
  CHECK(contains(failures(Broken::finish_lost, 1s), "finish(): the reader does not see an end"));
  CHECK(contains(failures(Broken::shutdown_is_orderly, 1s), "sees an orderly end instead of a broken stream"));
  CHECK(contains(failures(Broken::shutdown_is_orderly, 1s), "shutdown() does not end a blocked read"));
  CHECK(contains(failures(Broken::shutdown_does_nothing, 1s), "shutdown() does not end a blocked read"));
  CHECK(contains(failures(Broken::shutdown_does_nothing, 1s), "shutdown() does not end a blocked write"));
}
