// SPDX-License-Identifier: MIT
//
// The hand-off with its threads: what it promises must hold under every timing that random delays can find,
// with more workers than cores.
#include "multifd/engine/batch_handoff.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "support/allocation_count.hpp"
#include "support/basics.hpp"

using multifd::PageBatch;
using multifd::engine::BatchHandoff;
using multifd::engine::Work;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t packet_pages = 8;
constexpr auto ignore_waits = [] {};

std::unique_ptr<BatchHandoff> make(unsigned channels, unsigned depth) {
  auto handoff = BatchHandoff::create(channels, depth, packet_pages);
  REQUIRE(handoff);
  return std::move(*handoff);
}

/// Nothing, a few spins, the end of the time slice, or a short sleep: disorder, not waiting for anything.
void random_delay(std::minstd_rand& random) {
  switch (random() % 64) {
    case 0: std::this_thread::sleep_for(std::chrono::microseconds(random() % 200)); break;
    case 1:
    case 2:
    case 3: std::this_thread::yield(); break;
    case 4:
    case 5: {
      volatile unsigned spin = 0;
      for (auto i = random() % 2000; i > 0; --i) spin = spin + 1;
      break;
    }
    default: break;
  }
}

/// What one worker was told to do, as it came.
struct Entry {
  Work::Kind kind;
  std::uint64_t epoch;   ///< of Work
  std::uint64_t serial;  ///< batches: counted by the producer
  std::uint64_t pages;   ///< batches: how many
};

/// A worker that writes down everything. Pages are numbers that count up over all batches, so a batch is
/// known by its first page, and the pages of a batch must follow each other.
struct Recorder {
  std::vector<Entry> log;
  bool intact = true;  ///< every batch held what was put into it

  void run(BatchHandoff& handoff, unsigned channel, std::uint32_t seed) {
    std::minstd_rand random(seed);
    for (;;) {
      random_delay(random);
      const Work work = handoff.take(channel);
      Entry entry{work.kind, work.epoch, 0, 0};
      if (work.kind == Work::Kind::batch) {
        const auto pages = work.batch->offsets();
        intact = intact && !pages.empty() && work.batch->epoch == work.epoch;
        for (std::size_t i = 0; i < pages.size(); ++i) intact = intact && pages[i] == pages[0] + i;
        entry.serial = pages[0];
        entry.pages = pages.size();
        random_delay(random);
        // Still the same after the delay: nobody writes to a batch that a worker holds.
        intact = intact && pages[0] == entry.serial;
        handoff.give_back(work.batch);
      }
      log.push_back(entry);
      if (work.kind == Work::Kind::end || work.kind == Work::Kind::stopped) return;
    }
  }
};

/// The producer's side of the same: `last_page[e]` is where epoch e ended.
struct Produced {
  std::uint64_t pages = 0;
  std::vector<std::uint64_t> epoch_ends;
};

Produced produce(BatchHandoff& handoff, unsigned batches, std::uint32_t seed) {
  std::minstd_rand random(seed);
  Produced produced;
  PageBatch* batch = handoff.first_batch();
  for (unsigned i = 0; i < batches; ++i) {
    random_delay(random);
    const std::size_t count = 1 + random() % packet_pages;
    batch->push_run(produced.pages, count, 1);
    produced.pages += count;
    batch = handoff.put(batch, ignore_waits);
    if (batch == nullptr) return produced;
    if (random() % 32 == 0) handoff.push_out();
    for (auto epochs = random() % 20 == 0 ? random() % 3 + 1 : 0; epochs > 0; --epochs) {
      handoff.close_epoch();
      produced.epoch_ends.push_back(produced.pages);
    }
  }
  handoff.close_epoch();
  produced.epoch_ends.push_back(produced.pages);
  return produced;
}

/// Everything that holds for an orderly run, over the logs of all channels: the rule that was broken, or "".
/// Plain comparisons, because hundreds of thousands of doctest's are slow under a sanitizer.
std::string broken_rule(const std::vector<Recorder>& recorders, const Produced& produced) {
  std::vector<unsigned> seen(produced.pages);
  for (const Recorder& recorder : recorders) {
    if (!recorder.intact) return "a batch holds what was put into it";
    std::uint64_t syncs = 0;
    std::uint64_t next_serial = 0;
    for (std::size_t i = 0; i < recorder.log.size(); ++i) {
      const Entry& entry = recorder.log[i];
      if (entry.kind == Work::Kind::batch) {
        if (entry.epoch != syncs) return "a batch comes after the SYNC of the epoch before and before its own";
        if (entry.epoch >= produced.epoch_ends.size()) return "no batch is of an epoch that never was";
        if (entry.serial < next_serial) return "batches of a channel come in the order of put()";
        next_serial = entry.serial + entry.pages;
        const std::uint64_t start = entry.epoch == 0 ? 0 : produced.epoch_ends[entry.epoch - 1];
        if (entry.serial < start || next_serial > produced.epoch_ends[entry.epoch])
          return "a batch carries the epoch that it was put in";
        for (std::uint64_t page = entry.serial; page < next_serial; ++page) ++seen[page];
      } else if (entry.kind == Work::Kind::close_epoch) {
        if (entry.epoch != syncs) return "SYNCs count up";
        ++syncs;
      } else if (entry.kind != Work::Kind::end || i + 1 != recorder.log.size()) {
        return "the end comes last, in order";
      }
    }
    if (syncs != produced.epoch_ends.size()) return "every channel gets every SYNC";
  }
  for (const unsigned times : seen)
    if (times != 1) return "every page comes out once";
  return "";
}

/// Held workers wait here, before their first take() or with a batch in their hands.
class Hold {
 public:
  void wait() { gate_.wait(false); }
  void release() {
    gate_ = true;
    gate_.notify_all();
  }

 private:
  std::atomic<bool> gate_{false};
};

}  // namespace

TEST_CASE(
    "Every page comes out once, in order within its channel, and every channel gets every SYNC in its "
    "place") {
  for (const unsigned channels : {1u, 2u, 4u, 8u, 16u}) {
    for (const unsigned depth : {2u, 3u, 8u, 16u}) {
      const std::uint32_t seed = channels * 100 + depth;
      CAPTURE(channels);
      CAPTURE(depth);
      CAPTURE(seed);
      const test::Watchdog limit("an orderly run", 120s);
      const auto handoff = make(channels, depth);
      std::vector<Recorder> recorders(channels);
      Produced produced;
      {
        std::vector<std::jthread> threads;
        for (unsigned c = 0; c < channels; ++c)
          threads.emplace_back([&, c] { recorders[c].run(*handoff, c, seed + c); });
        produced = produce(*handoff, 600, seed);
        handoff->end();
      }
      CHECK(broken_rule(recorders, produced) == "");
    }
  }
}

TEST_CASE("A batch put and its epoch closed while the worker polls: the batch still comes before the SYNC") {
  const test::Watchdog limit("short epochs", 120s);
  constexpr std::uint64_t epochs = 10'000;
  const auto handoff = make(2, 4);
  std::atomic<std::uint64_t> late{0};
  std::atomic<std::uint64_t> done{0};
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < 2; ++c) {
    threads.emplace_back([&, c] {
      std::uint64_t syncs = 0;
      for (;;) {
        const Work work = handoff->take(c);
        if (work.kind == Work::Kind::end) return;
        if (work.kind == Work::Kind::close_epoch) {
          ++syncs;
        } else {
          if (work.epoch != syncs) ++late;
          handoff->give_back(work.batch);
        }
        done.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t epoch = 0; epoch < epochs; ++epoch) {
    batch->push(epoch);
    batch = handoff->put(batch, ignore_waits);
    handoff->close_epoch();
    // Workers that are nearly done look again at the moment of the next put().
    if (epoch % 4 != 0)
      for (unsigned spin = 0; spin < 2000 && done.load(std::memory_order_relaxed) < 3 * epoch + 2; ++spin) continue;
  }
  handoff->end();
  threads.clear();
  CHECK(late.load() == 0);
  CHECK(done.load() == 3 * epochs);
}

TEST_CASE("A throttled channel stalls neither the others nor close_epoch()") {
  for (const bool holds_a_batch : {false, true}) {
    for (const unsigned channels : {2u, 4u, 8u}) {
      CAPTURE(holds_a_batch);
      CAPTURE(channels);
      const test::Watchdog limit("putting past a held worker", 120s);
      constexpr unsigned depth = 4;
      const auto handoff = make(channels, depth);
      Hold hold;
      std::atomic<std::uint64_t> taken_by_others{0};
      std::vector<std::uint64_t> syncs(channels);
      std::atomic<std::uint64_t> taken_by_held{0};
      std::vector<std::jthread> threads;
      for (unsigned c = 0; c < channels; ++c) {
        threads.emplace_back([&, c] {
          if (c == 0 && !holds_a_batch) hold.wait();
          for (;;) {
            const Work work = handoff->take(c);
            if (work.kind == Work::Kind::end) return;
            if (work.kind == Work::Kind::close_epoch) ++syncs[c];
            if (work.kind != Work::Kind::batch) continue;
            if (c == 0 && holds_a_batch) hold.wait();
            ++(c == 0 ? taken_by_held : taken_by_others);
            handoff->give_back(work.batch);
          }
        });
      }
      constexpr std::uint64_t batches = 2000;
      constexpr std::uint64_t epochs = 20;
      PageBatch* batch = handoff->first_batch();
      for (std::uint64_t i = 0; i < batches; ++i) {
        batch->push(i);
        batch = handoff->put(batch, ignore_waits);
        if ((i + 1) % (batches / epochs) == 0) handoff->close_epoch();
      }
      // All of that happened although one worker has not moved.
      CHECK(taken_by_held.load() == 0);
      CHECK(taken_by_others + std::uint64_t{channels} * depth >= batches);
      hold.release();
      handoff->end();
      threads.clear();
      CHECK(taken_by_held + taken_by_others == batches);
      for (const std::uint64_t each : syncs) CHECK(each == epochs);
    }
  }
}

TEST_CASE("More busy workers than cores: everything gets through, also when those that are awake are held") {
  const test::Watchdog limit("putting past workers that rest", 120s);
  const unsigned channels = 2 * std::thread::hardware_concurrency() + 3;
  const auto handoff = make(channels, 2);
  Hold hold;
  std::atomic<unsigned> held{0};
  std::atomic<bool> holding{false};
  std::atomic<std::uint64_t> taken{0};
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < channels; ++c) {
    threads.emplace_back([&, c] {
      for (;;) {
        const Work work = handoff->take(c);
        if (work.kind == Work::Kind::end) return;
        if (work.kind != Work::Kind::batch) continue;
        // All but one, whoever comes first: those are the ones that do not rest.
        if (holding && held.fetch_add(1) < channels - 1) hold.wait();
        for (const auto end = std::chrono::steady_clock::now() + 50us; std::chrono::steady_clock::now() < end;) {
        }
        ++taken;
        handoff->give_back(work.batch);
      }
    });
  }
  PageBatch* batch = handoff->first_batch();
  std::uint64_t batches = 0;
  const auto put = [&] {
    batch->push(batches++);
    batch = handoff->put(batch, ignore_waits);
  };
  for (const auto end = std::chrono::steady_clock::now() + 300ms; std::chrono::steady_clock::now() < end;) put();
  holding = true;
  for (unsigned i = 0; i < 500; ++i) put();
  handoff->close_epoch();
  CHECK(taken + 2 * channels >= batches);
  hold.release();
  handoff->end();
  threads.clear();
  CHECK(taken == batches);
}

TEST_CASE("A single channel that moves is enough, however many do not") {
  for (const unsigned channels : {2u, 5u, 8u, 16u}) {
    for (const unsigned depth : {2u, 4u, 16u}) {
      CAPTURE(channels);
      CAPTURE(depth);
      const test::Watchdog limit("putting through the only channel that moves", 120s);
      const auto handoff = make(channels, depth);
      Hold hold;
      std::vector<std::uint64_t> taken(channels);
      std::vector<std::jthread> threads;
      for (unsigned c = 0; c < channels; ++c) {
        threads.emplace_back([&, c] {
          if (c != channels - 1) hold.wait();
          for (;;) {
            const Work work = handoff->take(c);
            if (work.kind == Work::Kind::end) return;
            if (work.kind != Work::Kind::batch) continue;
            ++taken[c];
            handoff->give_back(work.batch);
          }
        });
      }
      PageBatch* batch = handoff->first_batch();
      for (std::uint64_t i = 0; i < 1000; ++i) {
        batch->push(i);
        batch = handoff->put(batch, ignore_waits);
      }
      hold.release();
      handoff->end();
      threads.clear();
      // The others, once released, get at most what was queued then.
      CHECK(taken[channels - 1] + channels * depth >= 1000);
    }
  }
}

TEST_CASE("stop() at any moment ends the producer and every worker") {
  std::minstd_rand random(4711);
  for (int round = 0; round < 200; ++round) {
    const auto channels = static_cast<unsigned>(1 + random() % 8);
    const auto depth = static_cast<unsigned>(2 + random() % 3);
    const auto delay = std::chrono::microseconds(random() % 2 == 0 ? random() % 20 : random() % 1000);
    CAPTURE(round);
    const test::Watchdog limit("a stopped run", 120s);
    const auto handoff = make(channels, depth);
    std::vector<Recorder> recorders(channels);
    bool producer_stopped = false;
    {
      std::vector<std::jthread> threads;
      for (unsigned c = 0; c < channels; ++c)
        threads.emplace_back([&, c] { recorders[c].run(*handoff, c, static_cast<std::uint32_t>(round)); });
      threads.emplace_back([&, seed = static_cast<std::uint32_t>(round)] {
        produce(*handoff, ~0u, seed);  // until put() says so
        producer_stopped = true;
      });
      std::this_thread::sleep_for(delay);
      handoff->stop();
    }
    CHECK(producer_stopped);
    for (const Recorder& recorder : recorders) {
      CHECK(recorder.intact);
      CHECK(recorder.log.back().kind == Work::Kind::stopped);
    }
  }
}

TEST_CASE("stop() ends workers that wait for work, and a producer that waits for held workers") {
  for (int round = 0; round < 100; ++round) {
    const test::Watchdog limit("a stopped wait", 120s);
    {
      const auto idle = make(4, 2);
      std::vector<std::jthread> threads;
      for (unsigned c = 0; c < 4; ++c)
        threads.emplace_back([&, c] { CHECK(idle->take(c).kind == Work::Kind::stopped); });
      if (round % 2 != 0) std::this_thread::yield();
      idle->stop();
    }
    {
      const auto full = make(2, 2);
      std::binary_semaphore waits(0);
      std::jthread producer([&] {
        PageBatch* batch = full->first_batch();
        while (batch != nullptr) batch = full->put(batch, [&] { waits.release(); });
      });
      waits.acquire();  // it is about to sleep, or does
      full->stop();
    }
  }
}

TEST_CASE("A batch for which no worker was woken is taken after push_out()") {
  const test::Watchdog limit("a flushed batch", 120s);
  const auto handoff = make(1, 16);
  std::counting_semaphore<> taken(0);
  std::jthread worker([&] {
    for (;;) {
      const Work work = handoff->take(0);
      if (work.kind != Work::Kind::batch) return;
      handoff->give_back(work.batch);
      taken.release();
    }
  });
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t i = 0; i < 500; ++i) {
    batch->push(i);
    batch = handoff->put(batch, ignore_waits);
    handoff->push_out();
    taken.acquire();
  }
  handoff->end();
}

TEST_CASE("An epoch that is closed wakes every worker for its SYNC, without push_out()") {
  const test::Watchdog limit("SYNCs of idle channels", 120s);
  constexpr unsigned channels = 8;
  const auto handoff = make(channels, 4);
  std::counting_semaphore<> synced(0);
  std::vector<std::jthread> threads;
  for (unsigned c = 0; c < channels; ++c)
    threads.emplace_back([&, c] {
      while (handoff->take(c).kind == Work::Kind::close_epoch) synced.release();
    });
  for (int epoch = 0; epoch < 500; ++epoch) {
    handoff->close_epoch();
    for (unsigned c = 0; c < channels; ++c) synced.acquire();
  }
  handoff->end();
}

TEST_CASE("Nothing is allocated after create(), however long the run") {
  const test::Watchdog limit("the steady state", 120s);
  constexpr unsigned channels = 4;
  const std::uint64_t before_create = test::allocations();
  const auto handoff = make(channels, 4);
  CHECK(test::allocations() > before_create);  // the counter works
  std::atomic<std::uint64_t> taken{0};
  std::vector<std::jthread> threads;
  std::counting_semaphore<> started(0);
  Hold end;
  for (unsigned c = 0; c < channels; ++c) {
    threads.emplace_back([&, c] {
      started.release();
      for (;;) {
        const Work work = handoff->take(c);
        if (work.kind == Work::Kind::end) break;
        if (work.kind != Work::Kind::batch) continue;
        handoff->give_back(work.batch);
        taken.fetch_add(1, std::memory_order_relaxed);
      }
      end.wait();  // a thread's own end may allocate
    });
  }
  for (unsigned c = 0; c < channels; ++c) started.acquire();

  const std::uint64_t before = test::allocations();
  constexpr std::uint64_t batches = 50'000;
  PageBatch* batch = handoff->first_batch();
  for (std::uint64_t i = 0; i < batches; ++i) {
    batch->push_run(i, packet_pages, 4096);
    batch = handoff->put(batch, ignore_waits);
    if (i % 1000 == 0) handoff->close_epoch();
  }
  handoff->end();
  while (taken.load(std::memory_order_relaxed) < batches) std::this_thread::yield();
  const std::uint64_t after = test::allocations();
  end.release();
  threads.clear();
  CHECK(after == before);
}
