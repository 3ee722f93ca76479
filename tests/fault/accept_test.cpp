// SPDX-License-Identifier: MIT
//
// Accepting where something cannot be had: allocation 0, 1, 2 ... fails, or a connection cannot be watched. The caller is
// told, nothing is left behind, and a connection that was not taken yet is not lost: the next call gets it.
#include <doctest/doctest.h>

#include <dlfcn.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fault/tally.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/transport/algorithms.hpp"
#include "support/leftovers.hpp"
#include "support/links.hpp"
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include "multifd/transport/tls_acceptor.hpp"
#include "support/tls_links.hpp"
#endif

namespace {

int watches_left = -1;  // until one fails; negative: none does

}  // namespace

using Control = int(int, int, int, epoll_event*);

extern "C" {
// A sanitizer's, where there is one.
[[gnu::weak]] Control __interceptor_epoll_ctl;

// The executable's goes before the C library's.
int epoll_ctl(int epoll, int operation, int fd, epoll_event* event) noexcept {
  if (operation == EPOLL_CTL_ADD && watches_left >= 0 && watches_left-- == 0) {
    errno = ENOSPC;  // as where /proc/sys/fs/epoll/max_user_watches is reached
    return -1;
  }
  static Control* const next = __interceptor_epoll_ctl != nullptr
                                   ? __interceptor_epoll_ctl
                                   : reinterpret_cast<Control*>(dlsym(RTLD_NEXT, "epoll_ctl"));
  return next(epoll, operation, fd, event);
}
}

using namespace multifd;
using namespace test;

namespace {

const doctest::skip needs_failing_new(under_tsan);

Listener listen() {
  auto listener = Listener::listen({.host = "127.0.0.1"}, 16);
  REQUIRE_MESSAGE(listener.has_value(), text(listener));
  return std::move(*listener);
}

/// A main connection and two channels: what they say is their order.
std::vector<FdTransport> source(const Listener& listener) {
  std::vector<FdTransport> links;
  for (const std::string_view says : {"QEVM0", "\x11\x22\x33\x44\x31", "\x11\x22\x33\x44\x32"}) {
    auto link = connect_to(listener.local_address());
    REQUIRE_MESSAGE(link.has_value(), text(link));
    REQUIRE(write_all(*link, std::as_bytes(std::span(says))).has_value());
    links.push_back(std::move(*link));
  }
  return links;
}

char letter(FdTransport& link) {
  std::array<std::byte, 5> bytes;
  REQUIRE(read_exact(link, std::span<std::byte>(bytes)).has_value());
  return static_cast<char>(bytes[4]);
}

std::error_code no_memory() { return {ENOMEM, std::system_category()}; }

/// Calls `call(prepare())` with allocation 0, 1, 2 ... of `call` failing until none fails. `call` returns a Result, which
/// `check(result, whether one failed)` sees.
template <class Prepare, class Call, class Check>
void sweep(Prepare&& prepare, Call&& call, Check&& check) {
  std::uint64_t injected = 0;
  for (std::uint64_t at = 0;; ++at) {
    CAPTURE(at);
    REQUIRE(at < 2000);
    bool threw = false;
    bool happened = false;
    auto prepared = prepare();
    using Outcome = decltype(call(std::move(prepared)));
    std::optional<Outcome> outcome;
    {
      const auto fault = std::make_unique<FailAllocation>(at);
      try {
        outcome.emplace(call(std::move(prepared)));
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      happened = fault->happened();
    }
    REQUIRE_FALSE(threw);
    if (happened) count_fault(), ++injected;
    check(*outcome, happened);
    if (!happened) break;
  }
  CHECK(injected > 0);
}
constexpr auto nothing = [] { return 0; };

}  // namespace

TEST_CASE("accept_channels() that gets no memory says so, and takes no connection" * needs_failing_new) {
  const Watchdog watchdog("accept_channels without memory");
  Listener listener = listen();
  auto links = source(listener);
  sweep(
      nothing, [&](int) { return listener.accept_channels(3, 10s); },
      [&](Result<std::vector<FdTransport>>& accepted, bool injected) {
        REQUIRE(accepted.has_value() != injected);
        if (injected) {
          CHECK_MESSAGE(accepted.error().code == no_memory(), text(accepted));
          CHECK(accepted.error().stage == Stage::accept);
        } else {
          CHECK(letter((*accepted)[0]) == '0');
          CHECK(letter((*accepted)[2]) == '2');
        }
      });
}

TEST_CASE("any_waiting() that gets no memory says so, and loses no connection" * needs_failing_new) {
  const Watchdog watchdog("any_waiting without memory");
  Listener listener = listen();
  auto links = source(listener);
  sweep(
      nothing, [&](int) { return listener.any_waiting([](std::span<const std::byte>) { return false; }); },
      [&](Result<bool>& more, bool injected) {
        REQUIRE(more.has_value() != injected);
        if (injected) CHECK_MESSAGE(more.error().code == no_memory(), text(more));
      });
  for (const char expected : {'0', '1', '2'}) {
    auto link = listener.accept(0ms);
    REQUIRE_MESSAGE(link.has_value(), text(link));
    CHECK(letter(*link) == expected);
  }
}

TEST_CASE("accept_source() that gets no memory says so, leaves nothing behind, and takes the next source" *
          needs_failing_new) {
  const Watchdog watchdog("accept_source without memory");
  Listener listener = listen();
  std::vector<FdTransport> links = source(listener);
  const Leftovers before;
  sweep(
      nothing, [&](int) { return accept_source(listener, 2); },
      [&](Result<SourceLinks<>>& accepted, bool injected) {
        REQUIRE(accepted.has_value() != injected);
        if (injected) {
          CHECK_MESSAGE(accepted.error().code == no_memory(), text(accepted));
          CHECK(accepted.error().stage == Stage::accept);
          while (listener.accept(0ms)) {
          }
          CHECK(before.no_descriptor());
          links.clear();
          links = source(listener);
        } else {
          CHECK(letter(accepted->main) == '0');
        }
      });
}

TEST_CASE("An acceptor that gets no memory loses no connection: the next call gets it" * needs_failing_new) {
  const Watchdog watchdog("an acceptor without memory");
  Listener listener = listen();
  auto acceptor = PlainAcceptor::open(listener);
  REQUIRE(acceptor.has_value());
  auto links = source(listener);
  std::string said;
  for (std::uint64_t at = 0; said.size() < 3; ++at) {
    REQUIRE(at < 100);
    Result<std::optional<Arrival<FdTransport>>> next;
    {
      const FailAllocation short_of_memory(at % 3);
      next = acceptor->next(deadline_after(10s));
    }
    if (!next) {
      CHECK_MESSAGE(next.error().code == no_memory(), text(next));
    } else {
      said += letter((*next)->link);
    }
  }
  CHECK(said.size() == 3);
  for (const char each : {'0', '1', '2'}) CHECK(said.contains(each));
}

TEST_CASE("A connection that cannot be watched is an error, and is accepted once that is over") {
  const Watchdog watchdog("a failed watch");
  Listener listener = listen();
  unsigned refused = 0;
  auto acceptor = PlainAcceptor::open(listener, {.on_refused = [&](const Error&) { ++refused; }});
  REQUIRE(acceptor.has_value());
  auto links = source(listener);
  for (int twice = 0; twice < 2; ++twice) {
    watches_left = 0;
    const auto failed = acceptor->next(deadline_after(10s));
    watches_left = -1;
    REQUIRE_FALSE(failed.has_value());
    CHECK_MESSAGE(failed.error().code == std::errc::no_space_on_device, text(failed));
    CHECK_FALSE(acceptor->pending());
  }
  std::string said(3, ' ');
  for (int i = 0; i < 3; ++i) {
    auto next = acceptor->next(deadline_after(10s));
    REQUIRE_MESSAGE((next && *next), text(next));
    REQUIRE((*next)->number < 3);
    said[(*next)->number] = letter((*next)->link);
  }
  CHECK(said == "012");
  CHECK(refused == 0);
}

#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
TEST_CASE_TEMPLATE("Handshakes that get no memory say so, and leave nothing behind" * needs_failing_new, L,
                   TLS_LIBRARIES) {
  const Watchdog watchdog("handshakes without memory");
  const auto server = credentials<L>("good", TlsRole::server);
  auto pair = unix_links(1);  // what the library keeps is there now
  (void)L::Handshake::start(std::move(pair.receiver[0]), server, {});
  const Leftovers before;
  sweep([] { return unix_links(1); },
        [&](Links<FdTransport> links) { return L::Handshake::start(std::move(links.receiver[0]), server, {}); },
        [&](Result<typename L::Handshake>& started, bool) {
          if (!started) CHECK(started.error().stage == Stage::setup);
          started = std::unexpected(Error{});
          CHECK(before.no_descriptor());
        });
  // Within the handshakes the memory is the library's affair: a silent peer ends each.
  sweep([] { return unix_links(2); },
        [&](Links<FdTransport> links) {
          return tls_handshakes(std::move(links.receiver), server, {.handshake_timeout = 1ms});
        },
        [&](Result<std::vector<typename L::Transport>>& made, bool) {
          CHECK_FALSE(made.has_value());
          CHECK(before.no_descriptor());
        });
  // Where malloc itself fails, libtasn1 crashes.
  if (live_bytes() != 0) return;
  sweep([] { return tls_files() + "/good"; },
        [&](const std::string& folder) { return L::Credentials::x509(folder, TlsRole::server); },
        [&](Result<typename L::Credentials>& read, bool injected) { CHECK((read.has_value() || injected)); });
}
#endif
