// SPDX-License-Identifier: MIT
//
// Which bytes of a sender leave without a copy: pages of the guest as they lie, and nothing else. And that a guest that
// writes meanwhile arrives as it is.
#include <doctest/doctest.h>

#include <cstring>
#include <future>
#include <memory>
#include <optional>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "multifd/transport/splice.hpp"
#include "support/drain.hpp"
#include "support/leftovers.hpp"
#include "support/memory.hpp"
#include "support/migrate_guest.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;
using test::MigratingGuest;

namespace {

constexpr std::uint64_t page = 4096;

/// A MemoryTransport that notes what it is told that it need not copy.
struct Noting {
  test::MemoryTransport next;
  std::shared_ptr<std::vector<iovec>> pinned = std::make_shared<std::vector<iovec>>();

  Result<std::size_t> write_some(ConstBuffers buffers) noexcept { return next.write_some(buffers); }
  Result<std::size_t> write_pinned(ConstBuffers buffers) noexcept {
    pinned->insert(pinned->end(), buffers.begin(), buffers.end());
    return next.write_some(buffers);
  }
  Result<std::size_t> read_some(MutableBuffers buffers) noexcept { return next.read_some(buffers); }
  Result<void> finish() noexcept { return next.finish(); }
  void shutdown() noexcept { next.shutdown(); }
  bool pins() const noexcept { return true; }
};
static_assert(HasPinnedWrites<Noting>);

/// Bytes that were pinned of a guest of 256 pages, of which every fourth is zero; all of them are the guest's.
/// `queue(sender, block)` queues some.
template <class C, class From = FromGuest, class Queue>
std::size_t pinned_bytes(Queue queue, Digest digest = Digest::off) {
  const test::Block memory(256 * page);
  for (std::size_t i = 0; i < 256; ++i)
    std::memset(memory.page(i, page).data(), i % 4 == 0 ? 0 : static_cast<int>(i % 251 + 1), page);
  RamMap ram;
  const auto block = ram.add("pc.ram", memory.bytes());
  REQUIRE(block.has_value());
  auto pair = testing::memory_transport_pair(16 << 20);
  std::vector<Noting> links;
  links.push_back({std::move(pair.first)});
  const auto pinned = links[0].pinned;
  auto tx = Sender<Noting, C, ZeroPagesMultifd, From>::open(ram, std::move(links), {.digest = digest});
  REQUIRE_MESSAGE(tx.has_value(), test::text(tx));
  queue(*tx, *block);
  const auto closed = tx->close_channels();
  REQUIRE_MESSAGE(closed.has_value(), test::text(closed));
  for (const iovec& each : *pinned) {
    const auto* const at = static_cast<const std::byte*>(each.iov_base);
    CHECK(at >= memory.data());
    CHECK(at + each.iov_len <= memory.data() + memory.size());
  }
  return total_bytes(*pinned);
}

void queue_all(auto& tx, BlockId block) {
  const auto queued = tx.queue_range(block, 0, 256 * page);
  CHECK_MESSAGE(queued.has_value(), test::text(queued));
}

}  // namespace

TEST_CASE("Pages go out without a copy as they lie in the guest's memory, and nothing else does") {
  const auto all = [](auto& tx, BlockId block) { queue_all(tx, block); };
  CHECK(pinned_bytes<NoComp>(all) == 192 * page);
  CHECK(pinned_bytes<NoComp, FromEither>(all) == 192 * page);
  CHECK(pinned_bytes<NoComp>(all, Digest::on) == 0);
  CHECK(pinned_bytes<Zlib>(all) == 0);
  CHECK(pinned_bytes<Zstd>(all) == 0);
  const auto copies = [](auto& tx, BlockId block) {
    auto buffer = PageBuffer::create();
    REQUIRE(buffer.has_value());
    std::memset(buffer->data(), 5, 2 * page);
    const std::vector<std::uint64_t> offsets = {page, 3 * page};
    const auto queued = tx.queue_copies(block, offsets, offsets.size(), *buffer);
    CHECK_MESSAGE(queued.has_value(), test::text(queued));
  };
  CHECK(pinned_bytes<NoComp, FromCopies>(copies) == 0);
  CHECK(pinned_bytes<NoComp, FromEither>(copies) == 0);
  CHECK(pinned_bytes<NoComp, FromEither>([&](auto& tx, BlockId block) {
          copies(tx, block);
          queue_all(tx, block);
        }) == 192 * page);
}

namespace {

template <class L>
struct StacksOf {
  using Link = L;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

}  // namespace

TEST_CASE("A guest that writes while its pages leave without a copy goes on elsewhere as it was") {
  for (const bool tcp : {true, false})
    for (const bool skip_unchanged : {false, true})
      for (const test::Writes writes : {test::Writes::numbers, test::Writes::a_b_a}) {
        CAPTURE(tcp);
        CAPTURE(skip_unchanged);
        const test::Watchdog watchdog("a migration");
        const test::Leftovers leftovers;
        constexpr std::size_t pages = 8192;
        MigratingGuest here(pages), there(pages);
        here.writes = there.writes = writes;
        here.boot();
        here.run(2048);
        auto listener = Listener::listen(tcp ? Address{.host = "127.0.0.1"}
                                             : Address{.kind = AddressKind::unix_socket,
                                                       .path = "/tmp/multifd-pinned-" + std::to_string(::getpid())},
                                         64);
        REQUIRE_MESSAGE(listener.has_value(), test::text(listener));
        auto taken =
            std::async(std::launch::async, [&] { return migrate_from<StacksOf<FdTransport>>(there, *listener); });
        auto moved = migrate_to<StacksOf<SpliceTransport>>(here, listener->local_address(),
                                                           {.channels = 2,
                                                            .converge = {.rule = FixedRounds(6)},
                                                            .verify = Verify::required,
                                                            .skip_unchanged = skip_unchanged});
        const auto got = taken.get();
        REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
        REQUIRE_MESSAGE(got.has_value(), test::text(got));
        CHECK(moved->pages_verified == pages);
        CHECK(there.runs());
        there.stop();
      }
}
