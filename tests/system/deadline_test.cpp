// SPDX-License-Identifier: MIT
//
// progress_timeout: whoever waits for channels on which nothing moves gets an error in bounded time, and whoever waits
// for channels that are slow does not. The other time limits: hello and barrier in hostile_test.cpp, connecting and
// accepting in unit/transport.
#include <doctest/doctest.h>

#include <sys/socket.h>

#include <array>
#include <atomic>
#include <functional>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include "support/tls_links.hpp"
#endif

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;
constexpr auto limit = 300ms;

template <class R>
void check_stalled(const R& result, Stage stage) {
  REQUIRE_FALSE(result.has_value());
  CHECK_MESSAGE(result.error().code == Errc::timed_out, text(result));
  CHECK(result.error().code == Condition::timed_out);
  CHECK(result.error().stage == stage);
  CHECK(text(result).contains("progress_timeout"));
}

/// A sender whose channels take a little and then nothing more.
template <class Call>
void check_sender(Call&& call) {
  const Watchdog watchdog("a sender that nobody reads");
  GuestRam source(4096);
  auto links = memory_links(2, 1000);
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.depth = 2, .progress_timeout = limit});
  REQUIRE(tx.has_value());
  const Stopwatch watch;
  check_stalled(call(*tx, source), Stage::write);
  CHECK(watch.elapsed() >= limit);
  CHECK(watch.elapsed() < no_hang);
  check_stalled(tx->close_channels(), Stage::write);  // the first error stays
}

}  // namespace

TEST_CASE("A sender whose peer reads nothing: room for pages, an epoch, and the end have a time limit") {
  check_sender([](auto& tx, GuestRam& source) { return tx.queue_range(source.block, 0, source.memory.size()); });
  check_sender([](auto& tx, GuestRam& source) {
    REQUIRE(tx.queue_range(source.block, 0, 64 * page).has_value());
    REQUIRE(tx.close_epoch().has_value());
    return tx.wait(0);
  });
  check_sender([](auto& tx, GuestRam& source) {
    REQUIRE(tx.queue_range(source.block, 0, 64 * page).has_value());
    return tx.close_channels();
  });
}

TEST_CASE("A sender is not in a hurry: neither a slow peer nor its own bandwidth cap is standing still") {
  const Watchdog watchdog("a slow migration");
  GuestRam source(4096);
  using Tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>;
  auto tape = captures(2);
  // A packet takes two seconds.
  auto tx = Tx::open(source.map, std::move(tape.links), {.bandwidth = 256 * 1024, .progress_timeout = 1s});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, 2 * 128 * page).has_value());
  const auto epoch = tx->close_epoch_and_wait();
  CHECK_MESSAGE(epoch.has_value(), text(epoch));
  const auto closed = tx->close_channels();
  CHECK_MESSAGE(closed.has_value(), text(closed));
}

TEST_CASE("A receiver whose peers are silent ends, and says which channel it would have heard from") {
  const Watchdog watchdog("a silent source");
  GuestRam target(4096);
  const auto outcome = feed<NoComp>(
      target.map,
      {RawStream().hello(0).packet({.zero = {0}}).bytes(), RawStream().hello(1).packet({.zero = {page}}).bytes()},
      Then::silence, {.progress_timeout = limit});
  check_stalled(outcome.result, Stage::read);
  CHECK(outcome.result.error().channel == 0);
  CHECK(outcome.elapsed >= limit);
  CHECK(outcome.elapsed < no_hang);
}

TEST_CASE("A receiver that gets a packet now and then goes on") {
  const Watchdog watchdog("a slow source");
  constexpr auto long_limit = 2000ms;
  GuestRam target(4096);
  auto links = memory_links(1);
  std::jthread peer([&] {
    const auto send = [&](const RawStream& part) {
      CHECK(write_all(links.sender[0], std::span<const std::byte>(part.bytes())).has_value());
    };
    send(RawStream().hello(0));
    // Longer than the limit in all, and each pause so short that a busy machine does not make it one that is over it.
    for (std::uint64_t i = 0; i < 12; ++i) {
      std::this_thread::sleep_for(long_limit / 10);
      send(RawStream().packet({.zero = {i * page}}));
    }
    send(RawStream().sync());
    CHECK(links.sender[0].finish().has_value());
  });
  auto rx =
      Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver), {.progress_timeout = long_limit});
  REQUIRE(rx.has_value());
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.has_value(), text(finished));
}

namespace {

// For bytes that trickle: pauses so short that a busy machine does not make one that is over the limit, and so many that
// the limit passes inside of one packet.
constexpr auto slow_limit = 2000ms;
constexpr auto short_pause = slow_limit / 10;
constexpr int pauses = 14;
constexpr std::size_t trickle = 16 * 1024;

enum class What { pages, device_state };

/// A sender whose peer takes what is one packet a little at a time. Returns its outcome.
template <class T>
std::string send_slowly(Links<T> links, What what) {
  GuestRam source(128);
  using Tx = Sender<T, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.progress_timeout = slow_limit});
  if (!tx) return text(tx);
  std::jthread peer([&] {
    Bytes room(trickle / 2);  // less than a UNIX socket's unit, which is then longer than the socket's own time limit
    const auto read = [&] {
      const iovec buffer = mutable_buffer(std::span(room));
      const auto got = links.receiver[0].read_some(std::span(&buffer, 1));
      return got && *got > 0;
    };
    for (int i = 0; i < pauses; ++i, std::this_thread::sleep_for(short_pause))
      if (!read()) return;
    while (read()) {
    }
  });
  Result<void> queued;
  if (what == What::device_state)
    queued = tx->queue_device_state({"vfio", 0, Bytes(1 << 20, std::byte{5})});
  else if (auto pages = tx->queue_range(source.block, 0, source.memory.size()); !pages)
    queued = std::unexpected(pages.error());
  if (queued) queued = tx->close_channels();
  return text(queued);
}

/// A receiver whose peer sends what is one packet a little at a time. Returns its outcome.
template <class T>
std::string receive_slowly(Links<T> links, What what) {
  GuestRam target(128);
  Packet pages{.payload = Bytes(128 * page, std::byte{7})};
  for (std::uint64_t i = 0; i < 128; ++i) pages.normal.push_back(i * page);
  RawStream stream;
  stream.hello(0);
  what == What::pages ? stream.packet(pages) : stream.device_state(1 << 20, 1 << 20);
  stream.sync();
  std::jthread peer([&] {
    std::span<const std::byte> rest = stream.bytes();
    for (std::size_t part = 2000; !rest.empty(); part = trickle) {  // first the hello and the header
      const bool slow = rest.size() + pauses * trickle > stream.size();
      const auto now = slow ? rest.first(std::min(part, rest.size())) : rest;
      if (!write_all(links.sender[0], now)) return;
      rest = rest.subspan(now.size());
      std::this_thread::sleep_for(short_pause);
    }
    (void)links.sender[0].finish();
  });
  auto rx = Receiver<T, NoComp>::open(
      target.map, std::move(links.receiver),
      {.progress_timeout = slow_limit, .on_device_state = {.take = [](const DeviceState&) { return Result<void>{}; }}});
  return rx ? text(rx->finish()) : text(rx);
}

/// Sockets that hold little, as a slow link does.
Links<FdTransport> narrow(Links<FdTransport> links) {
  const int bytes = trickle;
  for (const FdTransport& link : links.sender)
    REQUIRE(::setsockopt(link.native_handle(), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0);
  return links;
}

}  // namespace

TEST_CASE("Bytes that trickle are no lack of progress: inside of a packet or of device state, on either side") {
  const Watchdog watchdog("bytes that trickle");
  // All at once, because each takes longer than the limit.
  std::vector<std::pair<std::string, std::future<std::string>>> all;
  const auto both_ways = [&](const char* name, auto make) {
    for (const What what : {What::pages, What::device_state}) {
      const std::string label = std::string(name) + (what == What::pages ? ", pages" : ", device state");
      all.emplace_back("to a slow peer: " + label, std::async(std::launch::async, [links = make(), what]() mutable {
                         return send_slowly(std::move(links), what);
                       }));
      all.emplace_back("from a slow peer: " + label, std::async(std::launch::async, [links = make(), what]() mutable {
                         return receive_slowly(std::move(links), what);
                       }));
    }
  };
  both_ways("memory", [] { return memory_links(1, 1000); });
  both_ways("UNIX socket", [] { return narrow(unix_links(1)); });
#if defined(MULTIFD_HAS_TLS)
  both_ways("TLS by GnuTLS", [] { return tls_links<Gnutls>(narrow(unix_links(1))); });
#endif
#if defined(MULTIFD_HAS_OPENSSL)
  both_ways("TLS by OpenSSL", [] { return tls_links<Openssl>(narrow(unix_links(1))); });
#endif
  for (const What what : {What::pages, What::device_state})
    all.emplace_back("from a slow peer: TCP", std::async(std::launch::async, [links = tcp_links(1), what]() mutable {
                       return receive_slowly(std::move(links), what);
                     }));
  for (auto& [name, outcome] : all) {
    CAPTURE(name);
    CHECK(outcome.get() == "ok");
  }
}

TEST_CASE("No limit, as people write it, is one") {
  const Watchdog watchdog("no limit");
  GuestRam source(4096), target(4096);
  auto links = memory_links(2);
  constexpr auto never = std::chrono::milliseconds::max();
  std::jthread receiving([&] {
    auto rx = Receiver<MemoryTransport, NoComp>::open(
        target.map, std::move(links.receiver),
        {.hello_timeout = never, .barrier_timeout = never, .progress_timeout = never});
    REQUIRE(rx.has_value());
    const auto finished = rx->finish();
    CHECK_MESSAGE(finished.has_value(), text(finished));
  });
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.progress_timeout = never});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  CHECK(tx->close_epoch_and_wait().has_value());
  CHECK(tx->close_channels().has_value());
}

namespace {

/// Opens something with one time limit set, by name; the rest is as it is by default.
struct Setting {
  const char* name;
  std::function<Result<void>(std::chrono::milliseconds)> open;
};

template <class T>
Result<void> outcome_of(const Result<T>& opened) {
  return opened ? Result<void>() : std::unexpected(opened.error());
}

/// Every std::chrono field of every options struct.
std::vector<Setting> settings() {
  using Tx = Sender<FdTransport, NoComp, ZeroPagesNone>;
  using Rx = Receiver<FdTransport, NoComp>;
  const auto sender = [](auto field) {
    return [field](std::chrono::milliseconds time) {
      GuestRam source(4);
      SenderOptions<NoComp, ZeroPagesNone> options;
      options.*field = time;
      return outcome_of(Tx::open(source.map, unix_links(1).sender, options));
    };
  };
  const auto receiver = [](auto field) {
    return [field](std::chrono::milliseconds time) {
      GuestRam target(4);
      auto links = unix_links(1);
      const auto hello = RawStream().hello(0).bytes();
      REQUIRE(write_all(links.sender[0], std::span<const std::byte>(hello)).has_value());
      ReceiverOptions<NoComp> options;
      options.*field = time;
      return outcome_of(Rx::open(target.map, std::move(links.receiver), options));
    };
  };
  const auto socket = [](auto field) {
    return [field](std::chrono::milliseconds time) {
      auto listener = Listener::listen({.host = "127.0.0.1"}, 1);
      REQUIRE(listener.has_value());
      SocketOptions options;
      using Field = std::remove_reference_t<decltype(options.*field)>;
      options.*field = time.count() < 0 ? Field(-1) : std::chrono::duration_cast<Field>(time);
      auto there = Listener::listen({.host = "127.0.0.1"}, 1, options);
      auto link = connect_to(listener->local_address(), options);
      CHECK(there.has_value() == link.has_value());
      return outcome_of(link);
    };
  };
  const auto accepting = [](std::chrono::milliseconds time) {
    auto listener = Listener::listen({.host = "127.0.0.1"}, 1);
    REQUIRE(listener.has_value());
    auto link = connect_to(listener->local_address());
    REQUIRE(link.has_value());
    return outcome_of(listener->accept_channels(1, time));
  };
  const auto accepting_source = [](auto field) {
    return [field](std::chrono::milliseconds time) {
      auto listener = Listener::listen({.host = "127.0.0.1"}, 2);
      REQUIRE(listener.has_value());
      std::vector<FdTransport> links;
      for (const std::uint32_t magic : {wire::main_stream_magic, wire::magic}) {
        links.push_back(std::move(*connect_to(listener->local_address())));
        std::array<std::byte, 4> first;
        wire::store_be(first.data(), magic);
        REQUIRE(write_all(links.back(), std::span<const std::byte>(first)).has_value());
      }
      AcceptSourceOptions options;
      options.*field = time;
      return outcome_of(accept_source(*listener, 1, options));
    };
  };
  using S = SenderOptions<NoComp, ZeroPagesNone>;
  using R = ReceiverOptions<NoComp>;
  std::vector<Setting> all{
      {"SenderOptions::progress_timeout", sender(&S::progress_timeout)},
      {"SenderOptions::confirm_timeout", sender(&S::confirm_timeout)},
      {"ReceiverOptions::hello_timeout", receiver(&R::hello_timeout)},
      {"ReceiverOptions::barrier_timeout", receiver(&R::barrier_timeout)},
      {"ReceiverOptions::progress_timeout", receiver(&R::progress_timeout)},
      {"SocketOptions::connect_timeout", socket(&SocketOptions::connect_timeout)},
      {"SocketOptions::keepalive_idle", socket(&SocketOptions::keepalive_idle)},
      {"SocketOptions::keepalive_interval", socket(&SocketOptions::keepalive_interval)},
      {"SocketOptions::user_timeout", socket(&SocketOptions::user_timeout)},
      {"accept_channels: timeout", accepting},
      {"AcceptSourceOptions::first_timeout", accepting_source(&AcceptSourceOptions::first_timeout)},
      {"AcceptSourceOptions::timeout", accepting_source(&AcceptSourceOptions::timeout)},
  };
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
  all.push_back({"TlsOptions::handshake_timeout", [](std::chrono::milliseconds time) {
                   auto [client, server] =
                       handshake_both(unix_links(1), credentials("good", TlsRole::client),
                                      credentials("good", TlsRole::server), {.handshake_timeout = time});
                   CHECK(client.has_value() == server.has_value());
                   return outcome_of(client);
                 }});
#endif
  return all;
}

}  // namespace

TEST_CASE("finish(limit) returns at its limit whatever a hook does, and again when the hook has returned") {
  enum class Hook { packet, device_state, error };
  for (const Hook hook : {Hook::packet, Hook::device_state, Hook::error})
    for (const bool fails : {false, true}) {
      if (hook == Hook::error && !fails) continue;
      CAPTURE(static_cast<int>(hook));
      CAPTURE(fails);
      const Watchdog watchdog("finish(limit) beside a hook that blocks");
      RamMap ram;
      REQUIRE(ram.add_elsewhere("pc.ram", 8 * page).has_value());
      std::atomic<bool> inside = false, go_on = false, over = false;
      const auto block = [&] {
        inside = true;
        inside.notify_all();
        go_on.wait(false);
        over = true;
      };
      auto links = memory_links(2);
      const auto send = [&](unsigned channel, const RawStream& stream) {
        REQUIRE(write_all(links.sender[channel], std::span<const std::byte>(stream.bytes())).has_value());
      };
      RawStream stream;
      stream.hello(0);
      if (hook == Hook::packet) stream.packet({.normal = {0}, .payload = Bytes(page)});
      if (hook == Hook::device_state) stream.device_state(100, 100);
      send(0, stream.sync());
      send(1, fails ? RawStream().hello(1) : RawStream().hello(1).sync());
      auto rx = Receiver<MemoryTransport, NoComp, IntoHook>::open(
          ram, std::move(links.receiver),
          {.into = {[&](ReceivedPacket&) -> Result<void> { return block(), Result<void>{}; }},
           .on_device_state = {.take = [&](const DeviceState&) -> Result<void> { return block(), Result<void>{}; }},
           .on_error = [&](const Error&) {
             if (hook == Hook::error) block();
           }});
      REQUIRE_MESSAGE(rx.has_value(), text(rx));
      if (hook != Hook::error) inside.wait(false);
      std::thread later;
      if (fails)
        later = std::thread([&] {
          std::this_thread::sleep_for(20ms);  // nothing tells that finish() waits; a failure before must do as well
          send(1, RawStream().raw("GET / HTTP/1.1\r\n\r\n"));
        });
      else
        for (auto& link : links.sender) REQUIRE(link.finish().has_value());
      const auto code = make_error_code(fails ? Errc::bad_magic : Errc::timed_out);
      auto finished = rx->finish(200ms);
      CHECK_MESSAGE(code_of(finished) == code, text(finished));
      if (later.joinable()) later.join();
      inside.wait(false);
      finished = rx->finish(0ms);
      CHECK_MESSAGE(code_of(finished) == code, text(finished));
      go_on = true;
      go_on.notify_all();
      finished = rx->finish(no_hang);
      CHECK_MESSAGE(code_of(finished) == (fails ? code : std::error_code()), text(finished));
      CHECK(over);  // what the hook uses may go now
    }
}

TEST_CASE("Every time limit: 0 is none, a negative one is refused by its name") {
  const Watchdog watchdog("time limits of 0");
  for (const Setting& setting : settings()) {
    CAPTURE(setting.name);
    for (const auto time : {0ms, 60'000ms}) {
      const auto opened = setting.open(time);
      CHECK_MESSAGE(opened.has_value(), text(opened));
    }
    for (const auto time : {-1ms, std::chrono::milliseconds(-5'000)}) {
      const auto opened = setting.open(time);
      REQUIRE_MESSAGE(code_of(opened) == Errc::bad_option, text(opened));
      CHECK_MESSAGE(text(opened).contains(setting.name), text(opened));
    }
  }
}

TEST_CASE("A progress_timeout of 0 lets both ends stand still for as long as it takes") {
  const Watchdog watchdog("no limit");
  GuestRam source(1024), target(1024);
  auto links = memory_links(1, 1000);
  std::thread destination([&] {
    auto rx = Receiver<MemoryTransport, NoComp>::open(
        target.map, std::move(links.receiver),
        {.hello_timeout = 0ms, .barrier_timeout = 0ms, .progress_timeout = 0ms, .thread_hook = [](const ThreadInfo&) {
           std::this_thread::sleep_for(50ms);
         }});
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    CHECK(rx->finish().has_value());
  });
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  auto tx = Tx::open(source.map, std::move(links.sender), {.progress_timeout = 0ms, .confirm_timeout = 0ms});
  REQUIRE(tx.has_value());
  CHECK(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  const auto ended = tx->finish();
  CHECK_MESSAGE(ended.has_value(), text(ended));
  destination.join();
}

TEST_CASE("Waiting for this side's own bandwidth cap is no lack of progress") {
  const Watchdog watchdog("a cap below a packet per progress_timeout");
  GuestRam source(256), target(256);
  auto links = memory_links(1);
  std::thread destination([&] {
    auto rx = Receiver<MemoryTransport, NoComp>::open(target.map, std::move(links.receiver));
    REQUIRE_MESSAGE(rx.has_value(), text(rx));
    CHECK(rx->finish().has_value());
  });
  using Tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>;
  // A packet of 512 KiB takes two seconds, twice the limit, which a busy machine may let pass by itself if it is short.
  auto tx = Tx::open(source.map, std::move(links.sender), {.bandwidth = 262'144, .progress_timeout = 1s});
  REQUIRE(tx.has_value());
  CHECK(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  const auto ended = tx->finish();
  CHECK_MESSAGE(ended.has_value(), text(ended));
  destination.join();
}

TEST_CASE(
    "Device state larger than the cap lets pass in progress_timeout is no lack of progress, and delays no page for "
    "long") {
  const Watchdog watchdog("device state under a cap");
  GuestRam source(4096);
  using Tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>;
  auto tape = captures(1);
  auto tx = Tx::open(source.map, std::move(tape.links), {.bandwidth = 2 << 20, .progress_timeout = 1s});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_device_state({"vfio", 0, Bytes(5 << 20, std::byte{5})}).has_value());
  REQUIRE(tx->queue_range(source.block, 0, page).has_value());
  const auto closed = tx->close_channels();
  CHECK_MESSAGE(closed.has_value(), text(closed));
}
