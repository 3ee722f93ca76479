// SPDX-License-Identifier: MIT
//
// The receiver's barrier, the sender's epochs, and how the first error stops everything, under every order of a few
// steps.
#include "model/instrument.hpp"

#include <doctest/doctest.h>

#include "model/report.hpp"
#include "multifd/engine/closed_epochs.hpp"
#include "multifd/engine/first_error.hpp"
#include "multifd/packets/epoch_barrier.hpp"

using namespace multifd;
using namespace multifd::engine;
using namespace multifd::packets;
using model::expect;
using model::report;
using model::Run;
using namespace std::chrono_literals;

namespace {

constexpr auto no_progress = [] { return std::uint64_t{0}; };

struct Barriers {
  Barriers(unsigned channels, Barrier mode)
      : point(std::move(*EpochBarrier::create(channels, mode, 1h))), arrived(channels), passed(channels) {}
  std::unique_ptr<EpochBarrier> point;
  std::vector<unsigned> arrived, passed;
  unsigned released = 0;
  unsigned ended = 0;

  bool pass(unsigned c) {
    ++arrived[c];
    if (!point->arrive(c, no_progress)) return false;
    ++passed[c];
    for (const unsigned each : arrived) expect(each >= passed[c], "nobody passes before all have arrived");
    return true;
  }
};

}  // namespace

TEST_CASE("No channel passes the barrier before all have arrived, and then all do") {
  report("automatic", model::explore(1 + model::preemptions(), [](Run& run) {
           auto shared = std::make_shared<Barriers>(2, Barrier::automatic);
           for (unsigned c = 0; c < 2; ++c) {
             run.spawn([=] {
               expect(shared->pass(c) && shared->pass(c), "both epochs are passed");
               expect(shared->point->channel_ended(c).has_value(), "an end in order");
             });
           }
           run.spawn([=] {
             expect(shared->point->wait_for_channels(1h, no_progress, "ends").has_value(), "all ends are seen");
           });
           run.at_end([=] { expect(shared->point->epochs() == 2, "two epochs"); });
         }));
  report("manual", model::explore(1 + model::preemptions(), [](Run& run) {
           auto shared = std::make_shared<Barriers>(2, Barrier::manual);
           for (unsigned c = 0; c < 2; ++c) {
             run.spawn([=] {
               for (unsigned epoch = 0; epoch < 2; ++epoch) {
                 expect(shared->pass(c), "the epoch is passed");
                 expect(shared->released > epoch, "nobody passes before the caller says so");
               }
             });
           }
           run.spawn([=] {
             for (unsigned epoch = 0; epoch < 2; ++epoch) {
               const auto ended = shared->point->release_when_all(no_progress, [&]() -> Result<void> {
                 for (const unsigned each : shared->passed) expect(each == epoch, "all are held");
                 ++shared->released;
                 return {};
               });
               expect(ended && *ended == epoch, "epochs are counted");
             }
           });
         }));
}

TEST_CASE("stop() ends every wait at the barrier and at the epochs") {
  report("barrier", model::explore(1 + model::preemptions(), [](Run& run) {
           auto shared = std::make_shared<Barriers>(3, Barrier::manual);
           for (unsigned c = 0; c < 2; ++c) run.spawn([=] { shared->pass(c), ++shared->ended; });
           run.spawn([=] {
             expect(!shared->point->release_when_all(no_progress), "a channel is missing");
             ++shared->ended;
           });
           run.spawn([=] { shared->point->stop(); });
           run.at_end([=] { expect(shared->ended == 3, "all have ended"); });
         }));
  report("epochs", model::explore(1 + model::preemptions(), [](Run& run) {
           auto epochs = std::make_shared<ClosedEpochs>(2);
           run.spawn([=] { epochs->closed(0), epochs->closed(1), epochs->channel_ended(); });
           run.spawn([=] { epochs->wait(0, 1h, [] {}); });
           run.spawn([=] { expect(!epochs->wait_for_channels(1h, [] {}), "one channel has not left"); });
           run.spawn([=] { epochs->stop(); });
         }));
}

TEST_CASE("An epoch is out when all have written it, the end when all have left") {
  report("epochs", model::explore(1 + model::preemptions(), [](Run& run) {
           auto epochs = std::make_shared<ClosedEpochs>(2);
           auto written = std::make_shared<unsigned>(0);
           for (unsigned c = 0; c < 2; ++c) run.spawn([=] { ++*written, epochs->closed(c), epochs->channel_ended(); });
           run.spawn([=] { expect(epochs->wait(0, 1h, [] {}) && *written == 2, "both have written"); });
           run.spawn([=] { expect(epochs->wait_for_channels(1h, [] {}), "both have left"); });
         }));
}

TEST_CASE("Of several errors one is the first, it stops everything once, and every thread gets the same") {
  report("first error", model::explore(1 + model::preemptions(), [](Run& run) {
           struct Shared {
             Shared() : error([this] { ++stops; }) {}
             unsigned stops = 0;
             FirstError error;
             std::vector<int> seen;
           };
           auto shared = std::make_shared<Shared>();
           for (const Errc code : {Errc::cancelled, Errc::timed_out}) {
             run.spawn([=] {
               shared->error.raise({.code = code});
               shared->seen.push_back(shared->error.get().code.value());
             });
           }
           run.spawn([=] {
             if (!shared->error.failed()) return;
             shared->seen.push_back(shared->error.get().code.value());
             shared->error.wait_stopped();
             expect(shared->stops == 1, "stop() has returned");
           });
           run.at_end([=] {
             expect(shared->stops == 1, "stopped once");
             for (const int each : shared->seen) expect(each == shared->seen[0], "one error for all");
           });
         }));
}
