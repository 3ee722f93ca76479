// SPDX-License-Identifier: MIT
//
// cancel() from another thread ends whatever its object is doing, quickly, with Errc::cancelled, and the peer sees a
// broken stream. Receiver::open(), while there is no object yet, is ended by an Interrupt.
#include <doctest/doctest.h>
#include <sys/socket.h>

#include <atomic>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"
#include "support/raw_stream.hpp"

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;

/// So that a socket takes less than a batch, whichever channel gets most of them.
void shrink_buffers(int fd) {
  const int bytes = 4096;
  for (const int option : {SO_SNDBUF, SO_RCVBUF})
    REQUIRE(::setsockopt(fd, SOL_SOCKET, option, &bytes, sizeof bytes) == 0);
}

/// How a call that blocks is cancelled.
enum class By { cancel, interrupt };
constexpr By both_ways[] = {By::cancel, By::interrupt};

/// Runs `call` in a thread, cancels when `ready` holds and the call had time to block, and checks how it ends.
/// Nothing tells that a thread has blocked, so a pause has to do; a cancel() that comes early must work as well.
template <class Object>
void cancel_during(
    Object& object, const std::function<std::optional<Error>()>& call,
    const std::function<bool()>& ready = [] { return true; }, Interrupt* interrupt = nullptr) {
  std::optional<Error> error;
  std::thread caller([&] { error = call(); });
  CHECK(eventually(ready));
  std::this_thread::sleep_for(20ms);
  const Stopwatch watch;
  if (interrupt != nullptr)
    interrupt->trigger();
  else
    object.cancel();
  caller.join();
  CHECK(watch.elapsed() < no_hang);
  REQUIRE(error.has_value());
  CHECK_MESSAGE(error->code == Errc::cancelled, text(*error));
}

template <class T>
std::optional<Error> error_of(const Result<T>& result) {
  return result ? std::nullopt : std::optional(result.error());
}

template <class T>
void cancel_senders(const std::function<Links<T>()>& make_links) {
  // Nobody reads the other ends: workers block in their first packets.
  GuestRam source(16 * 1024);
  const auto with_sender = [&](By by, const auto& body) {
    const Watchdog watchdog("cancel a sender");
    CAPTURE(static_cast<int>(by));
    auto links = make_links();
    Interrupt interrupt = Interrupt::create().value();
    auto tx = Sender<T, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender),
                                                     {.interrupt = by == By::interrupt ? &interrupt : nullptr});
    REQUIRE(tx.has_value());
    body(*tx, by == By::interrupt ? &interrupt : nullptr);
    // The first error stays.
    CHECK(code_of(tx->close_channels()) == Errc::cancelled);
    CHECK(code_of(tx->queue_page(source.block, 0)) == Errc::cancelled);
    tx->cancel();
    CHECK(code_of(tx->close_epoch()) == Errc::cancelled);
  };
  const auto always = [] { return true; };
  for (const By by : both_ways) {
    with_sender(by, [&](auto& tx, Interrupt* interrupt) {
      cancel_during(
          tx, [&] { return error_of(tx.queue_range(source.block, 0, source.memory.size())); },
          [&] { return tx.stats().producer_waits > 0; }, interrupt);
    });
    with_sender(by, [&](auto& tx, Interrupt* interrupt) {
      REQUIRE(tx.queue_range(source.block, 0, 3 << 20).has_value());
      REQUIRE(tx.close_epoch() == std::uint64_t{0});
      cancel_during(tx, [&] { return error_of(tx.wait(0)); }, always, interrupt);
    });
    with_sender(by, [&](auto& tx, Interrupt* interrupt) {
      REQUIRE(tx.queue_range(source.block, 0, 3 << 20).has_value());
      cancel_during(tx, [&] { return error_of(tx.close_channels()); }, always, interrupt);
    });
  }
  with_sender(By::cancel, [&](auto& tx, Interrupt*) { tx.cancel(); });
}

}  // namespace

TEST_CASE("A sender is cancelled in queue_range, wait and close: memory") {
  cancel_senders<MemoryTransport>([] { return memory_links(2, 1000); });
}

TEST_CASE("A sender is cancelled in queue_range, wait and close: sockets") {
  // The other ends stay open, outside, so that only cancel() can end the writes.
  Links<FdTransport> keep;
  cancel_senders<FdTransport>([&] {
    Links<FdTransport> links = tcp_links(1);
    auto second = unix_links(1);
    links.sender.push_back(std::move(second.sender[0]));
    for (const auto* const ends : {&links.sender, &links.receiver})
      for (const FdTransport& end : *ends) shrink_buffers(end.native_handle());
    keep.receiver.clear();
    keep.receiver.push_back(std::move(links.receiver[0]));
    keep.receiver.push_back(std::move(second.receiver[0]));
    return links;
  });
}

TEST_CASE("A sender is cancelled while its bandwidth cap holds it") {
  const Watchdog watchdog("cancel at the cap");
  GuestRam source(2048);
  Captures sent = captures(2);
  auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(sent.links), {.bandwidth = 1});
  REQUIRE(tx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, 4 * 128 * page).has_value());
  // The cap lets a first piece out; the next one would take days.
  const auto begun = [&] { return captured_bytes(sent.tapes) > 1024; };
  cancel_during(*tx, [&] { return error_of(tx->close_channels()); }, begun);
}

TEST_CASE_TEMPLATE("A receiver is cancelled while it reads, and at the barrier", T, MemoryTransport, FdTransport) {
  const Watchdog watchdog("cancel a receiver");
  GuestRam target(4);
  const auto all = [&](Barrier barrier, By by) {
    Interrupt interrupt = Interrupt::create().value();
    Interrupt* const trigger = by == By::interrupt ? &interrupt : nullptr;
    for (const int state : {0, 1, 2}) {
      CAPTURE(state);
      CAPTURE(static_cast<int>(by));
      interrupt = Interrupt::create().value();
      auto links = [] {
        if constexpr (std::is_same_v<T, MemoryTransport>)
          return memory_links(2);
        else
          return tcp_links(2);
      }();
      const auto send = [&](unsigned channel, const RawStream& stream) {
        REQUIRE(write_all(links.sender[channel], std::span<const std::byte>(stream.bytes())).has_value());
      };
      send(0, RawStream().hello(0));
      send(1, RawStream().hello(1));
      auto rx =
          Receiver<T, NoComp>::open(target.map, std::move(links.receiver), {.barrier = barrier, .interrupt = trigger});
      REQUIRE_MESSAGE(rx.has_value(), text(rx));
      const auto finish = [&] { return error_of(rx->finish()); };
      if (state == 0) {
        cancel_during(*rx, finish, [] { return true; }, trigger);
      } else if (state == 1 && barrier == Barrier::automatic) {
        send(0, RawStream().sync());
        cancel_during(*rx, finish, [&] { return total(rx->stats().channels).syncs == 1; }, trigger);
      } else if (barrier == Barrier::manual) {
        if (state == 1) send(0, RawStream().sync());
        cancel_during(
            *rx, [&] { return error_of(rx->release_epoch()); },
            [&] { return total(rx->stats().channels).syncs == static_cast<std::uint64_t>(state % 2); }, trigger);
      } else {
        rx->cancel();
      }
      CHECK(code_of(rx->finish()) == Errc::cancelled);
      // The peer cannot take it for an end in order.
      for (int tries = 0;; ++tries) {
        const Bytes more(1000);
        const auto wrote = write_all(links.sender[0], std::span<const std::byte>(more));
        if (wrote) {
          REQUIRE(tries < 1000);
          std::this_thread::sleep_for(1ms);
          continue;
        }
        CHECK_MESSAGE(wrote.error().code == Condition::peer_gone, text(wrote));
        break;
      }
    }
  };
  for (const Barrier barrier : {Barrier::automatic, Barrier::manual})
    for (const By by : both_ways) all(barrier, by);
}

TEST_CASE("An Interrupt ends Receiver::open() while a hello is missing") {
  const Watchdog watchdog("interrupt open");
  GuestRam target(4);
  auto links = tcp_links(2);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(RawStream().hello(0).bytes())).has_value());
  Interrupt interrupt = Interrupt::create().value();
  std::thread caller([&] {
    std::this_thread::sleep_for(20ms);  // nothing tells that a call blocks
    interrupt.trigger();
  });
  const Stopwatch watch;
  auto rx = Receiver<FdTransport, NoComp>::open(target.map, std::move(links.receiver), {.interrupt = &interrupt});
  caller.join();
  CHECK_MESSAGE(code_of(rx) == Errc::cancelled, text(rx));
  CHECK(rx.error().stage == Stage::hello);
  CHECK(watch.elapsed() < no_hang);
}

TEST_CASE("Over TCP the peer of a cancelled or destroyed sender sees a broken stream, never an end") {
  const Watchdog watchdog("broken stream");
  GuestRam source(1024);
  for (const bool destroy : {false, true})
    for (const bool read_some_first : {false, true}) {
      CAPTURE(destroy);
      CAPTURE(read_some_first);
      auto links = tcp_links(2);
      {
        auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
        REQUIRE(tx.has_value());
        REQUIRE(tx->queue_page(source.block, 0).has_value());
        REQUIRE(tx->close_epoch_and_wait().has_value());  // a packet boundary, SYNC written: the most innocent moment
        if (read_some_first) {
          Bytes hello(64);
          for (auto& link : links.receiver) REQUIRE(read_exact(link, std::span(hello)).has_value());
        }
        if (!destroy) tx->cancel();
      }
      for (auto& link : links.receiver) {
        Bytes bytes(4096);
        for (;;) {
          iovec buffer = mutable_buffer(bytes);
          const auto got = link.read_some(std::span(&buffer, 1));
          if (got && *got > 0) continue;
          REQUIRE_FALSE(got.has_value());
          CHECK_MESSAGE(got.error().code == Condition::peer_gone, text(got));
          break;
        }
      }
    }
}

TEST_CASE("A receiver whose sender is cancelled fails, whatever it was doing") {
  const Watchdog watchdog("receiver of a cancelled sender");
  GuestRam source(64), target(64);
  auto links = tcp_links(2);
  auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
  auto rx = Receiver<FdTransport, NoComp>::open(target.map, std::move(links.receiver));
  REQUIRE(tx.has_value());
  REQUIRE(rx.has_value());
  REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
  REQUIRE(tx->close_epoch_and_wait().has_value());
  CHECK(eventually([&] { return rx->stats().epochs == 1; }));
  tx->cancel();
  const auto finished = rx->finish();
  CHECK_MESSAGE(finished.error().code == Condition::peer_gone, text(finished));
}

TEST_CASE("Objects that are dropped in the middle of their work end at once") {
  const Watchdog watchdog("drop", 30s);
  GuestRam source(2048);
  {
    auto links = memory_links(2, 1000);
    auto tx = Sender<MemoryTransport, Zstd, ZeroPagesNone>::open(source.map, std::move(links.sender));
    REQUIRE(tx.has_value());
    REQUIRE(tx->queue_range(source.block, 0, 4 * 128 * page).has_value());
  }
  {
    auto links = memory_links(2, 1000);
    for (unsigned id = 0; id < 2; ++id)
      REQUIRE(write_all(links.sender[id], std::span<const std::byte>(RawStream().hello(id).bytes())).has_value());
    auto rx = Receiver<MemoryTransport, Zlib>::open(source.map, std::move(links.receiver));
    REQUIRE(rx.has_value());
    auto moved = std::move(*rx);  // also after a move
  }
}

TEST_CASE("The error hook is called once, with the first error") {
  const Watchdog watchdog("error hook");
  GuestRam source(64);
  std::atomic<int> told = 0;
  std::error_code code;
  {
    auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(source.map, captures(2).links,
                                                                    {.on_error = [&](const Error& error) {
                                                                      code = error.code;
                                                                      ++told;
                                                                    }});
    REQUIRE(tx.has_value());
    tx->cancel();
    tx->cancel();
  }
  CHECK(told == 1);
  CHECK(code == Errc::cancelled);
}

namespace {

/// One migration, cancelled from another thread after `delay_us`, on one side or on both.
template <class T, class C>
void cancel_at(Links<T> links, std::uint64_t delay_us, unsigned who) {
  GuestRam source(600), target(600);
  auto tx = Sender<T, C, ZeroPagesMultifd>::open(source.map, std::move(links.sender));
  REQUIRE(tx.has_value());
  auto rx = Receiver<T, C>::open(target.map, std::move(links.receiver));
  REQUIRE_MESSAGE(rx.has_value(), text(rx));
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    if ((who & 1) != 0) tx->cancel();
    if ((who & 2) != 0) rx->cancel();
  });
  Result<void> receiving;
  std::thread finisher([&] { receiving = rx->finish(); });
  Result<void> sending;
  for (int round = 0; round < 3 && sending; ++round) {
    if (auto queued = tx->queue_range(source.block, 0, source.memory.size()); !queued)
      sending = std::unexpected(queued.error());
    else if (auto synced = round == 1 ? tx->close_epoch_and_wait() : tx->close_epoch(); !synced)
      sending = std::unexpected(synced.error());
  }
  if (sending) sending = tx->close_channels();
  finisher.join();
  killer.join();
  // Either it was over before, or everybody knows. Who was not cancelled saw its peer go.
  const auto fits = [&](const Result<void>& result, bool cancelled) {
    if (result) return true;
    if (cancelled && result.error().code == Errc::cancelled) return true;
    return result.error().code == Condition::peer_gone || result.error().code == Condition::peer_protocol;
  };
  CHECK_MESSAGE(fits(sending, (who & 1) != 0), text(sending));
  CHECK_MESSAGE(fits(receiving, (who & 2) != 0), text(receiving));
}

}  // namespace

TEST_CASE("Two hundred migrations are cancelled at random moments") {
  const Watchdog watchdog("random cancels", 240s);
  Rng rng(seed());
  const int runs = quick() ? 60 : 200;
  for (int run = 0; run < runs; ++run) {
    CAPTURE(run);
    CAPTURE(seed());
    const std::uint64_t delay_us = rng() % (rng() % 4 == 0 ? 200 : 4000);
    const unsigned who = 1 + static_cast<unsigned>(rng() % 3);
    const unsigned channels = 1 + static_cast<unsigned>(rng() % 4);
    switch (run % 6) {
      case 0: cancel_at<MemoryTransport, NoComp>(memory_links(channels), delay_us, who); break;
      case 1: cancel_at<MemoryTransport, Zlib>(memory_links(channels), delay_us, who); break;
      case 2: cancel_at<MemoryTransport, Zstd>(memory_links(channels), delay_us, who); break;
      case 3: cancel_at<FdTransport, NoComp>(tcp_links(channels), delay_us, who); break;
      case 4: cancel_at<FdTransport, Zstd>(tcp_links(channels), delay_us, who); break;
      case 5: cancel_at<FdTransport, NoComp>(unix_links(channels), delay_us, who); break;
    }
  }
}
