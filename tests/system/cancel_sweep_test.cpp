// SPDX-License-Identifier: MIT
//
// cancel() at random moments in every state that a migration has, with every compressor and over every kind of wire:
// it returns at once, and soon after everybody has come back and every thread has ended. Prints the longest of both.
//
// MULTIFD_CANCELS says how many; 100 by default.
#include <doctest/doctest.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/leftovers.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 512;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool sanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = under_tsan;
#endif
#else
constexpr bool sanitized = under_tsan;
#endif

unsigned wanted_cancels() { return how_often("MULTIFD_CANCELS", 100); }

struct Longest {
  std::chrono::microseconds cancel{0};  ///< cancel() itself
  std::chrono::microseconds joined{0};  ///< from its start until all threads had ended

  void add(const Longest& other) {
    cancel = std::max(cancel, other.cancel);
    joined = std::max(joined, other.joined);
  }
};

using Clock = std::chrono::steady_clock;
std::chrono::microseconds since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start);
}

/// Two guests, of which the destination's is never looked at.
struct Guests {
  Guests() {
    Rng rng(seed());
    for (std::size_t p = 0; p < pages; ++p) fill_page(memory.page(p, page), any_fill(rng), rng);
    block = *source.add("pc.ram", memory.bytes());
    REQUIRE(target.add("pc.ram", other.bytes()).has_value());
  }
  Block memory{pages * page};
  Block other{pages * page};
  RamMap source, target;
  BlockId block{};
};

/// Runs `call` in another thread, cancels after `delay`, and measures. `end` is called when `call` has come back, and
/// ends what is left of the object: its threads.
Longest cancel_after(std::chrono::microseconds delay, const std::function<void()>& call,
                     const std::function<void()>& cancel, const std::function<void()>& end) {
  const Leftovers before;
  std::thread caller(call);
  std::this_thread::sleep_for(delay);
  const auto start = Clock::now();
  cancel();
  const auto returned = since(start);
  caller.join();
  end();
  const Longest longest{.cancel = returned, .joined = since(start)};
  CHECK(before.no_thread());
  return longest;
}

/// Cancelled, or over before. Nothing else: the other side was not touched.
template <class T>
void check_cancelled(const Result<T>& result) {
  if (!result) CHECK_MESSAGE(result.error().code == Errc::cancelled, text(result));
}

/// So that a socket takes less than a batch.
void shrink(const std::vector<FdTransport>& ends) {
  const int bytes = 4096;
  for (const FdTransport& end : ends)
    for (const int option : {SO_SNDBUF, SO_RCVBUF})
      REQUIRE(::setsockopt(end.native_handle(), SOL_SOCKET, option, &bytes, sizeof bytes) == 0);
}

template <class T>
Links<T> links_over(Wire wire, unsigned channels) {
  if constexpr (std::is_same_v<T, MemoryTransport>) {
    return memory_links(channels, 1000);
  } else {
    auto links = wire == Wire::tcp ? tcp_links(channels) : unix_links(channels);
    shrink(links.sender);
    shrink(links.receiver);
    return links;
  }
}

/// One cancel: what differs.
struct Case {
  Wire wire;
  unsigned channels;
  std::chrono::microseconds delay;
  Rng& rng;
};

// A sender, whose peer reads nothing: full rings, blocked in send.
enum class SenderState { queueing, waiting_for_epoch, closing, capped, idle };

template <class T, class C, class Z>
Longest cancel_sender(Guests& guests, const Case& c, SenderState state) {
  auto links = links_over<T>(c.wire, c.channels);
  const std::uint64_t bandwidth = state == SenderState::capped ? 1000 : 0;
  auto opened = Sender<T, C, Z>::open(guests.source, std::move(links.sender), {.bandwidth = bandwidth, .depth = 2});
  REQUIRE(opened.has_value());
  auto tx = std::make_unique<Sender<T, C, Z>>(std::move(*opened));
  const auto on_zero = [](std::uint64_t) {};
  Result<void> result;
  const auto run = [&] {
    const auto queue = [&](std::size_t some) -> Result<void> {
      auto queued = tx->queue_range(guests.block, 0, some * page, on_zero);
      if (!queued) return std::unexpected(queued.error());
      return {};
    };
    switch (state) {
      case SenderState::idle: return;
      case SenderState::queueing:
        while (result) result = queue(pages);
        return;
      case SenderState::waiting_for_epoch:
        result = queue(pages / 4);
        if (!result) return;
        if (auto synced = tx->close_epoch_and_wait(); !synced) result = std::unexpected(synced.error());
        return;
      case SenderState::capped:
      case SenderState::closing:
        result = queue(pages / 4);
        if (result) result = tx->close_channels();
        return;
    }
  };
  const Longest longest = cancel_after(c.delay, run, [&] { tx->cancel(); }, [&] { tx.reset(); });
  check_cancelled(result);
  return longest;
}

/// Receiver::open() waits for hellos, and there is no object yet to be cancelled. Who wants to end it before its time
/// limit cuts the links, as the programs do.
template <class C>
Longest cancel_handshake(Guests& guests, const Case& c) {
  auto links = links_over<FdTransport>(c.wire == Wire::memory ? Wire::unix_socket : c.wire, c.channels);
  const RawStream hello = RawStream().hello(0);  // of one of them; one channel is not enough to wait for
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(hello.bytes()).first(c.channels == 1 ? 63 : 64)));
  std::vector<detail::UniqueFd> copies;
  for (const FdTransport& link : links.receiver) copies.emplace_back(::dup(link.native_handle()));
  Result<void> result;
  const auto run = [&] {
    auto rx = Receiver<FdTransport, C>::open(guests.target, std::move(links.receiver), {.hello_timeout = 30s});
    if (!rx) result = std::unexpected(rx.error());
  };
  const Longest longest = cancel_after(
      c.delay, run,
      [&] {
        for (const detail::UniqueFd& copy : copies) ::shutdown(copy.get(), SHUT_RDWR);
      },
      [] {});
  CHECK_FALSE(result.has_value());
  return longest;
}

// A receiver, whose peer is silent somewhere.
enum class ReceiverState { reading, in_payload, barrier_automatic, barrier_manual, finishing };

template <class T, class C>
Longest cancel_receiver(Guests& guests, const Case& c, ReceiverState state) {
  auto links = links_over<T>(c.wire, c.channels);
  const auto send = [&](unsigned channel, const RawStream& stream) {
    REQUIRE(write_all(links.sender[channel], std::span<const std::byte>(stream.bytes())).has_value());
  };
  const bool manual = state == ReceiverState::barrier_manual;
  for (unsigned id = 0; id < c.channels; ++id) send(id, RawStream().hello(id));
  auto opened = Receiver<T, C>::open(guests.target, std::move(links.receiver),
                                     {.barrier = manual ? Barrier::manual : Barrier::automatic});
  REQUIRE_MESSAGE(opened.has_value(), text(opened));
  auto rx = std::make_unique<Receiver<T, C>>(std::move(*opened));
  Result<void> result;
  const auto run = [&] {
    if (manual) {
      if (auto synced = rx->release_epoch(); !synced) result = std::unexpected(synced.error());
    } else {
      result = rx->finish();
    }
  };
  // All but the last channel.
  for (unsigned id = 0; id + 1 < c.channels; ++id) {
    if (state == ReceiverState::barrier_automatic || manual) send(id, RawStream().sync());
    if (state == ReceiverState::in_payload) {
      RawStream part;
      part.packet({.flags = C::method, .next_packet_size = page, .normal = {id * page}});
      send(id, part.raw(Bytes(100)));
    }
    if (state == ReceiverState::finishing) REQUIRE(links.sender[id].finish().has_value());
  }
  const Longest longest = cancel_after(c.delay, run, [&] { rx->cancel(); }, [&] { rx.reset(); });
  check_cancelled(result);
  return longest;
}

/// Both sides at work; one is cancelled, the other one sees it go.
template <class T, class C, class Z>
Longest cancel_migration(Guests& guests, const Case& c, bool sender) {
  auto links = links_over<T>(c.wire, c.channels);
  std::unique_ptr<Sender<T, C, Z>> tx;
  std::unique_ptr<Receiver<T, C>> rx;
  {
    auto opened = Sender<T, C, Z>::open(guests.source, std::move(links.sender));
    REQUIRE(opened.has_value());
    tx = std::make_unique<Sender<T, C, Z>>(std::move(*opened));
  }
  {
    auto opened = Receiver<T, C>::open(guests.target, std::move(links.receiver));
    REQUIRE_MESSAGE(opened.has_value(), text(opened));
    rx = std::make_unique<Receiver<T, C>>(std::move(*opened));
  }
  Result<void> sending, receiving;
  const auto run = [&] {
    std::thread finisher([&] { receiving = rx->finish(); });
    for (int round = 0; round < 3 && sending; ++round) {
      if (auto queued = tx->queue_range(guests.block, 0, pages * page, [](std::uint64_t) {}); !queued)
        sending = std::unexpected(queued.error());
      else if (auto synced = round == 1 ? tx->close_epoch_and_wait() : tx->close_epoch(); !synced)
        sending = std::unexpected(synced.error());
    }
    if (sending) sending = tx->close_channels();
    finisher.join();
  };
  const Longest longest = cancel_after(
      c.delay, run, [&] { sender ? tx->cancel() : rx->cancel(); },
      [&] {
        tx.reset();
        rx.reset();
      });
  const auto fits = [](const Result<void>& result, bool cancelled) {
    return result || (cancelled && result.error().code == Errc::cancelled) ||
           result.error().code == Condition::peer_gone || result.error().code == Condition::peer_protocol;
  };
  CHECK_MESSAGE(fits(sending, sender), text(sending));
  CHECK_MESSAGE(fits(receiving, !sender), text(receiving));
  return longest;
}

// Before there is a Sender or Receiver: an Interrupt is what cancels.
enum class SocketState { connecting, accepting, accepting_source, peeking };

Longest cancel_sockets(const Case& c, SocketState state) {
  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  auto listener = Listener::listen({.host = "127.0.0.1"}, 1);
  REQUIRE(listener.has_value());
  const SocketOptions options{.connect_timeout = 30s, .interrupt = &*interrupt};
  // Whoever connects behind a full queue waits.
  std::vector<FdTransport> queued;
  if (state == SocketState::connecting)
    for (int i = 0; i < 4; ++i)
      if (auto link = connect_to(listener->local_address(), {.connect_timeout = 20ms}))
        queued.push_back(std::move(*link));
  if (state == SocketState::accepting_source || state == SocketState::peeking) {
    auto link = connect_to(listener->local_address());
    REQUIRE(link.has_value());
    queued.push_back(std::move(*link));
  }
  Result<void> result;
  const auto run = [&] {
    const auto keep = [&](const auto& done) {
      if (!done) result = std::unexpected(done.error());
    };
    switch (state) {
      case SocketState::connecting: return keep(connect_channels(listener->local_address(), c.channels + 2, options));
      case SocketState::accepting: return keep(listener->accept_channels(c.channels, 30s, &*interrupt));
      case SocketState::accepting_source:
        return keep(accept_source(*listener, c.channels, {.timeout = 30s, .interrupt = &*interrupt}));
      case SocketState::peeking: {
        auto link = listener->accept(30s);
        if (!link) return keep(link);
        return keep(peek_magic(*link, 30s, &*interrupt));
      }
    }
  };
  const Longest longest = cancel_after(c.delay, run, [&] { interrupt->trigger(); }, [] {});
  check_cancelled(result);
  return longest;
}

template <class T, class C, class Z>
Longest cancel_one(Guests& guests, const Case& c) {
  const std::size_t state = below(c.rng, 13);
  if (state < 5) return cancel_sender<T, C, Z>(guests, c, static_cast<SenderState>(state));
  if (state < 10) return cancel_receiver<T, C>(guests, c, static_cast<ReceiverState>(state - 5));
  if (state == 10) return cancel_handshake<C>(guests, c);
  return cancel_migration<T, C, Z>(guests, c, state == 11);
}

template <class C, class Z>
Longest cancel_over(Guests& guests, const Case& c) {
  if (c.wire == Wire::memory) return cancel_one<MemoryTransport, C, Z>(guests, c);
  return cancel_one<FdTransport, C, Z>(guests, c);
}

}  // namespace

TEST_CASE("Cancels at random moments, in every state, with every stack and wire") {
  const unsigned cancels = wanted_cancels();
  const Watchdog watchdog("random cancels", std::chrono::seconds(120 + cancels));
  Rng rng(seed());
  CAPTURE(seed());
  Guests guests;
  const Leftovers before;
  Longest longest;
  for (unsigned run = 0; run < cancels; ++run) {
    CAPTURE(run);
    const Wire wire = static_cast<Wire>(below(rng, 3));
    const unsigned channels = 1 + static_cast<unsigned>(below(rng, 4));
    // Many in the first moments, where most happens.
    const std::chrono::microseconds delay(below(rng, rng() % 2 == 0 ? 300 : 8000));
    const Case c{wire, channels, delay, rng};
    Longest one;
    switch (below(rng, 10)) {
      case 0: one = cancel_over<NoComp, ZeroPagesNone>(guests, c); break;
      case 1: one = cancel_over<NoComp, ZeroPagesLegacy>(guests, c); break;
      case 2: one = cancel_over<NoComp, ZeroPagesMultifd>(guests, c); break;
      case 3: one = cancel_over<Zlib, ZeroPagesNone>(guests, c); break;
      case 4: one = cancel_over<Zlib, ZeroPagesLegacy>(guests, c); break;
      case 5: one = cancel_over<Zlib, ZeroPagesMultifd>(guests, c); break;
      case 6: one = cancel_over<Zstd, ZeroPagesNone>(guests, c); break;
      case 7: one = cancel_over<Zstd, ZeroPagesLegacy>(guests, c); break;
      case 8: one = cancel_over<Zstd, ZeroPagesMultifd>(guests, c); break;
      default: one = cancel_sockets(c, static_cast<SocketState>(below(rng, 4))); break;
    }
    // A sanitizer makes every step ten times as long, and it may share its core with other tests.
    CHECK(one.cancel < (sanitized ? 1000ms : 100ms));
    CHECK(one.joined < (sanitized ? 5000ms : 1000ms));
    CHECK(before.no_descriptor());
    longest.add(one);
  }
  CHECK(before.no_thread());
  MESSAGE(cancels, " cancels; the longest cancel() ", longest.cancel.count(), " us, until all threads had ended ",
          longest.joined.count(), " us");
}
