// SPDX-License-Identifier: MIT
//
// No memory and no threads: allocation, then pthread_create, 0, 1, 2 ... of open() fails until it gets through. open()
// says so, the peer sees its streams broken, nothing is left behind. After open() nothing is allocated but for device
// state, which fails in order, too.
#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <variant>
#include <vector>

#include "fault/failing_threads.hpp"
#include "fault/tally.hpp"
#include "multifd/any.hpp"
#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
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

struct Guest {
  Guest() {
    memory.fill(std::byte{7});
    block = *map.add("pc.ram", memory.bytes());
    REQUIRE(map.add("0000:00:02.0/a name that is too long to be kept inside a string", more.bytes()).has_value());
  }
  Block memory{16 * page};
  Block more{page};
  RamMap map;
  BlockId block{};
};

/// What became of an open().
struct Opening {
  Result<void> result;
  bool threw = false;     ///< std::bad_alloc
  bool injected = false;  ///< the fault came
};

/// Opens with `fault` in force, which must be gone before anything is checked.
template <class Fault, class Open>
Opening attempt(Fault&& arm, Open&& open) {
  Opening outcome;
  const auto fault = arm();
  try {
    outcome.result = open();
  } catch (const std::bad_alloc&) {
    outcome.threw = true;
  }
  outcome.injected = fault->happened();
  return outcome;
}

/// What one of two kinds of open() made: A, or B where `other` is asked for.
template <class A, class B>
Result<std::variant<A, B>> either(bool other, auto&& open_a, auto&& open_b) {
  if (other) {
    auto opened = open_b();
    if (!opened) return std::unexpected(opened.error());
    return std::variant<A, B>(std::move(*opened));
  }
  auto opened = open_a();
  if (!opened) return std::unexpected(opened.error());
  return std::variant<A, B>(std::move(*opened));
}

/// A sender of guest memory, or (other) one of copies with digests.
template <class C, class Z>
struct SenderSide {
  using FromMemory = Sender<MemoryTransport, C, Z>;
  using FromBuffers = Sender<MemoryTransport, C, Z, FromCopies>;
  using Object = std::variant<FromMemory, FromBuffers>;
  static std::vector<MemoryTransport>& own(Links<MemoryTransport>& links) { return links.sender; }
  static std::vector<MemoryTransport>& peers(Links<MemoryTransport>& links) { return links.receiver; }
  static void prepare(Links<MemoryTransport>&) {}
  static auto open(Guest& guest, std::vector<MemoryTransport> links, bool copies) {
    return either<FromMemory, FromBuffers>(
        copies, [&] { return FromMemory::open(guest.map, std::move(links), {.depth = 2}); },
        [&] { return FromBuffers::open(guest.map, std::move(links), {.depth = 2, .digest = Digest::on}); });
  }
  /// Once it is open it works.
  static void use(Guest& guest, Object& object) {
    if (auto* const copies = std::get_if<FromBuffers>(&object)) {
      auto buffer = PageBuffer::create();
      REQUIRE(buffer.has_value());
      const std::uint64_t offset = 0;
      const auto queued =
          copies->queue_copies(guest.block, {&offset, 1}, 0, *buffer, [](std::uint64_t) { return true; });
      CHECK_MESSAGE(queued.has_value(), text(queued));
    } else {
      CHECK(std::get<FromMemory>(object).queue_page(guest.block, 0).has_value());
    }
    std::visit(
        [](auto& tx) {
          CHECK(tx.close_epoch_and_wait().has_value());
          CHECK(tx.close_channels().has_value());
        },
        object);
  }
};

/// A receiver into memory with a thread that populates, or (other) one into a hook.
template <class C>
struct ReceiverSide {
  using ToMemory = Receiver<MemoryTransport, C>;
  using ToHook = Receiver<MemoryTransport, C, IntoHook>;
  using Object = std::variant<ToMemory, ToHook>;
  static std::vector<MemoryTransport>& own(Links<MemoryTransport>& links) { return links.receiver; }
  static std::vector<MemoryTransport>& peers(Links<MemoryTransport>& links) { return links.sender; }
  static void prepare(Links<MemoryTransport>& links) {
    for (unsigned id = 0; id < links.sender.size(); ++id) {
      const RawStream stream = RawStream().hello(id).sync();
      REQUIRE(write_all(links.sender[id], std::span<const std::byte>(stream.bytes())).has_value());
      REQUIRE(links.sender[id].finish().has_value());
    }
  }
  static auto open(Guest& guest, std::vector<MemoryTransport> links, bool hook) {
    return either<ToMemory, ToHook>(
        hook, [&] { return ToMemory::open(guest.map, std::move(links), {.into = {.populate = Populate::ahead}}); },
        [&] {
          return ToHook::open(guest.map, std::move(links), {.into = {[](ReceivedPacket&) { return Result<void>{}; }}});
        });
  }
  static void use(Guest&, Object& object) {
    std::visit([](auto& rx) { CHECK(rx.finish().has_value()); }, object);
  }
};

/// The same behind AnySender, or AnyReceiver: what hides the stack is allocated, too.
struct AnySenderSide : SenderSide<NoComp, ZeroPagesMultifd> {
  using Object = std::unique_ptr<AnySender>;
  static auto open(Guest& guest, std::vector<MemoryTransport> links, bool) {
    return open_any_sender(PolicyList<NoComp, Zstd>{}, PolicyList<ZeroPagesMultifd>{}, guest.map, std::move(links),
                           {.depth = 2});
  }
  static void use(Guest& guest, Object& tx) {
    CHECK(tx->queue_range(guest.block, 0, page, {}).has_value());
    CHECK(tx->close_channels().has_value());
  }
};
struct AnyReceiverSide : ReceiverSide<NoComp> {
  using Object = std::unique_ptr<AnyReceiver>;
  static auto open(Guest& guest, std::vector<MemoryTransport> links, bool) {
    return open_any_receiver(PolicyList<NoComp, Zstd>{}, guest.map, std::move(links));
  }
  static void use(Guest&, Object& rx) { CHECK(rx->finish().has_value()); }
};

/// The peer cannot take it for an end in order.
void check_cut(MemoryTransport& peer) {
  Bytes bytes(100);
  for (;;) {
    iovec buffer = mutable_buffer(bytes);
    const auto got = peer.read_some(std::span(&buffer, 1));
    if (got && *got > 0) continue;
    REQUIRE_FALSE(got.has_value());
    CHECK_MESSAGE(got.error().code == Condition::peer_gone, text(got));
    return;
  }
}

/// What open() allocates and starts is refused one after the other. `arm(n)` refuses number n.
template <class S, class Arm>
std::uint64_t sweep_open(Guest& guest, unsigned channels, bool other, std::uint64_t step,
                         std::initializer_list<int> errors, Arm&& arm) {
  std::uint64_t injected = 0;
  for (std::uint64_t at = 0;; at += step) {
    CAPTURE(at);
    CAPTURE(channels);
    CAPTURE(other);
    REQUIRE(at < 3000);
    const Leftovers before;
    {
      auto links = memory_links(channels, 1 << 16);  // nobody reads
      S::prepare(links);
      std::optional<typename S::Object> object;
      const Opening opening = attempt([&] { return arm(at); },
                                      [&]() -> Result<void> {
                                        auto opened = S::open(guest, std::move(S::own(links)), other);
                                        if (!opened) return std::unexpected(opened.error());
                                        object.emplace(std::move(*opened));
                                        return {};
                                      });
      if (!opening.injected) {
        REQUIRE_MESSAGE(opening.result.has_value(), text(opening.result));
        S::use(guest, *object);
        break;
      }
      ++injected;
      count_fault();
      CHECK_FALSE(opening.threw);
      if (object) {
        // Something that can be done without.
        S::use(guest, *object);
      } else if (!opening.threw) {
        const Error& error = opening.result.error();
        CHECK_MESSAGE(error.stage == Stage::setup, text(error));
        CHECK_MESSAGE(
            std::ranges::any_of(errors,
                                [&](int each) { return error.code == std::error_code(each, std::system_category()); }),
            text(error));
        CHECK(error.op[0] != '\0');
      }
      object.reset();
      if (!opening.result || opening.threw)
        for (MemoryTransport& peer : S::peers(links)) check_cut(peer);
    }
    CHECK(before.no_thread());
    CHECK(before.no_descriptor());
  }
  return injected;
}

template <class S>
void sweep_memory() {
  const Watchdog watchdog("allocation sweep", 280s);
  Guest guest;
  // A sanitizer gives memory back to the system each time, and makes a sweep long.
  const bool sanitized = live_bytes() == 0;
  const std::uint64_t step = sanitized && !full() ? 7 : 1;
  const auto once = [](std::uint64_t at) { return std::make_unique<FailAllocation>(at, Shortage::once); };
  const auto on = [](std::uint64_t at) { return std::make_unique<FailAllocation>(at, Shortage::from_then_on); };
  // pthread_create() says EAGAIN where it gets no memory.
  const std::initializer_list<int> errors = {ENOMEM, EAGAIN};
  std::uint64_t injected = 0;
  const auto all = [&](unsigned channels, bool other) {
    injected += sweep_open<S>(guest, channels, other, step, errors, once);
    injected += sweep_open<S>(guest, channels, other, step, errors, on);
  };
  all(5, false);  // what the system keeps of threads is there now
  const Leftovers before;
  for (const unsigned channels : {1u, 2u, 5u})
    for (const bool other : {false, true}) all(channels, other);
  CHECK(before.bytes() < 32 * 1024);
  CHECK(injected > 0);
}

template <class S>
void sweep_threads() {
  const Watchdog watchdog("thread sweep");
  Guest guest;
  for (const unsigned channels : {1u, 2u, 7u})
    for (const bool other : {false, true}) {
      const std::uint64_t injected = sweep_open<S>(guest, channels, other, 1, {EAGAIN},
                                                   [](std::uint64_t at) { return std::make_unique<FailThread>(at); });
      CHECK(injected >= channels);
    }
}

/// Clang's ThreadSanitizer brings an operator new that does not fail.
const doctest::skip needs_failing_new(under_tsan);

}  // namespace

TEST_CASE_TEMPLATE("A sender that gets no memory says so and leaves nothing behind" * needs_failing_new, S,
                   SenderSide<NoComp, ZeroPagesNone>, SenderSide<NoComp, ZeroPagesLegacy>,
                   SenderSide<NoComp, ZeroPagesMultifd>, SenderSide<Zlib, ZeroPagesNone>,
                   SenderSide<Zlib, ZeroPagesLegacy>, SenderSide<Zlib, ZeroPagesMultifd>,
                   SenderSide<Zstd, ZeroPagesNone>, SenderSide<Zstd, ZeroPagesLegacy>,
                   SenderSide<Zstd, ZeroPagesMultifd>, AnySenderSide) {
  sweep_memory<S>();
}

TEST_CASE_TEMPLATE("A receiver that gets no memory says so and leaves nothing behind" * needs_failing_new, S,
                   ReceiverSide<NoComp>, ReceiverSide<Zlib>, ReceiverSide<Zstd>, AnyReceiverSide) {
  sweep_memory<S>();
}

TEST_CASE_TEMPLATE("A sender or receiver that gets no thread says so and leaves nothing behind", S,
                   SenderSide<NoComp, ZeroPagesNone>, SenderSide<Zlib, ZeroPagesLegacy>,
                   SenderSide<Zstd, ZeroPagesMultifd>, ReceiverSide<NoComp>, ReceiverSide<Zlib>, ReceiverSide<Zstd>) {
  sweep_threads<S>();
}

TEST_CASE("A map of RAM blocks, or of their pages, for which there is no memory says so and is as it was" *
          needs_failing_new) {
  std::uint64_t injected = 0;
  for (std::uint64_t at = 0, tries = 1; tries > 0 && at < 20; ++at) {
    CAPTURE(at);
    Guest guest;
    Block third(page);
    const auto add = [&] {
      return guest.map.add("0000:00:03.0/another name of that length, longer than the room", third.bytes());
    };
    Result<BlockId> block;
    Result<ReceivedPages> received = std::unexpected(Error{});
    bool threw = false;
    {
      const FailAllocation short_of_memory(at);
      try {
        block = add();
        if (block) received = ReceivedPages::create(guest.map);
      } catch (const std::bad_alloc&) {
        threw = true;
      }
      tries = short_of_memory.happened();
    }
    injected += tries;
    CHECK_FALSE(threw);
    const std::error_code none(ENOMEM, std::system_category());
    CHECK((tries == 0 || code_of(block) == none || code_of(received) == none));
    CHECK(guest.map.blocks().size() == (block ? 3 : 2));
    if (!block) CHECK(add().has_value());
    if (tries == 0) CHECK(received.has_value());
  }
  CHECK(injected >= 4);  // the name, the list of blocks; the bits, their list
}

TEST_CASE("Device state for which there is no memory is refused, and the sender goes on" * needs_failing_new) {
  const Watchdog watchdog("device state without memory");
  Guest guest;
  auto links = memory_links(1, 1 << 16);
  auto tx = Sender<MemoryTransport, NoComp, ZeroPagesNone>::open(guest.map, std::move(links.sender));
  REQUIRE(tx.has_value());
  const Bytes state(1000);
  Result<void> queued;
  {
    const FailAllocation short_of_memory(0);
    queued = tx->queue_device_state({"vfio", 0, state});
  }
  CHECK(code_of(queued) == std::error_code(ENOMEM, std::system_category()));
  CHECK(tx->queue_device_state({"vfio", 0, state}).has_value());
  CHECK(tx->close_channels().has_value());
}

TEST_CASE("A channel that gets no memory for device state says which channel and packet" * needs_failing_new) {
  const Watchdog watchdog("device state without memory, received");
  Guest guest;
  auto links = memory_links(1, 1 << 16);
  RawStream stream;
  stream.hello(0).packet({.zero = {0}}).device_state(100, 100);
  REQUIRE(write_all(links.sender[0], std::span<const std::byte>(stream.bytes())).has_value());
  std::unique_ptr<FailAllocation> short_of_memory;  // in force in the thread that makes it
  auto rx = Receiver<MemoryTransport, NoComp>::open(
      guest.map, std::move(links.receiver),
      {.on_device_state = {.take = [](const DeviceState&) { return Result<void>{}; }},
       .thread_hook = [&](const ThreadInfo&) { short_of_memory = std::make_unique<FailAllocation>(0); }});
  REQUIRE(rx.has_value());
  const auto finished = rx->finish();
  REQUIRE(code_of(finished) == std::error_code(ENOMEM, std::system_category()));
  CHECK(finished.error().stage == Stage::read);
  CHECK(finished.error().channel == 0);
  CHECK(finished.error().packet == 1);
}
