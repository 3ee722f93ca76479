// SPDX-License-Identifier: MIT
//
// What our own two ends tell each other beyond QEMU's format: a sender announces its settings, which the receiver
// compares before any page travels; the receiver answers that everything has arrived, or why it gives up. And that
// others neither get nor miss any of it.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "support/allocation_count.hpp"
#include "support/feed.hpp"
#include "support/memory.hpp"
#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
#include "support/tls_links.hpp"
#endif

using namespace multifd;
using namespace test;

namespace {

constexpr std::uint64_t page = 4096;

struct NamedBlock {
  const char* name;
  std::size_t pages;
};

/// One side's memory.
struct Side {
  explicit Side(std::initializer_list<NamedBlock> list, std::size_t page_bytes = page) : map(page_bytes) {
    for (const NamedBlock& each : list) {
      blocks.emplace_back(each.pages * page);
      REQUIRE(map.add(each.name, blocks.back().bytes()).has_value());
    }
  }
  RamMap map;
  std::vector<Block> blocks;
};

struct BothEnds {
  Result<void> sender, receiver;
};

/// A sender and a receiver of any settings; of `links`, each gets as many as it says.
template <class TxC, class RxC, class T>
BothEnds meet(const Side& source, const Side& target, Links<T> links, unsigned sends = 2, unsigned receives = 2) {
  const Watchdog watchdog("two ends of different settings");
  const auto first = [](std::vector<T>& from, unsigned count) {
    return std::vector<T>(std::make_move_iterator(from.begin()), std::make_move_iterator(from.begin() + count));
  };
  BothEnds outcome;
  std::thread destination([&] {
    auto rx = Receiver<T, RxC>::open(target.map, first(links.receiver, receives));
    outcome.receiver = rx ? rx->finish() : Result<void>(std::unexpected(rx.error()));
  });
  auto tx = Sender<T, TxC, ZeroPagesNone>::open(source.map, first(links.sender, sends));
  REQUIRE_MESSAGE(tx.has_value(), text(tx));
  outcome.sender = tx->finish();
  destination.join();
  return outcome;
}

template <class TxC = NoComp, class RxC = NoComp>
void check_differ(const Side& source, const Side& target, Errc code, std::uint64_t theirs, std::uint64_t ours,
                  unsigned sends = 2, unsigned receives = 2) {
  for (auto plain : {tcp_links, unix_links}) {
    const auto [sender, receiver] = meet<TxC, RxC>(source, target, plain(std::max(sends, receives)), sends, receives);
    REQUIRE_MESSAGE(code_of(receiver) == code, text(receiver));
    CHECK(receiver.error().detail == theirs);
    CHECK(receiver.error().expected == ours);
    CHECK(receiver.error().stage == Stage::hello);
    CHECK_MESSAGE(code_of(sender) == Errc::peer_gave_up, text(sender));
    CHECK_MESSAGE(sender.error().peer_reason == code, text(sender));
    CHECK(sender.error().detail == theirs);
    CHECK(sender.error().expected == ours);
  }
}

}  // namespace

TEST_CASE("A receiver of ours compares what a sender of ours announces, before any page, and both name both values") {
  const Side same({{"pc.ram", 4}, {"vga", 2}});
  check_differ<NoComp, NoComp>(same, same, Errc::channel_count_mismatch, 4, 3, 4, 3);
  check_differ<Zstd, Zstd>(same, same, Errc::channel_count_mismatch, 3, 4, 3, 4);
  check_differ<Zstd, NoComp>(same, same, Errc::wrong_compression, wire::flag_zstd, 0);
  check_differ<NoComp, Zlib>(same, same, Errc::wrong_compression, 0, wire::flag_zlib);
  check_differ(Side({{"pc.ram", 4}, {"vga", 2}}, 1024), same, Errc::page_size_mismatch, 1024, 4096);
  check_differ(Side({{"pc.ram", 16}}), Side({{"pc.ram", 16}}, 65536), Errc::page_size_mismatch, 4096, 65536);
  check_differ(Side({{"pc.ram", 4}}), same, Errc::block_list_mismatch, 1, 2);
  check_differ(same, Side({{"pc.ram", 4}}), Errc::block_list_mismatch, 2, 1);
  check_differ(Side({{"pc.ram", 5}, {"vga", 2}}), same, Errc::block_list_mismatch, 7 * page, 6 * page);
  check_differ(Side({{"pc.ram", 2}, {"vga", 4}}), same, Errc::block_list_mismatch, 0, 0);
  check_differ(Side({{"pc.ram", 4}, {"vgb", 2}}), same, Errc::block_list_mismatch, 0, 0);
  const auto [sender, receiver] = meet<Zstd, NoComp>(same, same, tcp_links(2));
  CHECK_MESSAGE(text(receiver).contains("the peer: zstd, this side: none"), text(receiver));
  CHECK_MESSAGE(text(sender).contains("the peer: zstd, this side: none"), text(sender));
}

TEST_CASE("The order of RAM blocks is no setting") {
  const auto [sender, receiver] =
      meet<NoComp, NoComp>(Side({{"pc.ram", 4}, {"vga", 2}}), Side({{"vga", 2}, {"pc.ram", 4}}), memory_links(2));
  CHECK_MESSAGE(receiver.has_value(), text(receiver));
  CHECK_MESSAGE(sender.has_value(), text(sender));
}

TEST_CASE("A hello without an announcement, or with one of another version, is let in") {
  for (const unsigned version : {0u, 2u, 255u}) {
    CAPTURE(version);
    GuestRam target(4);
    RawStream stream;
    Bytes hello = RawStream().hello(0).bytes();
    if (version != 0) {
      put(hello, 28, 0x6d66414e, 4);
      put(hello, 32, version, 1);
      put(hello, 33, 77, 1);
      put(hello, 35, 1, 1);
    }
    stream.raw(hello).packet({.normal = {0}, .payload = Bytes(page, std::byte{3})}).sync();
    const auto outcome = feed<NoComp>(target.map, {stream.bytes()}, Then::end_of_stream);
    CHECK_MESSAGE(outcome.result.has_value(), text(outcome.result));
    CHECK(target.memory.bytes()[0] == std::byte{3});
  }
}

TEST_CASE("A sender that has not announced that it reads an answer gets none, at a good end and at a bad one") {
  for (const bool good : {true, false}) {
    CAPTURE(good);
    const Watchdog watchdog("a peer that is not ours");
    GuestRam target(4);
    auto links = unix_links(1);  // where even a broken stream would deliver an answer
    RawStream stream;
    stream.hello(0);
    if (good)
      stream.sync();
    else
      stream.packet({.normal = {1}, .payload = Bytes(page)});
    REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
    if (good) REQUIRE(links.sender[0].finish().has_value());
    {
      auto rx = Receiver<FdTransport, NoComp>::open(target.map, std::move(links.receiver));
      if (rx) CHECK(rx->finish().has_value() == good);
    }
    std::byte byte{};
    const iovec buffer{&byte, 1};
    const auto got = links.sender[0].read_some(MutableBuffers(&buffer, 1));
    CHECK(got.value_or(0) == 0);
  }
}

TEST_CASE_TEMPLATE("Sender::finish() succeeds when the receiver's finish() has, and not before", T, FdTransport,
                   MemoryTransport) {
  std::vector<Links<T>> all;
  if constexpr (std::is_same_v<T, FdTransport>) {
    all.push_back(tcp_links(3));
    all.push_back(unix_links(3));
  } else {
    all.push_back(memory_links(3));
  }
  for (Links<T>& links : all) {
    const Watchdog watchdog("a confirmed end");
    GuestRam source(512), target(512, std::byte{0});
    std::atomic<bool> confirmed = false, early = false;
    std::thread destination([&] {
      auto rx = Receiver<T, Zstd>::open(target.map, std::move(links.receiver));
      REQUIRE_MESSAGE(rx.has_value(), text(rx));
      CHECK(eventually([&] { return rx->ended_channels() == 3; }));  // everything is here, and nobody has said so
      early = confirmed.load();
      CHECK(rx->finish().has_value());
    });
    auto tx = Sender<T, Zstd, ZeroPagesNone>::open(source.map, std::move(links.sender));
    REQUIRE_MESSAGE(tx.has_value(), text(tx));
    REQUIRE(tx->queue_range(source.block, 0, source.memory.size()).has_value());
    const auto ended = tx->finish();
    confirmed = true;
    destination.join();
    CHECK_MESSAGE(ended.has_value(), text(ended));
    CHECK_FALSE(early);
    CHECK(source.memory == target.memory);
    CHECK(code_of(tx->finish()) == Errc::already_closed);
  }
}

TEST_CASE("A sender learns why its receiver gives up: in the middle, and at the end") {
  for (auto plain : {tcp_links, unix_links}) {
    for (const bool at_the_end : {false, true}) {
      CAPTURE(at_the_end);
      const Watchdog watchdog("a reason");
      GuestRam source(4096), target(4096);
      auto links = plain(2);
      std::thread destination([&] {
        auto late = Receiver<FdTransport, NoComp>::open(target.map, std::move(links.receiver));
        const Result<void> got = late ? late->finish() : std::unexpected(late.error());
        CHECK_MESSAGE(code_of(got) == Errc::duplicate_page, text(got));
      });
      auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
      REQUIRE(tx.has_value());
      REQUIRE(tx->queue_page(source.block, 5 * page).has_value());
      REQUIRE(tx->queue_page(source.block, 5 * page).has_value());
      Result<void> ended;
      if (at_the_end) {
        ended = tx->finish();
      } else {
        if (auto flushed = tx->push_out(); !flushed) ended = flushed;
        destination.join();
        while (ended) {
          auto queued = tx->queue_range(source.block, 0, source.memory.size());
          if (!queued) ended = std::unexpected(queued.error());
        }
      }
      REQUIRE_MESSAGE(code_of(ended) == Errc::peer_gave_up, text(ended));
      CHECK(ended.error().code == Condition::peer_gone);
      CHECK_MESSAGE(ended.error().peer_reason == Errc::duplicate_page, text(ended));
      CHECK(ended.error().detail == 5 * page);
      CHECK(ended.error().subject.view() == "pc.ram");
      if (destination.joinable()) destination.join();
    }
  }
}

TEST_CASE("Sender::finish() fails when the receiver ends without its confirmation") {
  SUBCASE("it is destroyed before its finish()") {
    for (auto plain : {tcp_links, unix_links}) {
      const Watchdog watchdog("a receiver that is destroyed");
      GuestRam source(4), target(4);
      auto links = plain(1);
      std::thread destination([&] {
        auto rx = Receiver<FdTransport, NoComp>::open(target.map, std::move(links.receiver));
        REQUIRE(rx.has_value());
        CHECK(eventually([&] { return rx->ended_channels() == 1; }));
      });
      auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
      REQUIRE(tx.has_value());
      const auto ended = tx->finish();
      destination.join();
      CHECK_MESSAGE(code_of(ended) == Errc::peer_gave_up, text(ended));
      CHECK(ended.error().peer_reason == Errc::cancelled);
    }
  }
  SUBCASE("it does not know of confirmations: reads everything and closes") {
    const Watchdog watchdog("a receiver that confirms nothing");
    GuestRam source(4);
    auto links = unix_links(1);
    std::thread destination([&] {
      FdTransport link = std::move(links.receiver[0]);
      std::array<std::byte, 4096> bytes;
      const iovec buffer{bytes.data(), bytes.size()};
      while (link.read_some(MutableBuffers(&buffer, 1)).value_or(0) > 0) continue;
      CHECK(link.finish().has_value());
    });
    auto tx = Sender<FdTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender));
    REQUIRE(tx.has_value());
    const auto ended = tx->finish();
    destination.join();
    CHECK_MESSAGE(code_of(ended) == Errc::unconfirmed, text(ended));
  }
  SUBCASE("it says nothing") {
    const Watchdog watchdog("a receiver that says nothing");
    GuestRam source(4);
    auto links = memory_links(1);
    auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links.sender),
                                                                   {.confirm_timeout = 100ms});
    REQUIRE(tx.has_value());
    const Stopwatch watch;
    const auto ended = tx->finish();
    CHECK_MESSAGE(code_of(ended) == Errc::timed_out, text(ended));
    CHECK_MESSAGE(text(ended).contains("confirm_timeout"), text(ended));
    CHECK(watch.elapsed() >= 100ms);
    CHECK(watch.elapsed() < no_hang);
  }
}

TEST_CASE("Where no confirmation can come, Sender::finish() says so and ends nothing") {
  GuestRam source(4);
  using Tx = Sender<FdTransport, NoComp, ZeroPagesNone>;
  SUBCASE("the peer is a QEMU") {
    auto links = unix_links(1);
    auto tx = Tx::open(source.map, std::move(links.sender), {.peer = peer_profiles.front()});
    REQUIRE(tx.has_value());
    CHECK(code_of(tx->finish()) == Errc::peer_lacks_confirmation);
    CHECK(tx->close_channels().has_value());
  }
  SUBCASE("a pipe has no way back") {
    int fds[2];
    REQUIRE(::pipe2(fds, O_CLOEXEC) == 0);
    FdTransport in = adopt(fds[0]);
    auto tx = Tx::open(source.map, one(adopt(fds[1])));
    REQUIRE(tx.has_value());
    CHECK(code_of(tx->finish()) == Errc::peer_lacks_confirmation);
    // And a receiver that fails behind a pipe does not wait for a way back.
    const Watchdog watchdog("a receiver behind a pipe");
    const Side other({{"pc.ram", 5}});
    CHECK(code_of(Receiver<FdTransport, NoComp>::open(other.map, one(std::move(in)))) == Errc::block_list_mismatch);
  }
}

TEST_CASE("Hellos to others than our own receiver hold nothing of ours") {
  GuestRam source(4);
  for (const PeerProfile& peer : peer_profiles) {
    CAPTURE(peer.name);
    auto [links, tapes] = captures(1);
    auto tx = Sender<CaptureTransport, NoComp, ZeroPagesNone>::open(source.map, std::move(links), {.peer = peer});
    REQUIRE(tx.has_value());
    REQUIRE(tx->close_channels().has_value());
    const auto reserved = std::span(tapes[0]->bytes).subspan(25, 39);
    CHECK(std::ranges::all_of(reserved, [](std::byte b) { return b == std::byte{}; }) == (peer.name != "multifd"));
  }
}

TEST_CASE("A channel that nobody accepted is found at its listener, and the next source's channels stay there") {
  // Sources that announce nothing: channels 0 to 2 are accepted, 3 is not.
  const auto send = [](const Listener& listener, unsigned id, std::byte uuid, bool announces = false) {
    auto link = connect_to(listener.local_address());
    REQUIRE(link.has_value());
    Bytes hello = RawStream().hello(id, uuid).bytes();
    if (announces) {
      put(hello, 28, 0x6d66414e, 4);
      put(hello, 32, 1, 1);
      put(hello, 33, 4, 1);
    }
    REQUIRE(write_all(*link, std::span<const std::byte>(hello)).has_value());
    return std::move(*link);
  };
  struct Row {
    const char* what;
    unsigned id;
    std::byte uuid;
    bool announces;
    bool one_more;
  };
  for (const Row row :
       {Row{"one more", 3, std::byte{1}, false, true}, Row{"the last id", 254, std::byte{1}, false, true},
        Row{"the next source's first", 0, std::byte{1}, false, false},
        Row{"another VM's", 3, std::byte{2}, false, false}, Row{"a sender of ours", 3, std::byte{1}, true, false}}) {
    for (const bool before_open : {true, false}) {
      CAPTURE(row.what);
      CAPTURE(before_open);
      const Watchdog watchdog("a channel too many");
      GuestRam target(4);
      auto listener = Listener::listen({.host = "127.0.0.1"}, 8);
      REQUIRE(listener.has_value());
      std::vector<FdTransport> source;
      for (unsigned id = 0; id < 3; ++id) source.push_back(send(*listener, id, std::byte{1}));
      auto links = listener->accept_channels(3, 10s);
      REQUIRE(links.has_value());
      if (before_open) source.push_back(send(*listener, row.id, row.uuid, row.announces));
      auto rx = Receiver<FdTransport, NoComp>::open(target.map, std::move(*links), {.listener = &*listener});
      Result<void> outcome = rx ? Result<void>() : std::unexpected(rx.error());
      CHECK(outcome.has_value() == !(row.one_more && before_open));
      if (!before_open) source.push_back(send(*listener, row.id, row.uuid, row.announces));
      if (rx) {
        for (unsigned id = 0; id < 3; ++id) REQUIRE(source[id].finish().has_value());
        outcome = rx->finish();
      }
      if (row.one_more) {
        REQUIRE_MESSAGE(code_of(outcome) == Errc::too_many_channels, text(outcome));
        CHECK(outcome.error().detail == row.id);
        CHECK(outcome.error().expected == 3);
      } else {
        CHECK_MESSAGE(outcome.has_value(), text(outcome));
        auto next = listener->accept_channels(1, 10s);
        REQUIRE_MESSAGE(next.has_value(), text(next));
        std::byte hello[64];
        REQUIRE(read_exact((*next)[0], std::span<std::byte>(hello)).has_value());
        CHECK(hello[24] == std::byte(row.id));
      }
    }
  }
}

namespace {

/// While it lives this process gets no descriptor.
class NoDescriptor {
 public:
  NoDescriptor() {
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    const int next = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
    REQUIRE(next >= 0);
    ::close(next);
    rlimit now = before_;
    now.rlim_cur = static_cast<rlim_t>(next);
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &now) == 0);
  }
  NoDescriptor(const NoDescriptor&) = delete;
  NoDescriptor& operator=(const NoDescriptor&) = delete;
  ~NoDescriptor() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

}  // namespace

TEST_CASE("A look for one more channel that fails itself fails no migration, and the next call looks again") {
  enum class Lack { descriptor, listener_interrupted, memory };
  for (const Lack lack : {Lack::descriptor, Lack::listener_interrupted, Lack::memory})
    for (const bool one_more : {false, true}) {
      // open() itself needs memory.
      if (one_more && lack == Lack::memory) continue;
      CAPTURE(static_cast<int>(lack));
      CAPTURE(one_more);
      const Watchdog watchdog("a look that fails");
      GuestRam target(4);
      Interrupt interrupt = Interrupt::create().value();
      auto listener = Listener::listen({.host = "127.0.0.1"}, 8, {.interrupt = &interrupt});
      REQUIRE(listener.has_value());
      std::vector<FdTransport> source;
      const auto connect = [&](unsigned id) {
        auto link = connect_to(listener->local_address());
        REQUIRE(link.has_value());
        const Bytes hello = RawStream().hello(id).sync().bytes();
        REQUIRE(write_all(*link, std::span<const std::byte>(hello)).has_value());
        source.push_back(std::move(*link));
      };
      connect(0);
      auto links = listener->accept_channels(1, 10s);
      REQUIRE(links.has_value());
      connect(one_more ? 1 : 0);
      /// `call()` while the look cannot be made.
      const auto without = [&](auto&& call) {
        std::optional<NoDescriptor> no_descriptor;
        std::optional<FailAllocation> no_memory;
        if (lack == Lack::descriptor) no_descriptor.emplace();
        if (lack == Lack::listener_interrupted) interrupt.trigger();
        if (lack == Lack::memory) no_memory.emplace(0, Shortage::from_then_on);
        auto result = call();
        no_memory.reset();
        no_descriptor.reset();
        if (lack == Lack::listener_interrupted) interrupt = Interrupt::create().value();
        return result;
      };
      const auto open = [&] {
        return Receiver<FdTransport, NoComp>::open(target.map, std::move(*links),
                                                   {.barrier = Barrier::manual, .listener = &*listener});
      };
      auto rx = lack == Lack::memory ? open() : without(open);
      REQUIRE_MESSAGE(rx.has_value(), text(rx));
      const auto epoch = without([&] { return rx->release_epoch(); });
      CHECK_MESSAGE(epoch == std::uint64_t{0}, text(epoch));
      REQUIRE(source[0].finish().has_value());
      REQUIRE(eventually([&] { return rx->ended_channels() == 1; }));
      const auto finish = [&] { return rx->finish(); };
      const auto finished = one_more ? finish() : without(finish);
      if (one_more) {
        REQUIRE_MESSAGE(code_of(finished) == Errc::too_many_channels, text(finished));
        CHECK(finished.error().detail == 1);
      } else {
        CHECK_MESSAGE(finished.has_value(), text(finished));
      }
    }
}

#if defined(MULTIFD_HAS_TLS) || defined(MULTIFD_HAS_OPENSSL)
TEST_CASE("Over TLS, too, a sender hears that everything has arrived, or why not") {
  const Side same({{"pc.ram", 4}}), other({{"pc.ram", 5}});
  const auto [sender, receiver] = meet<NoComp, NoComp>(same, same, tls_links(tcp_links(2)));
  CHECK_MESSAGE(receiver.has_value(), text(receiver));
  CHECK_MESSAGE(sender.has_value(), text(sender));
  const auto refused = meet<NoComp, NoComp>(same, other, tls_links(tcp_links(2)));
  CHECK_MESSAGE(code_of(refused.receiver) == Errc::block_list_mismatch, text(refused.receiver));
  CHECK_MESSAGE(code_of(refused.sender) == Errc::peer_gave_up, text(refused.sender));
  CHECK(refused.sender.error().peer_reason == Errc::block_list_mismatch);
}
#endif
