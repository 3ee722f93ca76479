// SPDX-License-Identifier: MIT
//
// LazyMemory when something goes wrong: fetchers that are lost and come back, answers that are wrong, errors that are final,
// cancel() at any moment.
#include <doctest/doctest.h>

#include "unit/postcopy/lazy_guest.hpp"

using namespace multifd;
using namespace multifd::postcopy;
using namespace test;

namespace {

constexpr std::uint64_t mib = std::uint64_t{1} << 20;

std::unique_ptr<LazyMemory> started(const LazyBlock& memory, FakeStore& store, LazyMemoryOptions options = {}) {
  const LazyRegion region = memory.region(0);
  auto lazy = LazyMemory::open(std::move(*Userfaultfd::create()), std::span(&region, 1), store, std::move(options));
  REQUIRE_MESSAGE(lazy.has_value(), text(lazy));
  REQUIRE((*lazy)->start().has_value());
  return std::move(*lazy);
}

/// A thread of the guest's that gives back one page after the other, until this object ends.
struct Balloon {
  explicit Balloon(const LazyBlock& memory)
      : thread([this, &memory] {
          for (std::uint64_t page = 0; !stop; page = (page + 61) % memory.pages(), ++given)
            ::madvise(memory.data() + page * page_size, page_size, MADV_DONTNEED);
        }) {}
  ~Balloon() {
    stop = true;
    thread.join();
  }
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> given{0};
  std::thread thread;
};

}  // namespace

TEST_CASE("Fetchers are lost all the time, and no page is wrong or missing") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("lost fetchers");
  struct Case {
    unsigned fault_threads, workers;
    bool lane;
    Backing backing;
  };
  for (const Case& each : {Case{1, 2, true, Backing::anonymous}, Case{2, 2, true, Backing::shared_minor},
                           Case{1, 2, false, Backing::anonymous}, Case{2, 0, true, Backing::anonymous}}) {
    CAPTURE(each.workers);
    CAPTURE(each.lane);
    const auto memory = LazyBlock::create(each.backing, 8 * mib);
    FakeStore store({8 * mib}, {.slowest = 20us,
                                .lost_after = each.workers == 0 ? 60u : 15u,
                                .no_open = 200us,
                                .together = each.fault_threads == 1 ? 32 * page_size : 0});
    const auto lazy = started(*memory, store,
                              {.fault_threads = each.fault_threads, .workers = each.workers, .urgent_lane = each.lane});
    std::atomic<std::uint64_t> wrong{0};
    std::vector<std::thread> guest;
    for (unsigned i = 0; i < 3; ++i)
      guest.emplace_back([&, i] { wrong += read_at_random(*memory, store, 0, quick() ? 100 : 300, i); });
    for (std::thread& thread : guest) thread.join();
    CHECK(wrong == 0);
    if (each.workers > 0) {
      const auto done = lazy->wait(no_hang);
      CHECK_MESSAGE(done.has_value(), text(done));
      CHECK(wrong_pages(*memory, store, 0) == 0);
    }
    CHECK(lazy->stats().lost_fetchers > 0);
    CHECK(store.lost > 0);
  }
}

TEST_CASE("A request that fails because all is over leaves nothing to wait for") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("a request that fails at the end");
  /// Ends the LazyMemory from inside of its first request, which fails then.
  struct Ending final : PageStore {
    struct Fetcher final : PageFetcher {
      explicit Fetcher(Ending& store) : of(store) {}
      unsigned window() const noexcept override { return 2; }
      void cancel() noexcept override {}
      Result<void> do_ask(const PageRange&) noexcept override {
        while (of.lazy.load() == nullptr) std::this_thread::yield();
        of.lazy.load()->cancel();
        return fail(Errc::cancelled, Stage::write, "ask");
      }
      Result<FetchedPages> do_take() noexcept override { return fail(Errc::cancelled, Stage::read, "take"); }
      Ending& of;
    };
    std::span<const StoreBlock> blocks() const noexcept override { return {&block, 1}; }
    std::size_t page_bytes() const noexcept override { return 4096; }
    bool may_return(const Error&) const noexcept override { return true; }
    void cancel() noexcept override {}
    Result<std::unique_ptr<PageFetcher>> do_open(FetchKind) noexcept override {
      return std::make_unique<Fetcher>(*this);
    }
    StoreBlock block{"block0", mib};
    std::atomic<LazyMemory*> lazy = nullptr;
  } store;
  const auto memory = LazyBlock::create(Backing::anonymous, mib);
  const LazyRegion region = memory->region(0);
  auto lazy = LazyMemory::open(std::move(*Userfaultfd::create()), std::span(&region, 1), store, {.workers = 1});
  REQUIRE_MESSAGE(lazy.has_value(), text(lazy));
  store.lazy = lazy->get();
  REQUIRE((*lazy)->start().has_value());
  const auto done = (*lazy)->wait(no_hang);
  REQUIRE_FALSE(done.has_value());
  CHECK(done.error().code == Errc::cancelled);
}

TEST_CASE("Without any connection the guest runs on what it has, and is told of it; what it waits for comes later") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("paused");
  for (const unsigned workers : {0u, 2u}) {
    const auto memory = LazyBlock::create(Backing::anonymous, 4 * mib);
    FakeStore store({4 * mib}, {.zero_of = 0});
    std::mutex mutex;
    std::vector<LazyMemoryStatus> told;
    const auto lazy =
        started(*memory, store, {.workers = workers, .on_event = [&](const LazyMemoryEvent& event) {
                                   const std::lock_guard held(mutex);
                                   CHECK((event.error != nullptr) == (event.status == LazyMemoryStatus::paused));
                                   told.push_back(event.status);
                                 }});
    store.hold(true);
    REQUIRE(eventually([&] { return lazy->status() != LazyMemoryStatus::opened; }));
    std::thread first([&] { static_cast<void>(memory->first_word(1)); });
    REQUIRE(eventually([&] { return lazy->stats().faults_fetched > 0 || memory->resident() > 0; }));
    store.disconnect(true);
    std::atomic<bool> there{false};
    std::thread guest([&] {
      CHECK(memory->right(store, 0, 900));
      there = true;
    });
    // A lane that nobody uses is not known to be lost; now somebody does.
    REQUIRE(
        eventually([&] { return lazy->status() == LazyMemoryStatus::paused || lazy->stats().remaining_pages == 0; }));
    store.hold(false);
    store.disconnect(false);
    first.join();
    guest.join();
    CHECK(there);
    for (std::uint64_t page = 0; page < memory->pages(); ++page) static_cast<void>(memory->first_word(page));
    const auto done = lazy->wait(no_hang);
    CHECK_MESSAGE(done.has_value(), text(done));
    const std::lock_guard held(mutex);
    REQUIRE(told.size() >= 2);
    CHECK(told.front() == LazyMemoryStatus::active);
    CHECK(told.back() == LazyMemoryStatus::complete);
    for (std::size_t i = 1; i + 1 < told.size(); ++i)
      CHECK(told[i] == (i % 2 == 1 ? LazyMemoryStatus::paused : LazyMemoryStatus::active));
  }
}

TEST_CASE("Connections come and go at random moments") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("random losses");
  const auto memory = LazyBlock::create(Backing::anonymous, 16 * mib);
  FakeStore store({16 * mib}, {.slowest = 300us});
  const auto lazy = started(*memory, store, {.fault_threads = 2});
  std::atomic<std::uint64_t> wrong{0};
  std::thread guest([&] { wrong += read_at_random(*memory, store, 0, 400, 1); });
  Rng rng(seed());
  for (unsigned i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 3000)));  // the moments are what is random here
    store.disconnect(i % 2 == 0);
  }
  store.disconnect(false);
  guest.join();
  const auto done = lazy->wait(no_hang);
  CHECK_MESSAGE(done.has_value(), text(done));
  CHECK(wrong == 0);
  CHECK(wrong_pages(*memory, store, 0) == 0);
}

TEST_CASE(
    "After a final error threads of the guest go on waiting, beyond the LazyMemory's end, and see no wrong byte") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("final error");
  const auto memory = LazyBlock::create(Backing::anonymous, 4 * mib);
  FakeStore store({4 * mib},
                  {.zero_of = 0, .final_error = std::error_code(EIO, std::system_category()), .final_after = 3});
  const LazyRegion region = memory->region(0);
  auto fd = Userfaultfd::create();
  const auto kept = Userfaultfd::adopt(::dup(fd->native_handle()));
  std::atomic<int> status{-1};
  auto lazy = LazyMemory::open(std::move(*fd), std::span(&region, 1), store,
                               {.workers = 0, .on_event = [&](const LazyMemoryEvent& event) {
                                  if (event.error != nullptr) status = static_cast<int>(event.status);
                                }});
  REQUIRE((*lazy)->start().has_value());
  std::atomic<std::uint64_t> read{0};
  std::thread guest([&] {
    for (std::uint64_t page = 0; page < 10; ++page) {
      CHECK(memory->first_word(page) == store.word(0, page));
      ++read;
    }
  });
  CHECK(code_of((*lazy)->wait(no_hang)) == std::errc::io_error);
  CHECK(code_of((*lazy)->wait(0ms)) == std::errc::io_error);
  CHECK(status == static_cast<int>(LazyMemoryStatus::failed));
  const std::uint64_t last = read;
  CHECK(last < 10);
  lazy->reset();
  CHECK(read == last);
  // Who has kept the descriptor can still serve it.
  std::vector<std::byte> page(page_size);
  for (std::uint64_t i = last; i < 10; ++i) {
    const std::uint64_t word = store.word(0, i);
    for (std::size_t at = 0; at < page_size; at += 8) std::memcpy(&page[at], &word, 8);
    CHECK(kept->copy(region.address + i * page_size, page, page_size).has_value());
  }
  guest.join();
  CHECK(read == 10);
}

TEST_CASE("Answers with other pages than were asked for are an error, and nothing of them is placed") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("wrong answers");
  using Offsets = std::vector<std::uint64_t>;
  using Bytes = std::vector<std::byte>;
  const std::function<void(Offsets&, Bytes&, PageRange&)> wrong[] = {
      [](Offsets&, Bytes&, PageRange& range) { range.offset += page_size; },
      [](Offsets& offsets, Bytes&, PageRange&) { offsets.back() += page_size * 1000; },
      [](Offsets& offsets, Bytes&, PageRange&) { offsets.back() += 1; },
      [](Offsets& offsets, Bytes& bytes, PageRange&) {
        offsets.push_back(offsets.back());
        bytes.resize(bytes.size() + page_size);
      },
      [](Offsets&, Bytes& bytes, PageRange&) { bytes.resize(bytes.size() - 1); },
      [](Offsets& offsets, Bytes&, PageRange&) { offsets.pop_back(); },
  };
  for (const auto& spoil : wrong) {
    const auto memory = LazyBlock::create(Backing::anonymous, mib);
    FakeStore store({mib}, {.zero_of = 0, .spoil = spoil});
    const auto lazy = started(*memory, store);
    CHECK(code_of(lazy->wait(no_hang)) == Errc::unasked_pages);
    CHECK(lazy->status() == LazyMemoryStatus::failed);
    CHECK(memory->resident() == 0);
  }
}

TEST_CASE("cancel() ends also what waits for a guest that gives memory back, whose event nobody reads any more") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("cancelled balloon");
  for (int round = 0; round < (quick() ? 20 : 100); ++round) {
    const auto memory = LazyBlock::create(Backing::anonymous, 8 * mib);
    FakeStore store({8 * mib}, {.zero_of = 0});
    store.hold(true);  // so that there is something to cancel
    auto lazy = started(*memory, store, {.workers = 2, .worker_nice = 0});
    Balloon balloon(*memory);
    CHECK(eventually([&] { return lazy->stats().removed_pages > 0; }));
    store.hold(false);
    lazy->cancel();
    lazy.reset();  // closes the userfaultfd, and whoever waits goes on
  }
}

TEST_CASE("A guest that gives memory back while all is completed waits for nobody") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("completed balloon");
  for (int round = 0; round < (quick() ? 20 : 100); ++round) {
    const auto memory = LazyBlock::create(Backing::anonymous, 2 * mib);
    FakeStore store({2 * mib}, {.zero_of = 0});
    const auto lazy = started(*memory, store, {.workers = 2, .worker_nice = 0});
    Balloon balloon(*memory);
    CHECK(lazy->wait(no_hang).has_value());
    const std::uint64_t before = balloon.given;
    CHECK(eventually([&] { return balloon.given > before + 2; }));
  }
}

TEST_CASE("cancel() ends everything at any moment") {
  if (!have_userfaultfd()) return;
  const Watchdog dog("cancels", full() ? 600s : 60s);
  Rng rng(seed());
  const unsigned times = full() ? 1000 : 40;
  unsigned complete = 0;
  for (unsigned i = 0; i < times; ++i) {
    CAPTURE(i);
    const auto memory = LazyBlock::create(Backing::anonymous, 2 * mib);
    FakeStore store(
        {2 * mib},
        {.slowest = 100us, .lost_after = i % 3 == 0 ? 10u : 0u, .no_open = std::chrono::microseconds(below(rng, 500))});
    if (i % 5 == 4) store.disconnect(true);
    auto lazy = started(*memory, store,
                        {.fault_threads = 1 + i % 2, .workers = i % 4 == 3 ? 0u : 2u, .urgent_lane = i % 4 != 2});
    std::atomic<bool> stop{false};
    std::thread guest([&] {
      Rng order(i);
      // Behind a cancel nobody knows what it reads once the descriptor is closed.
      while (!stop) static_cast<void>(memory->first_word(below(order, memory->pages())));
    });
    std::this_thread::sleep_for(std::chrono::microseconds(below(rng, 2000)));  // the moment is what is random here
    std::thread other([&] { lazy->cancel(); });
    lazy->cancel();
    other.join();
    const auto done = lazy->wait(no_hang);
    if (done)
      ++complete;
    else
      CHECK(done.error().code == Errc::cancelled);
    CHECK(lazy->status() == (done ? LazyMemoryStatus::complete : LazyMemoryStatus::cancelled));
    stop = true;
    lazy.reset();
    guest.join();
  }
  CHECK(complete < times);
}
