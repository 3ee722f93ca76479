// SPDX-License-Identifier: MIT
//
// The Acceptor contract of transport/acceptor.hpp as a check that you can run on an acceptor of your own:
//
//   auto report = multifd::check_acceptor_contract<MyAcceptor>(
//       [](multifd::Listener& listener, multifd::AcceptorSetup setup) { return MyAcceptor::open(listener, ...); },
//       [](const multifd::Address& address, std::string_view text) { return my_connection_that_says(address, text); });
#pragma once

#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/testing/transport_contract.hpp"
#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/algorithms.hpp"
#include "multifd/transport/connect.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd {

/// What the check wants of an acceptor that it opens.
struct AcceptorSetup {
  std::chrono::milliseconds limit{0};  ///< how long a connection may take until its first bytes are there; 0: no limit
  std::function<void(const Error&)> on_refused{};
};

struct AcceptorContractOptions {
  Address address{.kind = AddressKind::tcp, .host = "127.0.0.1"};  ///< where to listen
  /// How long a call may take that does not hang. Only an acceptor that fails needs so long.
  std::chrono::milliseconds patience = std::chrono::seconds(10);
};

namespace testing::detail {

template <Acceptor A, class Open, class Come>
class AcceptorContract {
  using Client = std::invoke_result_t<Come&, const Address&, std::string_view>;
  using Clock = std::chrono::steady_clock;
  using Next = Result<std::optional<Arrival<typename A::Link>>>;

 public:
  AcceptorContract(Open opens, Come comes, AcceptorContractOptions options)
      : open_(std::move(opens)), come_(std::move(comes)), options_(std::move(options)) {}

  ContractReport run() {
    in_order();
    silence_delays_nobody();
    strangers();
    time_limit();
    deadline();
    interrupts();
    looked_at();
    watched_end();
    shut_down_listener();
    destructor();
    too_many();
    return std::move(report_);
  }

 private:
  /// A listener, an acceptor at it, and what the acceptor has refused. On the heap, so that nothing moves.
  struct Scene {
    std::optional<Interrupt> interrupt{};
    std::optional<Listener> listener{};
    std::vector<Error> refused{};
    std::optional<A> acceptor{};
  };

  std::unique_ptr<Scene> scene(std::chrono::milliseconds limit = {}, unsigned backlog = 64) {
    auto made = std::make_unique<Scene>();
    auto interrupt = Interrupt::create();
    if (!report_.expect(interrupt.has_value(), "no eventfd")) return nullptr;
    made->interrupt.emplace(std::move(*interrupt));
    auto listener = Listener::listen(options_.address, backlog, {.interrupt = &*made->interrupt});
    if (!report_.expect(listener.has_value(), "cannot listen at the address of the options")) return nullptr;
    made->listener.emplace(std::move(*listener));
    auto acceptor =
        open_(*made->listener,
              AcceptorSetup{limit, [&refused = made->refused](const Error& error) { refused.push_back(error); }});
    if (!report_.expect(acceptor.has_value(), "open: failed" + (acceptor ? "" : text(acceptor.error()))))
      return nullptr;
    made->acceptor.emplace(std::move(*acceptor));
    return made;
  }

  static std::string text(const Error& error) { return ": " + describe(error); }

  /// A client in a thread of its own: a handshake needs the acceptor.
  std::future<Client> come(Scene& scene, std::string said) {
    return std::async(std::launch::async, [this, address = scene.listener->local_address(), said = std::move(said)] {
      return come_(address, said);
    });
  }
  std::optional<FdTransport> silent(Scene& scene) {
    auto link = connect_to(scene.listener->local_address(), {.connect_timeout = options_.patience});
    if (!report_.expect(link.has_value(), "cannot connect" + (link ? "" : text(link.error())))) return std::nullopt;
    return std::move(*link);
  }
  /// Whether the other side has closed the connection.
  bool closes(FdTransport& link) {
    std::byte byte{};
    const iovec room = mutable_buffer(std::span(&byte, 1));
    const auto got = link.read_some(std::span(&room, 1), options_.patience, nullptr);
    return got ? *got == 0 : got.error().code != Errc::timed_out;
  }

  Clock::time_point soon() const { return Clock::now() + options_.patience; }

  /// As many bytes, or as many as come.
  std::string read(typename A::Link& link, std::size_t count) {
    std::string bytes(count, '\0');
    std::size_t got = 0;
    while (got < count) {
      const iovec room{bytes.data() + got, count - got};
      const auto more = [&] {
        if constexpr (HasTimeLimits<typename A::Link>)
          return link.read_some(std::span(&room, 1), options_.patience, nullptr);
        else
          return link.read_some(std::span(&room, 1));
      }();
      if (!more || *more == 0) break;
      got += *more;
    }
    bytes.resize(got);
    return bytes;
  }

  /// The next connection, and whether it says `said`, all of it.
  std::optional<Arrival<typename A::Link>> expect_next(Scene& scene, const std::string& what, std::string_view said) {
    Next next = scene.acceptor->next(soon(), nullptr);
    if (!report_.expect(next.has_value() && next->has_value(),
                        what + ": not accepted" + (next ? "" : text(next.error()))))
      return std::nullopt;
    Arrival<typename A::Link>& arrival = **next;
    std::uint32_t magic = 0;
    for (const char c : said.substr(0, 4)) magic = magic << 8 | static_cast<unsigned char>(c);
    report_.expect(arrival.magic == magic, what + ": magic is not the first four bytes, big-endian");
    report_.expect(read(arrival.link, said.size()) == said, what + ": the bytes that came are not there to be read");
    return std::move(arrival);
  }

  void in_order() {
    auto on = scene();
    if (!on) return;
    std::optional<std::uint64_t> before;
    for (const std::string_view said : {"QEVM-a", "\x11\x22\x33\x44-b", "four bytes and more", "abcd"}) {
      auto client = come(*on, std::string(said));
      const auto arrival = expect_next(*on, "one after the other", said);
      (void)client.get();
      if (!arrival) return;
      report_.expect(!before || arrival->number > *before, "number: does not grow in the order of accepting");
      before = arrival->number;
    }
    report_.expect(!on->acceptor->pending(), "pending: true although every connection was returned");
    report_.expect(on->refused.empty(), "on_refused: called for a connection that was returned");
  }

  void silence_delays_nobody() {
    auto on = scene();
    if (!on) return;
    std::vector<std::optional<FdTransport>> silence;
    for (int i = 0; i < 3; ++i) silence.push_back(silent(*on));
    auto client = come(*on, "late-1");
    const auto arrival = expect_next(*on, "behind silent connections", "late-1");
    (void)client.get();
    if (!arrival) return;
    report_.expect(on->acceptor->pending(), "pending: false although silent connections are accepted");
    auto other = come(*on, "late-2");
    const auto last = expect_next(*on, "behind silent connections, again", "late-2");
    (void)other.get();
    report_.expect(!last || last->number > arrival->number, "number: does not grow in the order of accepting");
  }

  /// Waits until a stranger is told of, in one way or the other.
  bool told(Scene& scene, std::size_t refused_before) {
    for (const auto limit = soon(); Clock::now() < limit;) {
      if (scene.refused.size() > refused_before) return true;
      const Next next = scene.acceptor->next(Clock::now() + std::chrono::milliseconds(20), nullptr);
      if (next && *next) return true;
      if (!next && next.error().code != Errc::timed_out) {
        report_.fail("a stranger: is an error of next()" + text(next.error()));
        return false;
      }
    }
    return false;
  }

  void strangers() {
    auto on = scene();
    if (!on) return;
    for (const std::string_view said : {"", "x", "GET / HTTP/1.1\r\n\r\n"}) {
      const std::size_t before = on->refused.size();
      {
        auto stranger = silent(*on);
        if (!stranger) return;
        (void)write_all(*stranger, std::as_bytes(std::span(said)));
        (void)stranger->finish();
        report_.expect(told(*on, before), "a stranger that says \"" + std::string(said.substr(0, 3)) +
                                              "\" and ends: neither returned nor told of");
      }
      auto client = come(*on, "after a stranger");
      const auto arrival = expect_next(*on, "behind a stranger", "after a stranger");
      (void)client.get();
      if (!arrival) return;
    }
    report_.expect(!on->acceptor->pending(), "pending: true although every stranger was told of");
  }

  void time_limit() {
    auto on = scene(std::chrono::milliseconds(50));
    if (!on) return;
    auto link = silent(*on);
    if (!link) return;
    for (const auto limit = soon(); on->refused.empty() && Clock::now() < limit;) {
      const Next next = on->acceptor->next(Clock::now() + std::chrono::milliseconds(20), nullptr);
      if (!report_.expect(!next && next.error().code == Errc::timed_out, "a silent connection: ends next()")) return;
    }
    if (!report_.expect(!on->refused.empty(), "time limit: on_refused is not called")) return;
    report_.expect(on->refused.front().code == Errc::timed_out, "time limit: on_refused gets another error");
    report_.expect(!on->acceptor->pending(), "time limit: the connection is pending still");
    report_.expect(closes(*link), "time limit: the connection is not closed");
  }

  void deadline() {
    auto on = scene();
    if (!on) return;
    TimedCall<std::optional<Error>> passed(
        [acceptor = &*on->acceptor] { return error_of(acceptor->next(Clock::now(), nullptr)); });
    const auto* error = passed.wait(options_.patience);
    // A call that never returns uses what would be destroyed.
    if (!report_.expect(error, "next: does not return although its deadline has passed"))
      return static_cast<void>(on.release());
    report_.expect(*error && (*error)->code == Errc::timed_out, "next: timed_out is not its error at the deadline");
    report_.expect(!*error || (*error)->stage == Stage::accept, "next: the stage of its errors is not accept");
  }

  static std::optional<Error> error_of(const Next& next) { return next ? std::nullopt : std::optional(next.error()); }

  void interrupts() {
    for (const bool of_listener : {false, true}) {
      const std::string name = of_listener ? "the listener's Interrupt" : "an Interrupt";
      auto on = scene();
      auto own = Interrupt::create();
      if (!on || !own) return;
      auto interrupt = std::make_shared<Interrupt>(std::move(*own));
      const auto wait = [acceptor = &*on->acceptor, of_listener, interrupt] {
        return error_of(acceptor->next(Clock::time_point::max(), of_listener ? nullptr : interrupt.get()));
      };
      TimedCall<std::optional<Error>> waiting(wait);
      report_.expect(!waiting.wait(std::chrono::milliseconds(50)), "next: does not wait for a connection");
      (of_listener ? *on->interrupt : *interrupt).trigger();
      const auto* ended = waiting.wait(options_.patience);
      if (!report_.expect(ended, name + ": does not end next()")) return static_cast<void>(on.release());
      report_.expect(*ended && (*ended)->code == Errc::cancelled, name + ": next() says something else than cancelled");
      TimedCall<std::optional<Error>> later(wait);
      ended = later.wait(options_.patience);
      if (!report_.expect(ended, name + ": triggered before, does not end next()"))
        return static_cast<void>(on.release());
      report_.expect(*ended && (*ended)->code == Errc::cancelled, name + ": triggered before, next() goes on");
    }
  }

  /// The next source's connections, which a receiver has looked at for a channel too many.
  void looked_at() {
    auto on = scene();
    if (!on) return;
    auto client = come(*on, "next source");
    pollfd entry{.fd = on->listener->poll_handle(), .events = POLLIN, .revents = 0};
    if (!report_.expect(::poll(&entry, 1, static_cast<int>(options_.patience.count())) == 1,
                        "the listener: is not readable"))
      return;
    for (int twice = 0; twice < 2; ++twice)
      (void)on->listener->any_waiting([](std::span<const std::byte>) { return false; });
    (void)expect_next(*on, "a connection that the listener has looked at", "next source");
    (void)client.get();
  }

  void watched_end() {
    auto on = scene();
    if (!on) return;
    std::optional<Client> client;
    auto coming = come(*on, "watched");
    auto arrival = expect_next(*on, "a connection to be watched", "watched");
    client.emplace(coming.get());
    if (!arrival) return;
    const auto watched = on->acceptor->watch_end(arrival->link, 0);
    if (!report_.expect(watched.has_value(), "watch_end: failed")) return;
    auto next = error_of(on->acceptor->next(Clock::now() + std::chrono::milliseconds(20), nullptr));
    report_.expect(next && next->code == Errc::timed_out, "watch_end: next() returns although nothing has ended");
    client.reset();
    const Next ended = on->acceptor->next(soon(), nullptr);
    report_.expect(ended && !*ended, "watch_end: next() does not return none at the end of the connection");
    next = error_of(on->acceptor->next(Clock::now() + std::chrono::milliseconds(20), nullptr));
    report_.expect(next && next->code == Errc::timed_out, "watch_end: next() returns more than once");
  }

  void shut_down_listener() {
    auto on = scene();
    if (!on) return;
    ::shutdown(on->listener->native_handle(), SHUT_RDWR);
    TimedCall<std::optional<Error>> waiting(
        [acceptor = &*on->acceptor] { return error_of(acceptor->next(Clock::time_point::max(), nullptr)); });
    const auto* ended = waiting.wait(options_.patience);
    if (!report_.expect(ended, "next: goes on although the listener takes no connection any more")) {
      on->interrupt->trigger();
      if (!waiting.wait(options_.patience)) (void)on.release();
      return;
    }
    report_.expect(ended->has_value(),
                   "next: returns without an error although the listener takes no connection any more");
  }

  void destructor() {
    auto on = scene();
    if (!on) return;
    auto link = silent(*on);
    auto coming = come(*on, "kept");
    auto arrival = expect_next(*on, "a connection that is kept", "kept");
    auto client = coming.get();
    if (!link || !arrival) return;
    on->acceptor.reset();
    report_.expect(closes(*link), "destructor: leaves a connection open that was not returned");
    report_.expect(arrival->link.finish().has_value(), "destructor: breaks a connection that was returned");
    auto other = silent(*on);
    report_.expect(on->listener->accept(options_.patience).has_value(), "destructor: takes the listener along");
  }

  /// Silent connections do not fill the process.
  void too_many() {
    rlimit descriptors{};
    ::getrlimit(RLIMIT_NOFILE, &descriptors);
    if (descriptors.rlim_cur < 2 * max_waiting_connections + 200)
      return report_.note(
          "this process may not open enough descriptors: silent connections without end were not tried");
    // However few of them an acceptor has the time to take meanwhile, none waits for a place in the system's queue.
    auto on = scene({}, static_cast<unsigned>(max_waiting_connections) + 64);
    if (!on) return;
    std::vector<FdTransport> silence;
    for (std::size_t i = 0; i <= max_waiting_connections; ++i) {
      auto link = silent(*on);
      if (!link) return;
      silence.push_back(std::move(*link));
      if (i % 32 == 0 || i == max_waiting_connections) {
        const auto next = error_of(on->acceptor->next(Clock::now() + std::chrono::milliseconds(10), nullptr));
        if (!report_.expect(next && next->code == Errc::timed_out, "silent connections without end: end next()"))
          return;
      }
    }
    for (const auto limit = soon(); on->refused.empty() && Clock::now() < limit;)
      (void)on->acceptor->next(Clock::now() + std::chrono::milliseconds(10), nullptr);
    report_.expect(on->refused.size() == 1, "silent connections without end: on_refused is not called for the oldest");
    report_.expect(closes(silence.front()), "silent connections without end: the oldest is not closed for a new one");
    auto client = come(*on, "in spite of them");
    (void)expect_next(*on, "behind as many silent connections as may wait", "in spite of them");
    (void)client.get();
  }

  Open open_;
  Come come_;
  AcceptorContractOptions options_;
  ContractReport report_;
};

}  // namespace testing::detail

/// Checks an acceptor against the contract of the Acceptor concept.
///
/// Params `open(Listener&, AcceptorSetup)`: returns a Result<A>. `come(address, text)`: connects, does what a connection
///   of this acceptor does first, says `text`, and returns an object that keeps the connection open until it is
///   destroyed. Called in other threads; has to end by itself when nobody accepts.
/// Returns the rules that were broken. When a call never returns, its thread and the acceptor are left behind.
/// Cost: about a second, some threads, and a thousand descriptors where the process may have them.
template <Acceptor A, class Open, class Come>
[[nodiscard]] ContractReport check_acceptor_contract(Open open, Come come, AcceptorContractOptions options = {}) {
  return testing::detail::AcceptorContract<A, Open, Come>(std::move(open), std::move(come), std::move(options)).run();
}

}  // namespace multifd
