// SPDX-License-Identifier: MIT
//
// Connections that are cut while a guest runs at the destination and its memory follows, at moments drawn by lot: one page
// connection, the main connection, all of them. Page for page the guest is whole in the end, unless it was not handed over.
//
// MULTIFD_CUTS says how many; 20 by default, 200 at night.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <string>
#include <thread>

#include "support/leftovers.hpp"
#include "support/migrate_on_demand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 2048;

unsigned wanted_cuts() { return how_often("MULTIFD_CUTS", quick() ? 8 : 20); }

DestinationOptions patient_destination() {
  return {.resume = {.timeout = 5s},
          .accept_timeout = 5s,
          .retry_timeout = 50ms,
          .progress_timeout = 10s,
          .save_timeout = 10s,
          .hand_over_timeout = 10s};
}

SourceOptions impatient(SourceOptions options) {
  options.answer_timeout = options.progress_timeout = options.load_timeout = 10s;
  options.farewell_timeout = 1s;
  return options;
}

/// What is cut.
enum class Cut : unsigned { page_connection, main, all };

std::uint64_t operations() {
  OnDemand vm(pages, patient_destination());
  Script script(vm.there.address.port);
  const Tried tried = vm.migrate(impatient(at_once()));
  REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
  REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
  return script.operations();
}

/// How often something was.
using Counts = std::map<std::string, unsigned>;
std::string shown(const Counts& counts) {
  std::string text;
  for (const auto& [what, count] : counts) text += (text.empty() ? "" : ", ") + what + " " + std::to_string(count);
  return text;
}

/// What holds whatever was cut when. Returns what became of the guest.
std::string check(OnDemand& vm, const Tried& tried) {
  CAPTURE(text(tried.sent));
  CAPTURE(text(tried.taken));
  CAPTURE(vm.followed.said());
  CAPTURE(vm.there.followed.said());
  CHECK_FALSE(vm.here.ran_beside);
  CHECK_FALSE(vm.there.guest.ran_beside);
  CHECK_FALSE((vm.here.runs() && vm.there.guest.runs()));
  CHECK_FALSE(vm.here.logging());
  CHECK(is_end(vm.followed->progress().status));
  CHECK(is_end(vm.there.followed->progress().status));
  CHECK(vm.here.runs() == (vm.followed->owner() == Owner::source));
  CHECK(vm.there.guest.runs() == tried.taken.has_value());
  if (tried.taken) {
    CHECK(tried.sent.has_value());
    CHECK(vm.followed->owner_text() == "the guest runs at the destination");
    vm.check_whole();
    return "whole at the destination";
  }
  CHECK_FALSE(tried.sent.has_value());
  if (vm.here.runs()) return "runs at the source";
  CHECK(vm.followed->owner() == Owner::unknown);
  CHECK(vm.followed->owner_text().contains("look there"));
  return "stands still, and the source says where to look";
}

}  // namespace

TEST_CASE("Connections are cut at any moment: the guest ends whole, page for page, or was not handed over") {
  const unsigned cuts = wanted_cuts();
  const Watchdog watchdog("cuts at random moments", std::chrono::seconds(120 + 5 * cuts));
  Rng rng(seed() + 5);
  INFO("seed ", seed());
  Counts states, ends;
  const Leftovers leftovers;
  const std::uint64_t end = operations();
  for (unsigned i = 0; i < cuts; ++i) {
    CAPTURE(i);
    const auto cut = static_cast<Cut>(i % 3);
    CAPTURE(i % 3);
    const bool reset = below(rng, 2) == 0;
    // Page connections are the last to be made.
    const auto number = static_cast<unsigned>(1 + OnDemand::channels + below(rng, 1 + OnDemand::channels));
    const std::uint64_t at = below(rng, end);
    CAPTURE(at);
    {
      OnDemand vm(pages, patient_destination());
      MigrationStatus state{};
      Script* running = nullptr;
      Script script(vm.there.address.port, at, [&] {
        state = vm.followed->progress().status;
        running->break_links(cut == Cut::all    ? std::nullopt
                             : cut == Cut::main ? std::optional(0u)
                                                : std::optional(number),
                             reset);
      });
      running = &script;
      SourceOptions options = impatient(i % 2 == 0 ? at_once() : fallback());
      options.resume.enabled = i % 4 < 2;
      options.resume.timeout = 5s;
      const Tried tried = vm.migrate(std::move(options));
      ++ends[check(vm, tried)];
      ++states[to_string(state)];
      // Behind the hand-over nothing that is cut ends anything.
      if (state >= MigrationStatus::postcopy_active) CHECK(tried.taken.has_value());
    }
    CHECK(leftovers.no_thread());
    CHECK(leftovers.no_descriptor());
  }
  MESSAGE(cuts, " cuts; the source was in: ", shown(states), "; the guest: ", shown(ends));
}
