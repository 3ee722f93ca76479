// SPDX-License-Identifier: MIT
#include "multifd/postcopy/lazy_memory.hpp"

#include <doctest/doctest.h>

#include "support/allocation_count.hpp"
#include "unit/postcopy/lazy_guest.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

constexpr std::uint64_t mib = std::uint64_t{1} << 20;

std::unique_ptr<LazyMemory> opened(const std::vector<LazyRegion>& regions, FakeStore& store,
                                   LazyMemoryOptions options = {}) {
  auto fd = Userfaultfd::create();
  REQUIRE_MESSAGE(fd.has_value(), text(fd));
  auto lazy = LazyMemory::open(std::move(*fd), regions, store, std::move(options));
  REQUIRE_MESSAGE(lazy.has_value(), text(lazy));
  return std::move(*lazy);
}

}  // namespace

TEST_CASE("Guest threads read right bytes from each kind of memory while the background fetches the rest") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("lazy memory");
  const HugePages huge(16);
  for (const Backing backing :
       {Backing::anonymous, Backing::shared_missing, Backing::shared_minor, Backing::huge, Backing::huge_minor}) {
    CAPTURE(name_of(backing));
    const auto memory = LazyBlock::create(backing, 8 * mib);
    if (!memory) {
      MESSAGE("left out, no memory of that kind: ", name_of(backing));
      continue;
    }
    for (const bool lane : {true, false}) {
      CAPTURE(lane);
      const auto again = LazyBlock::create(backing, 8 * mib);
      if (!again) {  // another test has taken the large pages meanwhile
        MESSAGE("left out, no memory of that kind: ", name_of(backing));
        continue;
      }
      FakeStore store({8 * mib}, {.zero_of = 4, .slowest = 100us});
      const auto lazy = opened({again->region(0)}, store, {.fault_threads = 2, .urgent_lane = lane});
      REQUIRE(lazy->start().has_value());
      std::atomic<std::uint64_t> wrong{0};
      std::vector<std::thread> guest;
      for (unsigned i = 0; i < 3; ++i)
        guest.emplace_back([&, i] { wrong += read_at_random(*again, store, 0, 500, i); });
      for (std::thread& each : guest) each.join();
      CHECK(wrong == 0);
      const auto done = lazy->wait(no_hang);
      CHECK_MESSAGE(done.has_value(), text(done));
      CHECK(lazy->status() == LazyMemoryStatus::complete);
      CHECK(lazy->stats().remaining_pages == 0);
      CHECK(wrong_pages(*again, store, 0) == 0);
    }
  }
}

TEST_CASE("Memory grows by pages that are not zero and by what was touched; untouched zero pages stay out of it") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("memory growth");
  for (const Backing backing : {Backing::anonymous, Backing::shared_missing, Backing::shared_minor}) {
    CAPTURE(name_of(backing));
    const auto memory = LazyBlock::create(backing, 4 * mib);
    FakeStore store({4 * mib}, {.zero_of = 2});
    std::uint64_t not_zero = 0;
    std::vector<std::uint64_t> zeros;
    for (std::uint64_t page = 0; page < memory->pages(); ++page)
      store.word(0, page) != 0 ? void(++not_zero) : zeros.push_back(page);
    const auto lazy = opened({memory->region(0)}, store);
    REQUIRE(lazy->start().has_value());
    for (std::size_t i = 0; i < 10; ++i)
      CHECK(memory->first_word(zeros[i]) == 0);  // asked for while pages come, or later
    REQUIRE(lazy->wait(no_hang).has_value());
    CHECK(memory->resident() == not_zero + 10);
    CHECK(memory->first_word(zeros[10]) == 0);  // ordinary memory: nobody serves it any more
    CHECK(memory->resident() == not_zero + 11);
    CHECK(eventually([&] { return lazy->stats().zero_pages + 10 >= zeros.size(); }));
  }
}

TEST_CASE("Only what is said to be missing is fetched; the rest is the guest's own, also where it is empty") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("missing pages");
  for (const Backing backing : {Backing::anonymous, Backing::shared_minor}) {
    CAPTURE(name_of(backing));
    const auto memory = LazyBlock::create(backing, 256 * page_size);
    FakeStore store({256 * page_size}, {.zero_of = 0});
    store.keep_log = true;
    std::vector<std::uint64_t> missing(4);
    for (std::uint64_t page = 0; page < 256; page += 2) missing[page / 64] |= std::uint64_t{1} << page % 64;
    for (std::uint64_t page = 1; page < 256; page += 4)  // every other one of those that are not missing
      std::memset(memory->data() + page * page_size, 9, page_size);
    const auto lazy = opened({memory->region(0)}, store, {.workers = 1, .missing = {missing}});
    CHECK(lazy->stats().remaining_pages == 128);
    std::vector<std::uint64_t> left(4);
    lazy->missing(BlockId{0}, left);
    CHECK(left == missing);
    REQUIRE(lazy->start().has_value());
    CHECK(memory->first_word(3) == 0);
    CHECK(memory->first_word(1) == 0x0909'0909'0909'0909);
    REQUIRE(lazy->wait(no_hang).has_value());
    for (std::uint64_t page = 0; page < 256; ++page)
      CHECK(memory->first_word(page) == (page % 2 == 0   ? store.word(0, page)
                                         : page % 4 == 1 ? 0x0909'0909'0909'0909
                                                         : 0));
    for (const auto& [kind, range] : store.log()) CHECK(range.bytes == page_size);
    left.assign(4, 0);
    lazy->missing(BlockId{0}, left);
    CHECK(left == std::vector<std::uint64_t>(4));
  }
}

TEST_CASE(
    "Faults alone fetch nothing but what they ask for, in order, and what was recorded is fetched first the next "
    "time") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("record");
  const std::vector<std::uint64_t> touched{7, 700, 8, 9, 3, 7, 512, 511, 9};
  const std::vector<PageRange> expected{
      {BlockId{0}, 7 * page_size, page_size},     {BlockId{0}, 700 * page_size, page_size},
      {BlockId{0}, 8 * page_size, 2 * page_size}, {BlockId{0}, 3 * page_size, page_size},
      {BlockId{0}, 512 * page_size, page_size},   {BlockId{0}, 511 * page_size, page_size}};
  std::vector<PageRange> recorded;
  std::uint64_t zeros = 0;
  for (const std::uint64_t page : {7u, 700u, 8u, 9u, 3u, 512u, 511u}) zeros += word_of(0, page, 2) == 0;
  {
    const auto memory = LazyBlock::create(Backing::anonymous, 4 * mib);
    FakeStore store({4 * mib}, {.zero_of = 2});
    const auto lazy = opened({memory->region(0)}, store, {.workers = 0, .record = true});
    REQUIRE(lazy->start().has_value());
    for (const std::uint64_t page : touched) CHECK(memory->right(store, 0, page));
    CHECK(store.requests == 7);
    CHECK(store.urgent_requests == 7);
    CHECK(memory->resident() == 7);
    recorded = lazy->recorded().value();
    CHECK(recorded == expected);
    CHECK(code_of(lazy->wait(0ms)) == Errc::timed_out);
    CHECK(eventually([&] { return lazy->latency().count() == 7; }));
  }
  {
    const auto memory = LazyBlock::create(Backing::anonymous, 4 * mib);
    FakeStore store({4 * mib}, {.zero_of = 2});
    store.keep_log = true;
    const auto lazy = opened({memory->region(0)}, store, {.workers = 1, .prefetch = recorded});
    REQUIRE(lazy->start().has_value());
    REQUIRE(lazy->wait(no_hang).has_value());
    const auto log = store.log();
    REQUIRE(log.size() > expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(log[i].second == expected[i]);
    std::uint64_t not_zero = 0;
    for (std::uint64_t page = 0; page < memory->pages(); ++page) not_zero += store.word(0, page) != 0;
    CHECK(memory->resident() == not_zero + zeros);  // a listed zero page is placed, so that it does not fault again
  }
}

TEST_CASE("What lies behind a fault comes before the rest") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("neighbours");
  const auto memory = LazyBlock::create(Backing::anonymous, 8 * mib);
  FakeStore store({8 * mib}, {.zero_of = 0, .window = 1});
  store.keep_log = true;
  store.hold(true);
  const auto lazy = opened({memory->region(0)}, store, {.workers = 1, .neighbours = 5});
  REQUIRE(lazy->start().has_value());
  REQUIRE(eventually([&] { return store.requests == 1; }));  // the worker's first, in order of addresses
  std::thread guest([&] { CHECK(memory->right(store, 0, 1500)); });
  REQUIRE(eventually([&] { return store.requests == 2; }));
  store.hold(false);
  guest.join();
  REQUIRE(lazy->wait(no_hang).has_value());
  const auto log = store.log();
  CHECK(log[1].first == FetchKind::urgent);
  CHECK(log[2].second == PageRange{BlockId{0}, 1501 * page_size, 5 * page_size});
}

TEST_CASE("What fetching a page brings near is placed behind it, unless only what is touched is wanted or noted") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("together");
  constexpr std::uint64_t frame = 64;
  for (const auto& [workers, record] : {std::pair{1u, false}, {0u, false}, {1u, true}}) {
    CAPTURE(workers);
    const bool alone = workers == 0 || record;
    const auto memory = LazyBlock::create(Backing::anonymous, 8 * mib);
    FakeStore store({8 * mib}, {.zero_of = 0, .together = frame * page_size});
    store.hold_background(true);
    const auto lazy = opened({memory->region(0)}, store, {.workers = workers, .neighbours = 0, .record = record});
    REQUIRE(lazy->start().has_value());
    CHECK(memory->right(store, 0, 1500));
    if (!alone) REQUIRE(eventually([&] { return lazy->stats().background_pages == frame - 1; }));
    for (std::uint64_t page = 1472; page < 1472 + frame; ++page) CHECK(memory->right(store, 0, page));
    CHECK(eventually([&] { return lazy->stats().urgent_pages == (alone ? frame : 1); }));
    CHECK(memory->resident() == frame);
    // The page, and what lies on both sides of it.
    CHECK(store.urgent_requests == (alone ? frame : 3));
    store.hold_background(false);
    if (workers > 0) CHECK(lazy->wait(no_hang).has_value());
  }
}

TEST_CASE("Memory that the guest gives back is zero from then on, and never fetched again") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("removal");
  const auto memory = LazyBlock::create(Backing::anonymous, 4 * mib);
  FakeStore store({4 * mib}, {.zero_of = 0, .slowest = 200us});
  store.keep_log = true;
  const auto lazy = opened({memory->region(0)}, store, {.fault_threads = 2, .workers = 0});
  REQUIRE(lazy->start().has_value());
  for (std::uint64_t page = 0; page < 64; ++page) CHECK(memory->right(store, 0, page));
  // Half of it is there, half was never fetched.
  REQUIRE(::madvise(memory->data() + 32 * page_size, 64 * page_size, MADV_DONTNEED) == 0);
  const std::uint64_t before = store.requests;
  for (std::uint64_t page = 32; page < 96; ++page) CHECK(memory->first_word(page) == 0);
  CHECK(store.requests == before);
  CHECK(lazy->stats().removed_pages == 64);
  CHECK(memory->right(store, 0, 31));
  CHECK(memory->right(store, 0, 96));
  std::memset(memory->data() + 40 * page_size, 5, page_size);
  CHECK(memory->first_word(40) == 0x0505'0505'0505'0505);
  // All that is left is given back: there is nothing to fetch any more.
  REQUIRE(::madvise(memory->data() + 97 * page_size, 4 * mib - 97 * page_size, MADV_DONTNEED) == 0);
  CHECK_MESSAGE(lazy->wait(no_hang).has_value(), lazy->stats().remaining_pages);
  CHECK(memory->first_word(1000) == 0);
}

TEST_CASE("A balloon that works while pages come never finds an old page where it has given memory back") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("balloon");
  const auto memory = LazyBlock::create(Backing::anonymous, 16 * mib);
  FakeStore store({16 * mib}, {.zero_of = 8, .slowest = 50us});
  const auto lazy = opened({memory->region(0)}, store, {.fault_threads = 2, .workers = 2});
  REQUIRE(lazy->start().has_value());
  Rng rng(seed());
  std::vector<bool> given(memory->pages());
  std::uint64_t wrong = 0;
  for (unsigned i = 0; i < 60; ++i) {
    const std::uint64_t first = below(rng, memory->pages() - 64);
    const std::uint64_t count = 1 + below(rng, 64);
    REQUIRE(::madvise(memory->data() + first * page_size, count * page_size, MADV_DONTNEED) == 0);
    for (std::uint64_t page = first; page < first + count; ++page) given[page] = true;
    for (unsigned k = 0; k < 16; ++k) {
      const std::uint64_t page = k < 8 ? first + below(rng, count) : below(rng, memory->pages());
      wrong += memory->first_word(page) != (given[page] ? 0 : store.word(0, page));
    }
  }
  REQUIRE(lazy->wait(no_hang).has_value());
  for (std::uint64_t page = 0; page < memory->pages(); ++page)
    wrong += memory->first_word(page) != (given[page] ? 0 : store.word(0, page));
  CHECK(wrong == 0);
}

TEST_CASE("Several regions of several blocks, in pieces and units of several pages") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("regions");
  const auto first = LazyBlock::create(Backing::anonymous, 2 * mib);
  const auto second = LazyBlock::create(Backing::shared_missing, 2 * mib);
  FakeStore store({4 * mib, 2 * mib}, {.zero_of = 3});
  LazyRegion low = first->region(0);
  low.bytes = mib;
  LazyRegion high = low;
  high.address += mib;
  high.offset = 3 * mib;
  const auto lazy = opened({high, second->region(1, 64 * 1024), low}, store);
  REQUIRE(lazy->start().has_value());
  CHECK(read_at_random(*second, store, 1, 100, 1) == 0);
  REQUIRE(lazy->wait(no_hang).has_value());
  CHECK(wrong_pages(*second, store, 1) == 0);
  for (std::uint64_t page = 0; page < 256; ++page) {
    CHECK(first->right(store, 0, page));
    CHECK(first->first_word(256 + page) == store.word(0, 768 + page));
  }
}

TEST_CASE("Of what fetching a page brings near, a unit that is several requests is left to the workers") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("mixed units");
  const auto memory = LazyBlock::create(Backing::anonymous, 2 * mib);
  FakeStore store({2 * mib},
                  {.zero_of = 0, .window = 1, .together = 384 * 1024});  // one lies across the regions' border
  store.hold_background(true);
  LazyRegion low = memory->region(0);
  low.bytes = mib;
  LazyRegion high = low;
  high.address += mib;
  high.offset = high.unit_bytes = mib;
  const auto lazy = opened({low, high}, store, {.workers = 1, .neighbours = 0});
  REQUIRE(lazy->start().has_value());
  CHECK(memory->right(store, 0, 200));
  REQUIRE(eventually([&] { return lazy->stats().background_pages == 63; }));
  CHECK(lazy->stats().urgent_pages == 1);
  store.hold_background(false);
  CHECK(lazy->wait(no_hang).has_value());
  CHECK(eventually([&] { return lazy->latency().count() == 1; }));
  CHECK(wrong_pages(*memory, store, 0) == 0);
}

TEST_CASE("Nothing is allocated for pages") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("allocations");
  const auto memory = LazyBlock::create(Backing::anonymous, 8 * mib);
  FakeStore store({8 * mib});
  store.hold(true);
  const auto lazy = opened({memory->region(0)}, store,
                           {.workers = 2, .thread_hook = [](const ThreadInfo&) { test::watch_this_thread(true); }});
  REQUIRE(lazy->start().has_value());
  REQUIRE(eventually([&] { return store.opened == 3 && store.requests >= 2; }));
  std::thread guest([&] { CHECK(read_at_random(*memory, store, 0, 300, 1) == 0); });
  REQUIRE(eventually([&] { return store.urgent_requests == 1; }));
  const std::uint64_t before = test::allocations_of_watched_threads();
  store.hold(false);
  guest.join();
  REQUIRE(lazy->wait(no_hang).has_value());
  CHECK(test::allocations_of_watched_threads() == before);
}

TEST_CASE("Options out of range are refused by name") {
  if (!have_userfaultfd()) return;
  const auto memory = LazyBlock::create(Backing::anonymous, mib);
  FakeStore store({mib});
  const LazyRegion region = memory->region(0);
  const auto refused = [&](LazyMemoryOptions options) {
    const auto made =
        LazyMemory::open(std::move(*Userfaultfd::create()), std::span(&region, 1), store, std::move(options));
    return made ? std::string("opened") : std::string(made.error().op);
  };
  CHECK(refused({.fault_threads = 0}) == "fault_threads");
  CHECK(refused({.fault_threads = 65}) == "fault_threads");
  CHECK(refused({.workers = 65}) == "workers");
  CHECK(refused({.worker_nice = 20}) == "worker_nice");
  CHECK(refused({.workers = 0, .urgent_lane = false}).starts_with("urgent_lane"));
  CHECK(refused({.prefetch = {{BlockId{1}, 0, page_size}}}) == "prefetch");
  CHECK(refused({.prefetch = {{BlockId{0}, 1, ~std::uint64_t{0}}}}) == "prefetch");
  CHECK(refused({.missing = {{1}}}) == "missing");
  CHECK(refused({.missing = {{}, {1}}}) == "missing");
}
