// SPDX-License-Identifier: MIT
//
// Fails I/O operation 0, 1, 2 ... of one side until a migration gets through: whatever fails first is what is
// reported, everything ends, and the next migration over the same memory works.
#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using Faulty = testing::FaultTransport<MemoryTransport>;

namespace {

constexpr unsigned channels = 2;
constexpr std::size_t pages = 200;

enum class Side { none, sender, receiver };

struct Ends {
  Result<void> sending;
  Result<void> receiving;
  std::uint64_t operations = 0;  ///< of the side with the fault
};

const std::error_code injected(EIO, std::system_category());

template <class C>
Ends migrate(const Block& a, const Block& b, Side side, std::uint64_t fail_at) {
  RamMap source, target;
  const auto block = source.add("pc.ram", a.bytes());
  REQUIRE(target.add("pc.ram", b.bytes()).has_value());
  std::atomic<std::uint64_t> operations = 0;
  const auto wrap = [&](std::vector<MemoryTransport> links, Side mine) {
    std::vector<Faulty> result;
    // Parts of 40,000 bytes: some packets take several operations.
    for (auto& link : links) {
      testing::FaultOptions options{.max_io_bytes = 40'000};
      if (mine == side) {
        options.fail_at = fail_at;
        options.operations = &operations;
      }
      result.emplace_back(std::move(link), options);
    }
    return result;
  };
  auto links = memory_links(channels);
  Ends ends;
  {
    auto receiver_links = wrap(std::move(links.receiver), Side::receiver);
    std::thread receiving([&] {
      auto rx = Receiver<Faulty, C>::open(target, std::move(receiver_links));
      ends.receiving = rx ? rx->finish() : std::unexpected(rx.error());
    });
    auto tx = Sender<Faulty, C, ZeroPagesMultifd>::open(source, wrap(std::move(links.sender), Side::sender));
    REQUIRE(tx.has_value());
    for (int round = 0; round < 2 && ends.sending; ++round) {
      if (auto queued = tx->queue_range(*block, 0, a.size()); !queued)
        ends.sending = std::unexpected(queued.error());
      else if (auto synced = tx->sync_and_wait(); !synced)
        ends.sending = std::unexpected(synced.error());
    }
    if (ends.sending) ends.sending = tx->close();
    if (!ends.sending) tx->cancel();
    receiving.join();
  }
  ends.operations = operations;
  return ends;
}

template <class C>
void fail_every_operation(Side side) {
  const Watchdog watchdog("fail every operation", 280s);
  Rng rng(seed());
  Block a(pages * 4096), b(pages * 4096);
  for (std::size_t p = 0; p < pages; ++p) fill_page(a.page(p, 4096), any_fill(rng), rng);
  std::uint64_t at = 0;
  for (;; ++at) {
    CAPTURE(at);
    REQUIRE(at < 2000);
    b.fill(std::byte{0xee});
    const Ends ends = migrate<C>(a, b, side, at);
    if (ends.operations <= at) {  // the fault did not come
      CHECK_MESSAGE(ends.sending.has_value(), text(ends.sending));
      CHECK_MESSAGE(ends.receiving.has_value(), text(ends.receiving));
      break;
    }
    const Result<void>& hit = side == Side::sender ? ends.sending : ends.receiving;
    const Result<void>& other = side == Side::sender ? ends.receiving : ends.sending;
    REQUIRE_FALSE(hit.has_value());
    CHECK_MESSAGE(hit.error().code == injected, text(hit));
    // Before its hello a channel of a receiver has no id.
    CHECK((hit.error().channel < channels || hit.error().channel == no_channel));
    if (!other) CHECK_MESSAGE(other.error().code != injected, text(other));
    if (side == Side::sender) CHECK_FALSE(other.has_value());  // no receiver takes a cut stream for a whole one
  }
  CHECK(a == b);
  CHECK(at > 10);
  MESSAGE("operations that were failed: ", at);
  const Ends again = migrate<C>(a, b, Side::none, 0);
  CHECK(again.sending.has_value());
  CHECK(again.receiving.has_value());
}

}  // namespace

TEST_CASE_TEMPLATE("Every failing operation of a sender is reported as it is", C, NoComp, Zlib, Zstd) {
  fail_every_operation<C>(Side::sender);
}

TEST_CASE_TEMPLATE("Every failing operation of a receiver is reported as it is", C, NoComp, Zlib, Zstd) {
  fail_every_operation<C>(Side::receiver);
}
