// SPDX-License-Identifier: MIT
//
// Guests that run at the destination before their memory is there: by the rule, and at once; and what is lost meanwhile.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <string>
#include <thread>

#include "support/migrate_on_demand.hpp"
#include "support/source_by_hand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t guest_pages = 4096;
constexpr std::size_t working_set = OnDemand::working_set;

}  // namespace

TEST_CASE("A guest runs at the destination at once, and its memory follows") {
  OnDemand vm(guest_pages);
  const Tried tried = vm.migrate(at_once());
  REQUIRE_MESSAGE(tried.sent.has_value(), describe(tried.sent.error()));
  REQUIRE_MESSAGE(tried.taken.has_value(), describe(tried.taken.error()));
  vm.check_whole();
  CHECK(vm.followed.said() == "setup active round device postcopy-active completed");
  CHECK(vm.there.followed.said() == "setup active device postcopy-active completed");
  CHECK(tried.sent->switchover.action == Action::memory_on_demand);
  CHECK(tried.sent->switchover.reason == Reason::at_once);
  REQUIRE(tried.sent->postcopy.has_value());
  REQUIRE(tried.taken->postcopy.has_value());
  CHECK(tried.taken->postcopy->missing_pages == tried.sent->postcopy->missing_pages);
  CHECK(tried.taken->postcopy->missing_pages >= guest_pages);
  CHECK(tried.taken->postcopy->faults > 0);
  CHECK(vm.followed->owner_text() == "the guest runs at the destination");
  CHECK(vm.there.followed->owner_text() == "the guest runs at the destination");
  CHECK_FALSE(tried.taken->late.has_value());
}

TEST_CASE("Where the rule would stop the guest for too long, or give up, it runs there first, and its memory follows") {
  for (const bool gives_up : {false, true}) {
    CAPTURE(gives_up);
    SourceOptions options = fallback();
    if (gives_up) {
      options.converge.rule = FixedRounds(1'000'000);
      options.converge.max_rounds = 2;
    }
    OnDemand vm(guest_pages);
    const Tried tried = vm.migrate(options);
    REQUIRE_MESSAGE(tried.sent.has_value(), describe(tried.sent.error()));
    REQUIRE_MESSAGE(tried.taken.has_value(), describe(tried.taken.error()));
    vm.check_whole();
    CHECK(tried.sent->switchover.action == Action::memory_on_demand);
    // The rule's own reason; a slow guest may have dirtied nothing.
    const Reason reason = tried.sent->switchover.reason;
    CHECK((reason == Reason::rounds_used_up || reason == Reason::downtime_fits));
    CHECK(vm.followed.said().ends_with("round device postcopy-active completed"));
    REQUIRE(tried.taken->postcopy.has_value());
    CHECK(tried.taken->postcopy->missing_pages == tried.sent->postcopy->missing_pages);
    CHECK(tried.taken->postcopy->missing_pages <= working_set);
  }
}

TEST_CASE(
    "A strategy changes nothing where the downtime fits, where the caller asks, and where the destination cannot") {
  const auto check_precopy = [](OnDemand& vm, const SourceOptions& options) {
    const Tried tried = vm.migrate(options);
    REQUIRE_MESSAGE(tried.sent.has_value(), describe(tried.sent.error()));
    REQUIRE_MESSAGE(tried.taken.has_value(), describe(tried.taken.error()));
    vm.check_whole();
    CHECK(tried.sent->switchover.action == Action::switch_now);
    CHECK_FALSE(tried.sent->postcopy.has_value());
    CHECK_FALSE(tried.taken->postcopy.has_value());
    CHECK(vm.there.followed.said() == "setup active device completed");
  };
  {
    OnDemand vm(guest_pages);
    SourceOptions options = fallback();
    options.converge.max_downtime = 60s;
    check_precopy(vm, options);
  }
  {
    OnDemand vm(guest_pages);
    SourceOptions options = fallback();
    options.converge.rule = FixedRounds(1'000'000);
    vm.followed->switch_over();
    check_precopy(vm, options);
  }
  {
    DestinationOptions refuses;
    refuses.postcopy.accepted = false;
    OnDemand vm(guest_pages, refuses);
    check_precopy(vm, fallback());
  }
}

TEST_CASE("Refused by name: a strategy without a destination, a way, or a comparison that can be had") {
  {
    DestinationOptions refuses;
    refuses.postcopy.accepted = false;
    OnDemand vm(guest_pages, refuses);
    const Tried tried = vm.migrate(at_once());
    REQUIRE_FALSE(tried.sent.has_value());
    CHECK(tried.sent.error().code == Errc::peer_gave_up);
    CHECK(tried.sent.error().subject.view().contains("postcopy"));
    CHECK_FALSE(tried.taken.has_value());
    CHECK(vm.here.runs());
  }
  const auto refused = [](SourceOptions options, Errc code) {
    OnDemand vm(guest_pages);
    const Tried tried = vm.migrate(std::move(options));
    REQUIRE_FALSE(tried.sent.has_value());
    CHECK(tried.sent.error().code == code);
    CHECK(vm.here.runs());
    return describe(tried.sent.error());
  };
  SourceOptions compares = at_once();
  compares.verify = Verify::required;
  CHECK(refused(compares, Errc::bad_option).contains("verify"));
  SourceOptions too_many = at_once();
  too_many.postcopy.channels = 256;
  CHECK(refused(too_many, Errc::bad_option).contains("PostcopyOptions::channels"));
  SourceOptions without;
  without.converge.at_time_limit = Action::memory_on_demand;
  CHECK(refused(without, Errc::not_supported).contains("at_time_limit"));
}

TEST_CASE("Pages are compared where none follows, and nothing is where some do") {
  SourceOptions options = at_once();
  options.verify = Verify::where_possible;
  OnDemand vm(guest_pages);
  const Tried tried = vm.migrate(options);
  REQUIRE_MESSAGE(tried.sent.has_value(), describe(tried.sent.error()));
  CHECK(tried.sent->pages_verified == 0);
  vm.check_whole();
}

TEST_CASE("A farewell is said when all memory is there, and arrives") {
  DestinationOptions says;
  OnDemand* at = nullptr;
  std::uint64_t missing = 1;
  says.farewell = [&] {
    missing = at->there.followed->progress().missing_pages;
    return std::vector<std::byte>(3, std::byte{'x'});
  };
  OnDemand vm(guest_pages, says);
  at = &vm;
  SourceOptions options = at_once();
  std::size_t heard = 0;
  options.on_user_data = [&](std::span<const std::byte> bytes) { heard = bytes.size(); };
  const Tried tried = vm.migrate(options);
  REQUIRE_MESSAGE(tried.sent.has_value(), describe(tried.sent.error()));
  CHECK(heard == 3);
  CHECK(missing == 0);
  vm.check_whole();
}

TEST_CASE("A main connection that breaks with any of the source's writes loses no guest: HAND_OVER may have arrived") {
  const Watchdog watchdog("writes behind which the connection breaks");
  for (std::uint64_t at = 0;; ++at) {
    CAPTURE(at);
    OnDemand vm(1024);
    bool broken = false;
    const Script script = Script::behind_write(vm.there.address.port, at, [&] { broken = true; });
    const Tried tried = vm.migrate(at_once());
    if (!broken) {  // the source writes no more than that
      CHECK(at >= 8);
      vm.check_whole();
      break;
    }
    CHECK((vm.here.runs() != vm.there.guest.runs()));
    if (vm.there.guest.runs()) {
      CHECK_MESSAGE(tried.taken.has_value(), text(tried.taken));
      vm.check_whole();
    } else {
      CHECK_FALSE(tried.sent.has_value());
      CHECK(vm.followed->owner() == Owner::source);
    }
  }
}

TEST_CASE("A hook that gets no memory while pages are missing keeps none of them from coming") {
  for (const bool at_source : {true, false}) {
    CAPTURE(at_source);
    const auto no_memory = [](const Event& event) {
      if (event.kind == EventKind::status && event.progress.status == MigrationStatus::postcopy_active)
        throw std::bad_alloc();
    };
    OnDemand vm(guest_pages);
    SourceOptions options = at_once();
    if (at_source)
      options.on_event = no_memory;
    else
      vm.there.on_event = no_memory;
    const Tried tried = vm.migrate(options);
    CHECK_MESSAGE(tried.sent.has_value(), text(tried.sent));
    REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
    vm.check_whole();
  }
}

TEST_CASE("Memory that is populated ahead is dropped all the same, and by nobody populated again") {
  const Watchdog watchdog("populated ahead");
  DestinationOptions populates;
  populates.into.populate = Populate::ahead;
  for (int at = 0; at < 4; ++at) {
    CAPTURE(at);
    OnDemand vm(full() ? 32768 : 8192, populates);
    ::madvise(vm.there.guest.memory().data(), vm.there.guest.memory().size(), MADV_DONTNEED);
    ::madvise(vm.there.guest.memory().data(), vm.there.guest.memory().size(), MADV_NOHUGEPAGE);
    // Somewhere in the bulk pass, with the populating under way.
    SourceOptions options = fallback();
    options.converge.rule = FixedRounds(1'000'000);
    options.converge.time_limit = std::chrono::milliseconds(full() ? 5 + 10 * at : 2 + 3 * at);
    options.converge.at_time_limit = Action::memory_on_demand;
    const Tried tried = vm.migrate(options);
    REQUIRE_MESSAGE(tried.sent.has_value(), text(tried.sent));
    REQUIRE_MESSAGE(tried.taken.has_value(), text(tried.taken));
    vm.check_whole();
  }
}

TEST_CASE(
    "Missing pages at another place of the stream, and without MEMORY_FOLLOWS, are refused: no guest runs without "
    "them") {
  const Watchdog watchdog("misplaced missing pages");
  enum class At { inside_ram, inside_ram_with_end, without_end };
  for (const At at : {At::inside_ram, At::inside_ram_with_end, At::without_end}) {
    CAPTURE(static_cast<int>(at));
    There there(64);
    there.begin();
    SourceByHand source(there.address);
    source.ask();
    source.announce(64, {}, wire::FeatureList().add({.name = wire::feature_postcopy}));
    CHECK(source.answer().message.kind == wire::ExtensionKind::accepted);
    if (at == At::without_end) {
      source.end_ram();
      source.miss_a_page(false);
      source.state_whole();
    } else {
      source.miss_a_page(at == At::inside_ram_with_end);
      source.end_ram();
    }
    const std::string said = source.failure();
    CHECK_MESSAGE(said.contains("out of order"), said);
    CHECK(code_of(there.result()) == Errc::unexpected_extension_message);
    CHECK_FALSE(there.guest.runs());
  }
}
