// SPDX-License-Identifier: MIT
#include "multifd/qemu/accept_source.hpp"

#include <doctest/doctest.h>

#include <poll.h>
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <ostream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "multifd/transport/algorithms.hpp"
#include "unit/transport/pairs.hpp"
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include "support/tls_links.hpp"
#endif

using namespace multifd;
using namespace std::chrono_literals;

namespace {

constexpr std::string_view main_says = "QEVM";
constexpr std::string_view channel_says = "\x11\x22\x33\x44";
constexpr std::uint32_t http = 0x47455420;  // "GET "

void say(FdTransport& link, std::string_view text) {
  REQUIRE(write_all(link, std::as_bytes(std::span(text))).has_value());
}

/// A listening destination, and the connections of the other side.
class Destination {
 public:
  explicit Destination(AddressKind kind, unsigned backlog = 64) {
    if (kind == AddressKind::unix_socket) {
      char name[] = "/tmp/multifd-test-XXXXXX";
      REQUIRE(::mkdtemp(name) != nullptr);
      folder_ = name;
    }
    auto opened = Listener::listen(kind == AddressKind::tcp ? Address{.kind = kind, .host = "127.0.0.1"}
                                                            : Address{.kind = kind, .path = folder_ + "/socket"},
                                   backlog);
    REQUIRE_MESSAGE(opened.has_value(), describe(opened.error()));
    listener_.emplace(std::move(*opened));
  }
  ~Destination() {
    listener_.reset();
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  Listener& listener() { return *listener_; }

  FdTransport connect() {
    auto link = connect_to(listener_->local_address(), {.connect_timeout = 5s});
    REQUIRE_MESSAGE(link.has_value(), describe(link.error()));
    return std::move(*link);
  }
  /// A connection that says `text` at once.
  FdTransport connect(std::string_view text) {
    FdTransport link = connect();
    say(link, text);
    return link;
  }

  std::future<Result<SourceLinks<>>> accept(unsigned channels, AcceptSourceOptions options = {}) {
    return std::async(std::launch::async, [this, channels, options = std::move(options)] {
      return accept_source(*listener_, channels, options);
    });
  }

 private:
  std::string folder_;
  std::optional<Listener> listener_;
};

template <class T>
std::string read(T& link, std::size_t bytes) {
  std::string text(bytes, '\0');
  REQUIRE(read_exact(link, std::as_writable_bytes(std::span(text))).has_value());
  return text;
}

/// Whether the other end closes the connection, in order or not, within `limit`.
bool is_closed(FdTransport& link, std::chrono::milliseconds limit = 5s) {
  pollfd entry{.fd = link.native_handle(), .events = POLLIN, .revents = 0};
  if (::poll(&entry, 1, static_cast<int>(limit.count())) != 1) return false;
  std::byte byte;
  iovec buffer = mutable_buffer(std::span(&byte, 1));
  const auto got = link.read_some(std::span(&buffer, 1));
  return !got || *got == 0;
}

/// A source of one main connection and some channels: each says what it is and a letter of its own.
constexpr unsigned source_channels = 3;
std::string greeting(unsigned connection) {
  return std::string(connection == 0 ? main_says : channel_says) + static_cast<char>('a' + connection);
}

/// Whether a whole source was accepted, with every byte still there.
template <class T>
void check_accepted(Result<SourceLinks<T>> source) {
  REQUIRE_MESSAGE(source.has_value(), describe(source.error()));
  CHECK(read(source->main, 5) == greeting(0));
  REQUIRE(source->channels.size() == source_channels);
  std::vector<std::string> said;
  for (T& channel : source->channels) said.push_back(read(channel, 5));
  std::ranges::sort(said);
  CHECK(said == std::vector{greeting(1), greeting(2), greeting(3)});
}

template <class Body>
void in_every_order(Body&& body) {
  std::array<unsigned, 1 + source_channels> order{0, 1, 2, 3};
  do {
    CAPTURE(order);
    body(order);
  } while (std::ranges::next_permutation(order).found);
}

template <class T>
Error error_of(const Result<T>& result) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().stage == Stage::accept, describe(result.error()));
  return result.error();
}

constexpr AddressKind kinds[] = {AddressKind::tcp, AddressKind::unix_socket};

}  // namespace

TEST_CASE("Main connection and channels may come in any order, before anybody accepts") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    in_every_order([&](const auto& order) {
      std::vector<FdTransport> links;
      for (const unsigned connection : order) links.push_back(destination.connect(greeting(connection)));
      check_accepted(accept_source(destination.listener(), source_channels));
    });
  }
}

TEST_CASE("Connections may come in one order and send in any other, while the wait goes on") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    in_every_order([&](const auto& order) {
      auto accepted = destination.accept(source_channels);
      std::vector<FdTransport> links;
      for (unsigned connection = 0; connection <= source_channels; ++connection) links.push_back(destination.connect());
      for (const unsigned connection : order) say(links[connection], greeting(connection));
      check_accepted(accepted.get());
    });
  }
}

TEST_CASE("First bytes may come one at a time, in turn, and the wait does not spin") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    long cpu_us = 0;
    auto accepted = std::async(std::launch::async, [&] {
      timespec before{}, after{};
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
      auto source = accept_source(destination.listener(), source_channels);
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
      cpu_us = (after.tv_sec - before.tv_sec) * 1000000 + (after.tv_nsec - before.tv_nsec) / 1000;
      return source;
    });
    std::vector<FdTransport> links;
    for (unsigned connection = 0; connection <= source_channels; ++connection) links.push_back(destination.connect());
    for (std::size_t byte = 0; byte < 4; ++byte) {
      CHECK(accepted.wait_for(60ms) == std::future_status::timeout);
      for (unsigned connection = 0; connection <= source_channels; ++connection)
        say(links[connection], greeting(connection).substr(byte, 1));
    }
    for (unsigned connection = 0; connection <= source_channels; ++connection)
      say(links[connection], greeting(connection).substr(4));
    check_accepted(accepted.get());
    CHECK(cpu_us < 25'000);  // of the 240 ms that it waited; a busy machine gives a spinning thread little more
  }
}

TEST_CASE("Strangers before, between and behind are reported and closed, and do no harm") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<std::uint32_t> strangers;
    const AcceptSourceOptions options{.on_stranger = [&](std::uint32_t first) { strangers.push_back(first); }};
    std::vector<FdTransport> closed, links;
    const auto stranger = [&](std::string_view text, bool then_end) {
      closed.push_back(destination.connect(text));
      if (then_end) REQUIRE(closed.back().finish().has_value());
    };
    stranger("GET / HTTP/1.1\r\n\r\n", false);
    stranger("", true);
    links.push_back(destination.connect(greeting(2)));
    stranger("\x44\x33\x22\x11 the wrong way round", false);
    stranger("\x11\x22\x33", true);  // nearly
    links.push_back(destination.connect(greeting(0)));
    stranger("QEV", true);
    stranger("GET ", true);
    links.push_back(destination.connect(greeting(1)));
    {
      const FdTransport gone = destination.connect();  // over TCP: reset
    }
    links.push_back(destination.connect(greeting(3)));
    check_accepted(accept_source(destination.listener(), source_channels, options));
    std::ranges::sort(strangers);
    CHECK(strangers == std::vector<std::uint32_t>{0, 0, 0, 0, 0x44332211, http, http});
    for (FdTransport& link : closed) CHECK(is_closed(link));
  }
}

namespace {

/// A channel's hello, and what else it says.
std::string hello(unsigned id, std::string_view more = {}, char uuid = 0) {
  std::string text(channel_says);
  text.resize(8);
  text.resize(24, uuid);
  text.resize(64);
  text[24] = static_cast<char>(id);
  return text + std::string(more);
}

/// One try of a source: main connection (0) and channels, in the order of `order`.
std::vector<FdTransport> a_try(Destination& destination, std::initializer_list<unsigned> order,
                               std::string_view letter = "1") {
  std::vector<FdTransport> links;
  for (const unsigned connection : order)
    links.push_back(destination.connect(connection == 0 ? std::string(main_says) + std::string(letter)
                                                        : hello(connection - 1, letter)));
  return links;
}

/// Whether the source that was accepted is, in all its connections, the one that says `letter`.
void check_try(Result<SourceLinks<>> source, std::string_view letter) {
  REQUIRE_MESSAGE(source.has_value(), describe(source.error()));
  CHECK(read(source->main, 5) == std::string(main_says) + std::string(letter));
  for (FdTransport& channel : source->channels) CHECK(read(channel, 65).substr(64) == letter);
}

}  // namespace

TEST_CASE("What is left of a try that was given up is dropped, and the next one is taken") {
  for (const AddressKind kind : kinds)
    for (const std::initializer_list<unsigned> order :
         {std::initializer_list<unsigned>{0, 1}, {1, 0}, {2, 0}, {0}, {2}, {1, 2}}) {
      Destination destination(kind);
      std::size_t dropped = 0;
      auto accepted = destination.accept(2, {.timeout = 20s, .on_dropped = [&](std::size_t n) { dropped += n; }});
      for (int twice = 0; twice < 2; ++twice) {
        const auto links = a_try(destination, order);  // never a whole one, which would be taken
        destination.connect("GET / HTTP/1.1\r\n");     // a stranger in between
      }
      const auto good = a_try(destination, {0, 2, 1}, "g");
      check_try(accepted.get(), "g");
      CHECK(dropped > 0);
    }
}

TEST_CASE("A try that was not closed is replaced by the next: by a main connection, or by a channel's id") {
  for (const std::initializer_list<unsigned> order :
       {std::initializer_list<unsigned>{0, 1, 2, 3}, {0, 3, 2, 1}, {1, 2, 3, 0}}) {
    Destination destination(AddressKind::tcp);
    auto stale = a_try(destination, {0, 1, 2});
    auto good = a_try(destination, order, "g");
    check_try(accept_source(destination.listener(), 3), "g");
    for (FdTransport& link : stale) CHECK(is_closed(link));
  }
}

TEST_CASE("A source that gives up and does not come again is not waited for") {
  for (const AddressKind kind : kinds)
    for (const std::initializer_list<unsigned> order : {std::initializer_list<unsigned>{0, 1}, {1, 2}, {0}}) {
      Destination destination(kind);
      auto accepted = destination.accept(2, {.timeout = 600s, .retry_timeout = 100ms});
      a_try(destination, order);
      const Error error = error_of(accepted.get());
      CHECK(error.code == Errc::peer_closed);
      CHECK_MESSAGE(std::string_view(error.op).contains("gave up"), error.op);
    }
}

TEST_CASE("A source with only one of its connections broken is not waited for either, nor is its next try spoiled") {
  for (const unsigned broken : {0u, 1u, 2u}) {
    CAPTURE(broken);
    Destination destination(AddressKind::tcp);
    auto accepted = destination.accept(3, {.timeout = 600s, .retry_timeout = 10s});
    auto stale = a_try(destination, {0, 1, 2});
    stale.erase(stale.begin() + broken);
    const auto good = a_try(destination, {0, 1, 2, 3}, "g");
    check_try(accepted.get(), "g");
    for (FdTransport& link : stale) CHECK(is_closed(link));
    auto alone = destination.accept(3, {.timeout = 600s, .retry_timeout = 100ms});
    stale = a_try(destination, {0, 1, 2});
    stale.erase(stale.begin() + broken);
    CHECK(error_of(alone.get()).code == Errc::peer_closed);
  }
}

TEST_CASE("A source whose main connection speaks when a channel has ended already is not waited for either") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::promise<void> dropped;
    auto accepted = destination.accept(
        2, {.timeout = 600s, .retry_timeout = 100ms, .on_dropped = [&](std::size_t) { dropped.set_value(); }});
    FdTransport main = destination.connect();
    static_cast<void>(destination.connect(hello(0)));  // and closed
    REQUIRE(dropped.get_future().wait_for(20s) == std::future_status::ready);
    say(main, main_says);
    const FdTransport other = destination.connect(hello(1));
    CHECK(error_of(accepted.get()).code == Errc::peer_closed);
  }
}

TEST_CASE("A source that is through with everything before anybody accepts is taken, though all has ended") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<FdTransport> links;
    for (const unsigned connection : {0u, 2u, 1u}) {
      links.push_back(destination.connect(connection == 0 ? std::string(main_says) : hello(connection - 1)));
      say(links.back(), std::string(400, 'x'));
      REQUIRE(links.back().finish().has_value());
    }
    auto source = accept_source(destination.listener(), 2);
    REQUIRE_MESSAGE(source.has_value(), describe(source.error()));
    CHECK(read(source->main, 404).ends_with('x'));
    for (FdTransport& channel : source->channels) CHECK(read(channel, 464).ends_with('x'));
  }
}

TEST_CASE("Silent connections keep nobody waiting, and are closed in the end") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<FdTransport> silent, links;
    unsigned strangers = 0;
    const test::Stopwatch time;
    for (unsigned connection = 0; connection <= source_channels; ++connection) {
      silent.push_back(destination.connect(connection % 2 == 0 ? "" : "QEV"));
      links.push_back(destination.connect(greeting(connection)));
    }
    check_accepted(
        accept_source(destination.listener(), source_channels, {.on_stranger = [&](std::uint32_t) { ++strangers; }}));
    CHECK(time.elapsed() < test::no_hang);
    CHECK(strangers == 0);
    for (FdTransport& link : silent) CHECK(is_closed(link));
  }
}

TEST_CASE("Nobody fills the process with silent connections: the oldest gives way, and on_refused() is told") {
  constexpr unsigned most = 512;
  rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &old) == 0);
  rlimit more = old;
  more.rlim_cur = std::max<rlim_t>(old.rlim_cur, 2 * most + 200);
  if (more.rlim_cur > old.rlim_max) {
    MESSAGE("this process may not open enough descriptors");
    return;
  }
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &more) == 0);
  {
    Destination destination(AddressKind::unix_socket);
    std::vector<Error> refused;
    auto acceptor = PlainAcceptor::open(destination.listener(),
                                        {.on_refused = [&](const Error& error) { refused.push_back(error); }});
    REQUIRE(acceptor.has_value());
    auto accepted = std::async(std::launch::async, [&] { return accept_source(*acceptor, source_channels); });
    std::vector<FdTransport> silent, links;
    for (unsigned i = 0; i < most; ++i) silent.push_back(destination.connect());
    CHECK_FALSE(is_closed(silent.front(), 20ms));
    silent.push_back(destination.connect());
    CHECK(is_closed(silent.front()));
    CHECK_FALSE(is_closed(silent[1], 20ms));
    for (unsigned connection = 0; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    check_accepted(accepted.get());
    // The source's connections have taken the place of others, too, unless the ones before had been returned.
    REQUIRE(refused.size() >= 1 + 1);
    REQUIRE(refused.size() <= 1 + 1 + source_channels);
    for (const Error& error : refused) {
      CHECK_MESSAGE(error.code == std::errc::no_buffer_space, describe(error));
      CHECK(error.detail == most);
    }
    CHECK(is_closed(silent[refused.size() - 1]));
    CHECK_FALSE(is_closed(silent[refused.size()], 0ms));
    acceptor = std::unexpected(Error{});
    CHECK(is_closed(silent.back()));
  }
  ::setrlimit(RLIMIT_NOFILE, &old);
}

TEST_CASE("The error names what is missing at the time limit") {
  struct Row {
    bool main;
    unsigned channels;
    const char* says;
  };
  for (const AddressKind kind : kinds)
    for (const Row& row : {Row{false, 0, "no source"}, Row{false, 1, "the main connection did not"},
                           Row{false, 3, "the main connection did not"}, Row{true, 0, "no channel"},
                           Row{true, 1, "fewer channels"}, Row{true, 2, "fewer channels"}}) {
      CAPTURE(row.main);
      CAPTURE(row.channels);
      Destination destination(kind);
      std::vector<FdTransport> links;
      // Neither of these is a part of a source.
      links.push_back(destination.connect());
      links.push_back(destination.connect("GET / HTTP/1.1\r\n"));
      if (row.main) links.push_back(destination.connect(main_says));
      for (unsigned i = 0; i < row.channels; ++i) links.push_back(destination.connect(channel_says));
      const test::Stopwatch time;
      const Error error =
          error_of(accept_source(destination.listener(), source_channels, {.first_timeout = 80ms, .timeout = 80ms}));
      CHECK(error.code == Errc::timed_out);
      CHECK(error.detail == row.channels);
      CHECK_MESSAGE(std::string_view(error.op).contains(row.says), error.op);
      CHECK(time.elapsed() >= std::chrono::milliseconds(80));
      CHECK(time.elapsed() < test::no_hang);
      for (FdTransport& link : links) CHECK(is_closed(link));
    }
}

TEST_CASE("first_timeout is for the first connection of a source, timeout for the rest from then on") {
  Destination destination(AddressKind::unix_socket);
  const auto send_source = [&](std::vector<FdTransport>& links, unsigned from) {
    for (unsigned connection = from; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
  };
  {
    // The rest comes long after first_timeout.
    std::vector<FdTransport> links;
    links.push_back(destination.connect(greeting(0)));
    auto accepted = destination.accept(source_channels, {.first_timeout = 100ms, .timeout = 20s});
    CHECK(accepted.wait_for(300ms) == std::future_status::timeout);
    send_source(links, 1);
    check_accepted(accepted.get());
  }
  {
    // The first comes long after `timeout`.
    auto accepted = destination.accept(source_channels, {.first_timeout = 20s, .timeout = 2s});
    CHECK(accepted.wait_for(2500ms) == std::future_status::timeout);
    std::vector<FdTransport> links;
    send_source(links, 0);
    check_accepted(accepted.get());
  }
}

namespace {

/// Lets connections in as it is told to, and takes note of how long it was to wait for each.
class ScriptedAcceptor {
 public:
  using Clock = multifd::detail::Clock;
  using Link = FdTransport;
  using Next = multifd::Result<std::optional<multifd::Arrival<FdTransport>>>;

  /// The next connection, which says `text`, as the `number`th that was accepted. `in_order`: that nobody reads any
  /// more.
  void comes(std::string_view text, std::uint64_t number) {
    test::FdPair pair = test::unix_pair();
    say(pair.first, text);
    std::uint32_t first = 0;
    for (const char c : text.substr(0, 4)) first = first << 8 | static_cast<unsigned char>(c);
    steps_.push_back({std::move(pair), number, first});
  }
  /// The other end of the connection that came as the `index`th closes.
  void ends(std::size_t index) { steps_.push_back({.ends = index}); }

  Next next(Clock::time_point deadline, const Interrupt*) {
    waits.push_back(deadline);
    if (at_ == steps_.size()) return fail(Errc::timed_out, Stage::accept, "accept");
    Step& step = steps_[at_++];
    if (step.ends) {
      others_[*step.ends].reset();
      return Next(std::nullopt);
    }
    others_.emplace_back(std::move(step.pair->first));
    return Next(multifd::Arrival<FdTransport>{std::move(step.pair->second), step.number, step.magic});
  }
  Result<void> watch_end(const FdTransport&) { return {}; }

  /// Whether this side has closed the connection that came as the `index`th.
  bool closed(std::size_t index) { return is_closed(*others_[index], 0ms); }

  std::vector<Clock::time_point> waits;  ///< until when it was to wait: one for each step, and the last

 private:
  struct Step {
    std::optional<test::FdPair> pair{};
    std::uint64_t number = 0;
    std::uint32_t magic = 0;
    std::optional<std::size_t> ends{};
  };
  std::vector<Step> steps_;
  std::vector<std::optional<FdTransport>> others_;
  std::size_t at_ = 0;
};

// So far apart that no machine is busy enough to mistake one for the other.
const AcceptSourceOptions hours{.first_timeout = 300h, .timeout = 100h, .retry_timeout = 200h};

/// For each wait the limit that it had: f, t or r, in small letters when it ended with that of the wait before.
std::string limits_of(const ScriptedAcceptor& acceptor, ScriptedAcceptor::Clock::time_point began) {
  std::string text;
  for (std::size_t i = 0; i < acceptor.waits.size(); ++i) {
    const auto left = std::chrono::round<std::chrono::hours>(acceptor.waits[i] - began).count();
    const char limit = left == 300 ? 'F' : left == 100 ? 'T' : left == 200 ? 'R' : '?';
    const bool same = i > 0 && acceptor.waits[i] == acceptor.waits[i - 1];
    text += same ? static_cast<char>(limit - 'A' + 'a') : limit;
  }
  return text;
}

}  // namespace

TEST_CASE("Each try has the time limit from its own first connection, and later ones do not begin it anew") {
  struct Row {
    const char* what;
    void (*script)(ScriptedAcceptor&);
    const char* limits;
  };
  for (const Row& row : {
           Row{"one try",
               [](ScriptedAcceptor& acceptor) {
                 acceptor.comes(main_says, 1);
                 acceptor.comes(hello(0), 2);
                 acceptor.comes(hello(1), 3);
               },
               "FTtt"},
           Row{"channels first",
               [](ScriptedAcceptor& acceptor) {
                 acceptor.comes(hello(0), 2);
                 acceptor.comes(main_says, 1);
               },
               "FTt"},
           Row{"a second main connection",
               [](ScriptedAcceptor& acceptor) {
                 acceptor.comes(main_says, 1);
                 acceptor.comes(hello(0), 2);
                 acceptor.comes(main_says, 3);
                 acceptor.comes(hello(0), 4);
               },
               "FTtTt"},
           Row{"a channel's id once more",
               [](ScriptedAcceptor& acceptor) {
                 acceptor.comes(hello(0), 2);
                 acceptor.comes(hello(1), 3);
                 acceptor.comes(hello(0), 5);
                 acceptor.comes(main_says, 4);
               },
               "FTtTT"},
           Row{"a try that gave up, and its next one's channels speak first",
               [](ScriptedAcceptor& acceptor) {
                 acceptor.comes(main_says, 1);
                 acceptor.ends(0);
                 acceptor.comes(hello(0), 3);
                 acceptor.comes(hello(1), 4);
                 acceptor.comes(main_says, 2);
                 acceptor.comes(hello(2), 5);
               },
               "FTRRRT"},
       }) {
    CAPTURE(row.what);
    ScriptedAcceptor acceptor;
    row.script(acceptor);
    const auto began = ScriptedAcceptor::Clock::now();
    const auto source = multifd::detail::collect_source(acceptor, 3, hours);
    CHECK(limits_of(acceptor, began) == std::string(row.limits).substr(0, acceptor.waits.size()));
    CHECK(acceptor.waits.size() == std::string_view(row.limits).size());
    CHECK(source.has_value() == (std::string_view(row.what).starts_with("a try that gave up")));
  }
}

TEST_CASE("A main connection that was accepted before the present one, and speaks only after it, is closed") {
  // As under TLS, where a connection of an older try can be through its handshake after those of the next one.
  ScriptedAcceptor acceptor;
  std::vector<std::uint32_t> strangers;
  AcceptSourceOptions options = hours;
  options.on_stranger = [&](std::uint32_t first) { strangers.push_back(first); };
  acceptor.comes(std::string(main_says) + "g", 4);
  acceptor.comes(hello(0, "g"), 5);
  acceptor.comes(std::string(main_says) + "1", 1);
  acceptor.comes(hello(1, "g"), 6);
  auto source = multifd::detail::collect_source(acceptor, 2, options);
  REQUIRE(source.has_value());
  CHECK(read(source->main, 5) == std::string(main_says) + "g");
  for (FdTransport& channel : source->channels) CHECK(read(channel, 65).ends_with('g'));
  CHECK(acceptor.closed(2));
  CHECK(strangers == std::vector{wire::main_stream_magic});
}

TEST_CASE("A second source's channels do not end the first one's setup") {
  for (const bool known : {true, false}) {
    ScriptedAcceptor acceptor;
    std::vector<std::uint32_t> strangers;
    AcceptSourceOptions options = hours;
    options.on_stranger = [&](std::uint32_t first) { strangers.push_back(first); };
    acceptor.comes(hello(0, "g", 'a'), 2);
    acceptor.comes(hello(1, "g", 'a'), 3);
    acceptor.comes(known ? hello(2, "o", 'b') : std::string(channel_says), 5);  // one too many, unless it is another's
    acceptor.comes(std::string(main_says) + "g", 1);
    auto source = multifd::detail::collect_source(acceptor, 2, options);
    REQUIRE(source.has_value() == known);
    if (!known) {
      CHECK(source.error().code == Errc::too_many_channels);
      continue;
    }
    for (FdTransport& channel : source->channels) CHECK(read(channel, 65).ends_with('g'));
    CHECK(acceptor.closed(2));
    CHECK(strangers == std::vector{wire::magic});
  }
}

TEST_CASE("A channel more than expected is an error, which does not wait for the main connection") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<FdTransport> links;
    for (unsigned i = 0; i <= source_channels; ++i) links.push_back(destination.connect(channel_says));
    const Error error = error_of(accept_source(destination.listener(), source_channels));
    CHECK(error.code == Errc::too_many_channels);
    CHECK(error.detail == source_channels + 1);
    for (FdTransport& link : links) CHECK(is_closed(link));
  }
}

TEST_CASE("A connection that has sent nothing when all are there is waited for briefly: it may be a channel too many") {
  struct Row {
    std::string says;
    std::optional<std::uint32_t> stranger;  ///< none: it is a channel too many
  };
  const std::vector<Row> rows{{std::string(channel_says), {}},   // nobody can see whose
                              {hello(7), {}},                    // the source's own, with an id of its own
                              {hello(1), wire::magic},           // the id of one that is there
                              {hello(7, "", 'o'), wire::magic},  // another uuid
                              {std::string(main_says), wire::main_stream_magic},  // another source's, or the next try's
                              {std::string("GET / HTTP/1.1\r\n"), http}};         // none at all
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    for (const Row& row : rows) {
      CAPTURE(row.says);
      FdTransport late = destination.connect();
      auto links = a_try(destination, {0, 2, 1, 3}, "g");
      // The last one to be accepted: when that is told of, the source is whole, and `late` is all that is waited for.
      links.push_back(destination.connect("SSH-"));
      std::vector<std::uint32_t> strangers;
      auto source = accept_source(destination.listener(), source_channels, {.on_stranger = [&](std::uint32_t first) {
                                    strangers.push_back(first);
                                    if (first == 0x5353482d) say(late, row.says);
                                  }});
      if (row.stranger) {
        check_try(std::move(source), "g");
        CHECK(strangers == std::vector{0x5353482du, *row.stranger});
      } else {
        const Error error = error_of(source);
        CHECK(error.code == Errc::too_many_channels);
        CHECK(error.detail == source_channels + 1);
        for (FdTransport& link : links) CHECK(is_closed(link));
      }
      CHECK(is_closed(late));
    }
    // Nobody is there: nothing to wait for.
    std::vector<FdTransport> links;
    for (unsigned connection = 0; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    check_accepted(accept_source(destination.listener(), source_channels));
  }
}

TEST_CASE("An Interrupt ends that moment, too") {
  Destination destination(AddressKind::unix_socket);
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  // The last one is seen when the source is whole, and the silent one is still waited for.
  FdTransport silent = destination.connect();
  FdTransport main = destination.connect(main_says);
  FdTransport stranger = destination.connect("GET / HTTP/1.1\r\n");
  FdTransport channel = destination.connect(channel_says);
  FdTransport other = destination.connect("SSH-");
  const auto source =
      accept_source(destination.listener(), 1, {.interrupt = &*interrupt, .on_stranger = [&](std::uint32_t first) {
                                                  if (first == 0x5353482d) interrupt->trigger();
                                                }});
  CHECK(error_of(source).code == Errc::cancelled);
}

TEST_CASE("Only what had been a source's shortens the wait for it") {
  // Whoever comes and goes beside a source that is half there, in the time that a given-up source would have.
  for (const std::string_view text : {std::string_view(), std::string_view("\x11\x22"), std::string_view("SSH-")}) {
    CAPTURE(text);
    Destination destination(AddressKind::unix_socket);
    std::vector<FdTransport> links;
    links.push_back(destination.connect(greeting(0)));
    links.push_back(destination.connect(greeting(1)));
    links.push_back(destination.connect(text));
    REQUIRE(links.back().finish().has_value());
    auto accepted = destination.accept(source_channels, {.timeout = 20s, .retry_timeout = 50ms});
    CHECK(accepted.wait_for(300ms) == std::future_status::timeout);
    for (unsigned connection = 2; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    check_accepted(accepted.get());
  }
}

TEST_CASE("A negative time limit is refused by its name") {
  Destination destination(AddressKind::unix_socket);
  for (const auto& [name, options] : {std::pair("first_timeout", AcceptSourceOptions{.first_timeout = -1ms}),
                                      std::pair("AcceptSourceOptions::timeout", AcceptSourceOptions{.timeout = -1ms}),
                                      std::pair("retry_timeout", AcceptSourceOptions{.retry_timeout = -1ms})}) {
    const Error error = error_of(accept_source(destination.listener(), 1, options));
    CHECK(error.code == Errc::bad_option);
    CHECK_MESSAGE(describe(error).contains(name), describe(error));
  }
}

TEST_CASE("An Interrupt ends the wait, whatever has come by then, and keeps it from beginning") {
  for (const unsigned come : {0u, 2u}) {
    Destination destination(AddressKind::tcp);
    auto interrupt = Interrupt::create();
    REQUIRE(interrupt.has_value());
    std::vector<FdTransport> links;
    for (unsigned connection = 0; connection < come; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    auto accepted = destination.accept(source_channels, {.interrupt = &*interrupt});
    CHECK(accepted.wait_for(30ms) == std::future_status::timeout);
    const test::Stopwatch time;
    interrupt->trigger();
    CHECK(error_of(accepted.get()).code == Errc::cancelled);
    CHECK(time.elapsed() < test::no_hang);
    for (FdTransport& link : links) CHECK(is_closed(link));

    for (unsigned connection = 0; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    CHECK(error_of(accept_source(destination.listener(), source_channels, {.interrupt = &*interrupt})).code ==
          Errc::cancelled);
  }
}

TEST_CASE("The listener's own Interrupt ends the wait, too") {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  auto listener =
      Listener::listen({.kind = AddressKind::tcp, .host = "127.0.0.1"}, 4, SocketOptions{.interrupt = &*interrupt});
  REQUIRE(listener.has_value());
  auto accepted = std::async(std::launch::async, [&] {
    return accept_source(*listener, 1, {.first_timeout = 5s});  // the answer must not come from here
  });
  CHECK(accepted.wait_for(30ms) == std::future_status::timeout);
  interrupt->trigger();
  CHECK(error_of(accepted.get()).code == Errc::cancelled);
}

TEST_CASE("Channel counts above 255 are refused before anything happens") {
  Destination destination(AddressKind::unix_socket);
  FdTransport waiting = destination.connect(main_says);
  for (const unsigned channels : {256u, ~0u}) {
    const Error error = error_of(accept_source(destination.listener(), channels));
    CHECK(error.code == Errc::bad_channel_count);
    CHECK(error.detail == channels);
  }
  CHECK_FALSE(is_closed(waiting, 20ms));
}

TEST_CASE("A source without channels is its main connection; a channel, ahead of it or behind, is one too many") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    FdTransport main = destination.connect(greeting(0));
    auto source = accept_source(destination.listener(), 0);
    REQUIRE_MESSAGE(source.has_value(), describe(source.error()));
    CHECK(read(source->main, 5) == greeting(0));
    CHECK(source->channels.empty());
    for (const bool ahead : {true, false}) {
      CAPTURE(ahead);
      FdTransport first = destination.connect(ahead ? channel_says : main_says);
      FdTransport second = destination.connect(ahead ? main_says : channel_says);
      CHECK(error_of(accept_source(destination.listener(), 0)).code == Errc::too_many_channels);
    }
  }
}

TEST_CASE("255 channels and their main connection are accepted") {
  Destination destination(AddressKind::unix_socket);
  auto accepted = destination.accept(255);
  std::vector<FdTransport> links;
  for (unsigned i = 0; i < 255; ++i) links.push_back(destination.connect(channel_says));
  links.push_back(destination.connect(main_says));
  const auto source = accepted.get();
  REQUIRE_MESSAGE(source.has_value(), describe(source.error()));
  CHECK(source->channels.size() == 255);
}

namespace {

/// As a receiver looks for a channel too many at the end of a migration: there is none.
void look_for_more(Listener& listener) {
  const auto more = listener.any_waiting([](std::span<const std::byte>) { return false; });
  REQUIRE_MESSAGE(more.has_value(), describe(more.error()));
  CHECK_FALSE(*more);
}

}  // namespace

TEST_CASE("The next source's connections, which were looked at for a channel too many, are accepted in their order") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    // By accept_source(): all looked at, some, or once more after the others have come.
    for (const unsigned looked_at : {4u, 2u, 1u}) {
      std::vector<FdTransport> links;
      for (unsigned connection = 0; connection <= source_channels; ++connection) {
        links.push_back(destination.connect(greeting(connection)));
        if (connection + 1 == looked_at) look_for_more(destination.listener());
      }
      if (looked_at == 1) look_for_more(destination.listener());
      pollfd listener{.fd = destination.listener().poll_handle(), .events = POLLIN, .revents = 0};
      CHECK(::poll(&listener, 1, 0) == 1);
      check_accepted(accept_source(destination.listener(), source_channels, {.first_timeout = 20s}));
      CHECK(::poll(&listener, 1, 0) == 0);
    }
    // By accept(), accept_channels(), and an acceptor that was there before: whoever accepts next gets the next one.
    auto acceptor = PlainAcceptor::open(destination.listener());
    REQUIRE(acceptor.has_value());
    std::vector<FdTransport> links;
    for (unsigned connection = 0; connection < 4; ++connection) {
      links.push_back(destination.connect(greeting(connection)));
      if (connection == 2) look_for_more(destination.listener());
    }
    auto first = destination.listener().accept(20s);
    REQUIRE_MESSAGE(first.has_value(), describe(first.error()));
    CHECK(read(*first, 5) == greeting(0));
    auto second = destination.listener().accept_channels(1, 20s);
    REQUIRE_MESSAGE(second.has_value(), describe(second.error()));
    CHECK(read(second->front(), 5) == greeting(1));
    std::vector<std::string> said(2);
    for (int i = 0; i < 2; ++i) {
      auto other = acceptor->next(multifd::deadline_after(20s));
      REQUIRE_MESSAGE((other && *other), describe(other.error()));
      REQUIRE((*other)->number < 2);
      said[(*other)->number] = read((*other)->link, 5);
    }
    CHECK(said == std::vector{greeting(2), greeting(3)});
  }
}

TEST_CASE("Whoever waits for a connection gets it, also when another thread has taken it to look at") {
  for (const AddressKind kind : kinds)
    for (const bool with_acceptor : {true, false}) {
      CAPTURE(with_acceptor);
      Destination destination(kind);
      std::atomic<bool> over = false;
      std::thread looking([&] {
        while (!over) (void)destination.listener().any_waiting([](std::span<const std::byte>) { return false; });
      });
      std::optional<PlainAcceptor> acceptor;
      if (with_acceptor) acceptor.emplace(*PlainAcceptor::open(destination.listener()));
      std::string outcome;
      for (unsigned i = 0; i < 200 && outcome.empty(); ++i) {
        FdTransport link = destination.connect();
        if (with_acceptor) {
          auto saying = std::async(std::launch::async, [&] { say(link, greeting(1)); });
          auto next = acceptor->next(multifd::deadline_after(20s));
          if (!next || !*next) outcome = next ? "none" : describe(next.error());
          saying.get();
        } else if (auto accepted = destination.listener().accept(20s); !accepted) {
          outcome = describe(accepted.error());
        }
      }
      over = true;
      looking.join();
      CHECK(outcome == "");
    }
}

TEST_CASE("What looks at waiting connections may itself accept, and look again") {
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<FdTransport> links, accepted;
    for (unsigned connection = 0; connection <= source_channels; ++connection)
      links.push_back(destination.connect(greeting(connection)));
    auto looking = std::async(std::launch::async, [&] {
      return destination.listener().any_waiting([&](std::span<const std::byte>) {
        look_for_more(destination.listener());
        if (auto link = destination.listener().accept(0ms)) accepted.push_back(std::move(*link));
        return false;
      });
    });
    if (looking.wait_for(20s) != std::future_status::ready) {
      MESSAGE("any_waiting() hangs");
      std::abort();  // the thread never ends
    }
    const auto more = looking.get();
    REQUIRE(more.has_value());
    CHECK_FALSE(*more);
    REQUIRE(accepted.size() == links.size());
    for (unsigned connection = 0; connection <= source_channels; ++connection)
      CHECK(read(accepted[connection], 5) == greeting(connection));
  }
}

TEST_CASE("Of the connections that are looked at, strangers and those that have ended are closed, and no other") {
  Destination destination(AddressKind::unix_socket);
  FdTransport stranger = destination.connect("GET / HTTP/1.1\r\n");
  FdTransport silent = destination.connect();
  FdTransport ended = destination.connect();
  REQUIRE(ended.finish().has_value());
  FdTransport last_words = destination.connect(greeting(1));
  REQUIRE(last_words.finish().has_value());
  const auto more =
      destination.listener().any_waiting([](std::span<const std::byte>) { return false; },
                                         [](std::span<const std::byte> first) { return first[0] == std::byte{'G'}; });
  REQUIRE(more.has_value());
  CHECK(is_closed(stranger));
  CHECK(is_closed(ended));
  CHECK_FALSE(is_closed(silent, 0ms));
  auto first = destination.listener().accept(0ms);
  auto second = destination.listener().accept(0ms);
  REQUIRE((first && second));
  CHECK(read(*second, 5) == greeting(1));
  CHECK(destination.listener().accept(0ms).error().code == Errc::timed_out);
}

TEST_CASE("Running out of descriptors is an error at once, and the last descriptor is not wasted") {
  rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &old) == 0);
  // Calls accept_source() where it finds so many free descriptors.
  const auto accept_with = [&](unsigned free, Destination& destination) {
    // Each gets the lowest number that is free, behind which others may be in use.
    std::vector<int> taken;
    for (unsigned i = 0; i <= free; ++i) REQUIRE(taken.emplace_back(::dup(0)) > 0);
    rlimit few = old;
    few.rlim_cur = static_cast<rlim_t>(taken.back());
    for (const int fd : taken) ::close(fd);
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
    auto source = accept_source(destination.listener(), 1, {.first_timeout = 300ms, .timeout = 300ms});
    ::setrlimit(RLIMIT_NOFILE, &old);
    return error_of(source);
  };
  // It needs one for itself and one for each connection.
  for (const unsigned free : {0u, 1u, 2u}) {
    CAPTURE(free);
    Destination destination(AddressKind::unix_socket);
    FdTransport main = destination.connect(main_says);
    FdTransport channel = destination.connect(channel_says);
    const Error error = accept_with(free, destination);
    CHECK_MESSAGE(error.code == std::errc::too_many_files_open, describe(error));
  }
  Destination destination(AddressKind::unix_socket);
  FdTransport main = destination.connect(main_says);
  const Error error = accept_with(2, destination);
  CHECK(error.code == Errc::timed_out);
  CHECK_MESSAGE(std::string_view(error.op).contains("no channel"), error.op);  // the main connection was understood
}

TEST_CASE("An acceptor closes what says nothing for its time limit, and tells why") {
  Destination destination(AddressKind::tcp);
  std::vector<Error> refused;
  auto acceptor = PlainAcceptor::open(
      destination.listener(),
      {.first_bytes_timeout = 50ms, .on_refused = [&](const Error& error) { refused.push_back(error); }});
  REQUIRE(acceptor.has_value());
  FdTransport silent = destination.connect();
  FdTransport slow = destination.connect("\x11\x22");
  const auto next = acceptor->next(multifd::deadline_after(1s));
  CHECK(error_of(next).code == Errc::timed_out);
  REQUIRE(refused.size() == 2);
  for (const Error& error : refused) CHECK(error.code == Errc::timed_out);
  CHECK_FALSE(acceptor->pending());
  CHECK(is_closed(silent));
  CHECK(is_closed(slow));
  CHECK(error_of(PlainAcceptor::open(destination.listener(), {.first_bytes_timeout = -1ms})).code == Errc::bad_option);
}

TEST_CASE("An acceptor's wait ends by its deadline however many strangers wait to be let in") {
  Destination destination(AddressKind::unix_socket);
  auto acceptor = PlainAcceptor::open(destination.listener());
  REQUIRE(acceptor.has_value());
  std::vector<FdTransport> strangers;
  for (int i = 0; i < 20; ++i) strangers.push_back(destination.connect());
  // The deadline has passed: one step, and not one for each stranger, of whom there could be more and more.
  CHECK(error_of(acceptor->next(multifd::detail::Clock::now())).code == Errc::timed_out);
  pollfd listener{.fd = destination.listener().poll_handle(), .events = POLLIN, .revents = 0};
  CHECK(::poll(&listener, 1, 0) == 1);
  CHECK(error_of(acceptor->next(multifd::deadline_after(50ms))).code == Errc::timed_out);
  CHECK(::poll(&listener, 1, 0) == 0);
}

#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
namespace {

using test::credentials;
using test::SomeTls;
using SomeAcceptor = multifd::TlsAcceptorOf<SomeTls::Credentials>;

/// Connects with certificates of the authority `name` and says a whole source's greetings; what its handshakes came to.
Result<std::vector<SomeTls::Transport>> tls_source(Destination& destination, const std::string& name) {
  const SomeTls::Credentials client = credentials(name, TlsRole::client);
  std::vector<FdTransport> links;
  for (unsigned connection = 0; connection <= source_channels; ++connection) links.push_back(destination.connect());
  auto secured = tls_handshakes(std::move(links), client, {.hostname = "localhost", .handshake_timeout = 20s});
  // Under TLS 1.3 a client learns only behind its handshake that it is not trusted: its writes may fail, or not.
  for (unsigned connection = 0; secured && connection <= source_channels; ++connection) {
    const std::string text = greeting(connection);
    (void)write_all((*secured)[connection], std::as_bytes(std::span(text)));
  }
  return secured;
}

}  // namespace

TEST_CASE("Under TLS whoever speaks none, is not trusted or says nothing is closed, and disturbs no source") {
  const SomeTls::Credentials server = credentials("good", TlsRole::server);
  for (const AddressKind kind : kinds) {
    Destination destination(kind);
    std::vector<Error> refused;
    auto acceptor = SomeAcceptor::open(
        destination.listener(),
        {.credentials = &server, .on_refused = [&](const Error& error) { refused.push_back(error); }});
    REQUIRE(acceptor.has_value());
    FdTransport browser = destination.connect("GET / HTTP/1.1\r\n\r\n");
    FdTransport plain_channel = destination.connect(greeting(1));
    FdTransport silent = destination.connect();
    FdTransport half_record = destination.connect("\x16\x03\x01");
    FdTransport scan = destination.connect();
    REQUIRE(scan.finish().has_value());
    auto untrusted = std::async(std::launch::async, [&] { return tls_source(destination, "other"); });
    auto trusted = std::async(std::launch::async, [&] {
      (void)untrusted.wait_for(0s);  // beside it: in any order
      return tls_source(destination, "good");
    });
    auto source = accept_source(*acceptor, source_channels, {.first_timeout = 60s, .timeout = 60s});
    const auto theirs = trusted.get();
    REQUIRE_MESSAGE(theirs.has_value(), describe(theirs.error()));
    check_accepted(std::move(source));
    // The untrusted source may still be at its handshakes; until its last one is refused, nothing else comes.
    while (refused.size() < 3 + 1 + source_channels)
      REQUIRE(error_of(acceptor->next(multifd::deadline_after(100ms))).code == Errc::timed_out);
    (void)untrusted.get();
    const auto count = [&](Errc code) {
      return std::ranges::count_if(refused, [&](const Error& error) { return error.code == code; });
    };
    CHECK(count(Errc::tls_not_spoken) == 2);
    CHECK(acceptor->pending());  // the silent ones
    CHECK(is_closed(browser));
    CHECK(is_closed(plain_channel));
    CHECK_FALSE(is_closed(silent, 0ms));
    acceptor = std::unexpected(Error{});
    CHECK(is_closed(silent));
    CHECK(is_closed(half_record));
  }
}

TEST_CASE("Under TLS a silent connection has the handshake's time, and an Interrupt ends the wait") {
  const SomeTls::Credentials server = credentials("good", TlsRole::server);
  Destination destination(AddressKind::tcp);
  std::vector<Error> refused;
  auto acceptor =
      SomeAcceptor::open(destination.listener(), {.credentials = &server,
                                                  .tls = {.handshake_timeout = 50ms},
                                                  .on_refused = [&](const Error& error) { refused.push_back(error); }});
  REQUIRE(acceptor.has_value());
  FdTransport silent = destination.connect();
  CHECK(error_of(accept_source(*acceptor, 1, {.first_timeout = 1s})).code == Errc::timed_out);
  REQUIRE(refused.size() == 1);
  CHECK(refused[0].code == Errc::timed_out);
  CHECK(is_closed(silent));
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  interrupt->trigger();
  CHECK(error_of(accept_source(*acceptor, 1, {.interrupt = &*interrupt})).code == Errc::cancelled);
  CHECK(error_of(SomeAcceptor::open(destination.listener())).code == Errc::bad_option);
  const SomeTls::Credentials client = credentials("good", TlsRole::client);
  CHECK(error_of(SomeAcceptor::open(destination.listener(), {.credentials = &client})).code == Errc::bad_option);
}
#endif
