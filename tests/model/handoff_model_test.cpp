// SPDX-License-Identifier: MIT
//
// The hand-off's own code under every order of a few steps: each batch comes out once, in its epoch, each SYNC behind
// what it closes, and no thread sleeps for ever.
#include "model/instrument.hpp"

// What the library learns from the kernel is chosen here.
#define CoreDemand RealCoreDemand
#include "multifd/engine/core_demand.hpp"
#undef CoreDemand

namespace multifd::engine {

class CoreDemand {
 public:
  static inline unsigned limit_for_all = ~0u;
  explicit CoreDemand(unsigned workers) noexcept : limit_(std::min(workers, limit_for_all)) {}
  struct Probe {};
  unsigned limit() const noexcept { return limit_; }
  void sample(Probe&) noexcept {}

 private:
  unsigned limit_;
};

}  // namespace multifd::engine

#include <doctest/doctest.h>

#include "model/report.hpp"
#include "multifd/engine/batch_handoff.hpp"

using namespace multifd;
using namespace multifd::engine;
using model::expect;
using model::Explored;
using model::report;
using model::Run;

namespace {

constexpr auto ignore_waits = [] {};

struct Shared {
  explicit Shared(unsigned channels, unsigned depth = 2)
      : handoff(std::move(*BatchHandoff::create(channels, depth, 4))), synced(channels), last(channels) {}

  std::unique_ptr<BatchHandoff> handoff;
  std::vector<std::uint64_t> synced;   ///< SYNCs that each worker was told to write
  std::vector<std::uint64_t> last;     ///< the batch behind the last one that each worker got
  std::vector<std::uint64_t> batches;  ///< their epochs, in the order they were put
  std::uint64_t out = 0;               ///< batches that came out
  unsigned ended = 0;
  bool stopped = false;

  /// Takes what comes, as a channel does, until the end.
  void work(unsigned c) {
    for (;;) {
      std::optional<Work> next = handoff->try_take(c);
      const Work work = next ? *next : handoff->take(c);
      switch (work.kind) {
        case Work::Kind::batch:
          expect(work.batch->size() == 1, "a batch with its page");
          check(c, work);
          handoff->give_back(work.batch);
          break;
        case Work::Kind::close_epoch:
          expect(work.epoch == synced[c], "SYNCs one by one");
          ++synced[c];
          break;
        case Work::Kind::end: ++ended; return;
        case Work::Kind::idle: expect(false, "nobody has asked for a time limit"); break;
        case Work::Kind::stopped:
          expect(stopped, "nobody was stopped without a reason");
          ++ended;
          return;
      }
    }
  }

  void check(unsigned c, const Work& work) {
    const std::uint64_t i = work.batch->offsets()[0];
    expect(work.epoch == batches[i] && work.batch->epoch == batches[i], "a batch in its epoch");
    // So no page of an epoch comes behind its channel's SYNC.
    expect(work.epoch == synced[c], "a worker has written the SYNCs before the batch, and no more");
    expect(last[c] <= i, "batches of a worker in the order they were put");
    last[c] = i + 1;
    ++out;
  }

  /// Puts `count` batches of the open epoch; false: stopped.
  bool put(PageBatch*& batch, unsigned count) {
    for (unsigned i = 0; i < count; ++i) {
      batch->push(batches.size());
      batches.push_back(epoch);
      batch = handoff->put(batch, ignore_waits);
      if (batch == nullptr) return false;
    }
    return true;
  }
  void close() {
    expect(handoff->close_epoch() == epoch, "epochs are counted");
    ++epoch;
  }
  std::uint64_t epoch = 0;
};

void spawn_workers(Run& run, const std::shared_ptr<Shared>& shared, unsigned channels) {
  for (unsigned c = 0; c < channels; ++c) run.spawn([shared, c] { shared->work(c); });
}

void check_all(const std::shared_ptr<Shared>& shared, unsigned channels) {
  expect(shared->ended == channels, "every worker ends");
  expect(shared->out == shared->batches.size(), "every batch came out");
  for (const std::uint64_t synced : shared->synced) expect(synced == shared->epoch, "every channel got every SYNC");
}

/// Two epochs: so many batches in the first, one in the second, then the end.
Explored epochs(unsigned channels, unsigned batches) {
  return model::explore(model::preemptions(), [=](Run& run) {
    auto shared = std::make_shared<Shared>(channels);
    run.spawn([=] {
      PageBatch* batch = shared->handoff->first_batch();
      shared->put(batch, batches);
      shared->close();
      shared->put(batch, 1);
      shared->close();
      shared->handoff->end();
    });
    spawn_workers(run, shared, channels);
    run.at_end([=] { check_all(shared, channels); });
  });
}

}  // namespace

TEST_CASE("Two epochs: every batch once and in its epoch, every SYNC behind it") {
  CoreDemand::limit_for_all = ~0u;
  report("1 worker, producer waits for room", epochs(1, 4));
  report("2 workers", epochs(2, 2));
  report("2 workers, producer waits for room", epochs(2, 6));
  report("3 workers", epochs(3, 1));
}

TEST_CASE("The same where all but one worker rest") {
  CoreDemand::limit_for_all = 1;
  report("2 workers", epochs(2, 3));
  report("2 workers, producer waits for room", epochs(2, 6));
  report("3 workers", epochs(3, 1));
  CoreDemand::limit_for_all = ~0u;
}

TEST_CASE("A batch leaves after push_out(), whatever the workers are about to do") {
  for (const unsigned limit : {~0u, 1u}) {
    CoreDemand::limit_for_all = limit;
    const Explored explored = model::explore(model::preemptions(), [](Run& run) {
      auto shared = std::make_shared<Shared>(2);
      auto left = std::make_shared<std::atomic<int>>(0);
      run.spawn([=] {
        PageBatch* batch = shared->handoff->first_batch();
        shared->put(batch, 1);
        shared->handoff->push_out();
        left->wait(0);
        shared->stopped = true;
        shared->handoff->stop();
      });
      for (unsigned c = 0; c < 2; ++c) {
        run.spawn([=] {
          for (;;) {
            const Work work = shared->handoff->take(c);
            if (work.kind != Work::Kind::batch) return;
            shared->handoff->give_back(work.batch);
            left->store(1);
            left->notify_all();
          }
        });
      }
    });
    report("flush", explored);
  }
  CoreDemand::limit_for_all = ~0u;
}

TEST_CASE("An epoch that is closed gets its SYNCs, although nothing comes after it") {
  for (const unsigned limit : {~0u, 1u}) {
    CoreDemand::limit_for_all = limit;
    const Explored explored = model::explore(model::preemptions(), [](Run& run) {
      auto shared = std::make_shared<Shared>(2);
      auto syncs = std::make_shared<std::atomic<int>>(0);
      run.spawn([=] {
        PageBatch* batch = shared->handoff->first_batch();
        shared->put(batch, 1);
        shared->close();
        for (int seen = syncs->load(); seen < 2; seen = syncs->load()) syncs->wait(seen);
        shared->handoff->stop();
      });
      for (unsigned c = 0; c < 2; ++c) {
        run.spawn([=] {
          for (;;) {
            const Work work = shared->handoff->take(c);
            if (work.kind == Work::Kind::stopped) return;
            if (work.kind == Work::Kind::batch) shared->handoff->give_back(work.batch);
            if (work.kind != Work::Kind::close_epoch) continue;
            syncs->fetch_add(1);
            syncs->notify_all();
          }
        });
      }
    });
    report("close", explored);
  }
  CoreDemand::limit_for_all = ~0u;
}

TEST_CASE("stop() at any moment ends the producer and every worker") {
  for (const unsigned limit : {~0u, 1u}) {
    CoreDemand::limit_for_all = limit;
    const Explored explored = model::explore(model::preemptions(), [](Run& run) {
      auto shared = std::make_shared<Shared>(2);
      run.spawn([=] {
        PageBatch* batch = shared->handoff->first_batch();
        if (!shared->put(batch, 2)) return;
        shared->close();
        shared->put(batch, 4);
      });
      spawn_workers(run, shared, 2);
      run.spawn([=] {
        shared->stopped = true;
        shared->handoff->stop();
      });
      run.at_end([=] { expect(shared->ended == 2, "every worker ends"); });
    });
    report("stop", explored);
  }
  CoreDemand::limit_for_all = ~0u;
}
