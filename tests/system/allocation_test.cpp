// SPDX-License-Identifier: MIT
//
// Nothing allocates between open() and the end of close_channels() and finish(): neither the library nor zlib, zstd and xxHash
// under it; and nothing allocates on the way to an error, whichever operation fails. Counted at malloc, in the workers (by
// the thread hook) and in the thread that makes the calls. There is no warm-up: the first packet counts.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdlib>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/compress/zlib.hpp"
#include "multifd/compress/zstd.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/testing/fault_transport.hpp"
#include "support/allocation_count.hpp"
#include "support/links.hpp"
#include "support/memory.hpp"

using namespace multifd;
using namespace test;
using testing::FaultKind;
using testing::FaultOptions;
using testing::FaultTransport;

namespace {

/// Counts the watched threads' allocations while it lives.
class Count {
 public:
  std::uint64_t so_far() const { return allocations_of_watched_threads() - before_; }

 private:
  std::uint64_t before_ = allocations_of_watched_threads();
};

struct Outcome {
  bool opened = false;  ///< both ends; nothing is counted before
  std::uint64_t allocations = 0;
  bool good = true;
};

template <class T, class C, class Z>
Outcome migrate(Links<T> links, Digest digest) {
  const Watchdog watchdog("count allocations");
  Rng rng(seed());
  constexpr std::size_t pages = 600;
  Block source_memory(pages * 4096), target_memory(pages * 4096);
  for (std::size_t p = 0; p < pages; ++p) fill_page(source_memory.page(p, 4096), any_fill(rng), rng);
  RamMap source, target;
  const auto block = source.add("pc.ram", source_memory.bytes());
  REQUIRE(target.add("pc.ram", target_memory.bytes()).has_value());
  std::vector<std::uint64_t> dirty(pages / 64, 0x00ff00ffff00ff11);
  const auto watch = [](const ThreadInfo&) { watch_this_thread(true); };
  // Workers of the sender start at once: hold their bytes back, so that the counting begins before the first one.
  auto gate = std::make_shared<Gate>(false);
  std::vector<GatedTransport<T>> held;
  for (auto& link : links.sender) held.emplace_back(std::move(link), gate);
  auto tx = Sender<GatedTransport<T>, C, Z>::open(source, std::move(held), {.digest = digest, .thread_hook = watch});
  REQUIRE(tx.has_value());
  Result<Receiver<T, C>> rx = std::unexpected(Error{});
  std::thread opening([&] { rx = Receiver<T, C>::open(target, std::move(links.receiver), {.thread_hook = watch}); });
  gate->open();
  opening.join();
  if (!rx) return {};
  Outcome outcome{.opened = true};
  bool& good = outcome.good;
  watch_this_thread(true);
  {
    const Count all;
    const auto on_zero = [](std::uint64_t) {};
    for (int round = 0; round < 3 && good; ++round) {
      good &= tx->queue_range(*block, 0, source_memory.size(), on_zero).has_value();
      good &= tx->push_out().has_value();
      good &= tx->close_epoch_and_wait().has_value();
      good &= tx->queue_page(*block, 4096).has_value();
      good &= tx->close_epoch().has_value();
      if constexpr (HasLiveLevel<C>) good &= tx->set_level(3 + round).has_value();
      tx->set_bandwidth(round == 0 ? 500 << 20 : 0);
      good &= tx->queue_dirty(*block, dirty, 0, on_zero).has_value();
      good &= tx->close_epoch().has_value();
    }
    good &= tx->close_channels().has_value();
    good &= rx->finish().has_value();
    outcome.allocations = all.so_far();
  }
  watch_this_thread(false);
  return outcome;
}

template <class T, class C, class Z>
std::uint64_t allocations_of_a_migration(Links<T> links, Digest digest) {
  const Outcome outcome = migrate<T, C, Z>(std::move(links), digest);
  REQUIRE(outcome.opened);
  CHECK(outcome.good);
  return outcome.allocations;
}

/// Fails operation after operation of one end's first channel, from the first that comes after open() until none is left to
/// fail. Returns how many migrations failed.
template <class C, class Z>
int failures_without_allocation(bool at_sender, FaultKind kind) {
  using T = FaultTransport<MemoryTransport>;
  int failed = 0;
  for (std::uint64_t at = 0;; ++at) {
    CAPTURE(at);
    auto plain = memory_links(2);
    Links<T> links;
    for (std::size_t i = 0; i < 2; ++i) {
      const FaultOptions fails{.fail_at = i == 0 ? at : FaultOptions::never, .kind = kind};
      links.sender.emplace_back(std::move(plain.sender[i]), at_sender ? fails : FaultOptions());
      links.receiver.emplace_back(std::move(plain.receiver[i]), at_sender ? FaultOptions() : fails);
    }
    const Outcome outcome = migrate<T, C, Z>(std::move(links), Digest::on);
    CHECK(outcome.allocations == 0);
    if (outcome.opened && outcome.good) return failed;
    failed += outcome.opened ? 1 : 0;
  }
}

}  // namespace

TEST_CASE("The count counts") {
  watch_this_thread(true);
  std::uint64_t counted = 0;
  {
    const Count all;
    // By malloc, and through pointers that the optimiser must not follow: it may leave out a new with its delete.
    void* volatile by_malloc = std::malloc(100);
    std::vector<int>* volatile by_new = new std::vector<int>(1000);
    std::free(by_malloc);
    delete by_new;
    counted = all.so_far();
  }
  CHECK(counted == 3);
  {
    const Count all;
    std::thread([] {
      int* volatile unwatched = new int;
      delete unwatched;
    }).join();
    counted = all.so_far();
  }
  CHECK(counted >= 1);  // this thread starts the other one; what the other one does is its own
  watch_this_thread(false);
}

TEST_CASE_TEMPLATE("A migration allocates nothing after open", C, NoComp, Zlib, Zstd) {
  CHECK(allocations_of_a_migration<MemoryTransport, C, ZeroPagesNone>(memory_links(3), Digest::off) == 0);
  CHECK(allocations_of_a_migration<MemoryTransport, C, ZeroPagesLegacy>(memory_links(3), Digest::off) == 0);
  CHECK(allocations_of_a_migration<MemoryTransport, C, ZeroPagesMultifd>(memory_links(3), Digest::on) == 0);
  CHECK(allocations_of_a_migration<FdTransport, C, ZeroPagesMultifd>(tcp_links(3), Digest::off) == 0);
}

TEST_CASE("An error allocates nothing on its way to the caller, whichever operation fails") {
  for (const bool at_sender : {true, false})
    for (const FaultKind kind : {FaultKind::fail, FaultKind::cut, FaultKind::end}) {
      CAPTURE(at_sender);
      CAPTURE(static_cast<int>(kind));
      CHECK(failures_without_allocation<NoComp, ZeroPagesMultifd>(at_sender, kind) > 10);
      CHECK(failures_without_allocation<Zlib, ZeroPagesLegacy>(at_sender, kind) > 10);
    }
}
