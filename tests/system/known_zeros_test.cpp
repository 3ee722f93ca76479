// SPDX-License-Identifier: MIT
//
// Memory that was never touched, between migrate_to() and migrate_from(): it is neither read nor made resident at either
// end, also to be compared; what is written behind the look at it arrives; and what a source must not say of it is refused.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "support/basics.hpp"
#include "support/source_by_hand.hpp"
#include "support/still_guest.hpp"

using namespace multifd;
using namespace multifd::migrate;

namespace {

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
};

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 16 * 1024 + 3;  // 64 MiB, and a part of a bitmap's word

using Kind = test::MemoryKind;

/// Both halves of a guest that says nothing of its zeros, but gets to write where it is asked: behind the driver's own look.
struct FreshGuest : test::StillGuest {
  explicit FreshGuest(Kind kind) : test::StillGuest(kind, pages) {}
  void write(std::size_t number, char with = 'x') {
    test::StillGuest::write(number, with);
    written.push_back(number);
  }
  Result<void> known_zeros(BlockId, std::span<std::uint64_t>) {
    for (const std::size_t number : std::exchange(to_write, {})) write(number, 'y');
    return {};
  }

  std::vector<std::size_t> to_write, written;
};

test::MigrationEnds migrate_between(FreshGuest& here, FreshGuest& there, SourceOptions from,
                                    DestinationMemory memory = DestinationMemory::zeroed) {
  from.converge.rule = FixedRounds(2);
  return test::migrate_between<Stacks>(here, there, from, {.into = {.destination = memory}});
}

void check_equal(const FreshGuest& here, const FreshGuest& there) {
  CHECK(std::memcmp(here.memory.bytes().data(), there.memory.bytes().data(), pages * page) == 0);
}

/// Whether the kernel lets this process open what its shared memory comes from.
bool has_map_files() {
  const test::FreshMemory memory(Kind::shared_anonymous, pages);
  RamMap map;
  REQUIRE(map.add("ram", memory.bytes()).has_value());
  const auto untouched = UntouchedPages::snapshot(map);
  return untouched && untouched->count() > 0;
}

}  // namespace

TEST_CASE("Memory that was never touched stays so at both ends, also where all pages are compared") {
  for (const Kind kind : {Kind::anonymous, Kind::memfd, Kind::memfd_closed, Kind::shared_anonymous}) {
    if ((kind == Kind::memfd_closed || kind == Kind::shared_anonymous) && !has_map_files()) {
      MESSAGE("skipped: shared memory without its file needs CAP_CHECKPOINT_RESTORE");
      continue;
    }
    for (const char* zero_pages : {"legacy", "multifd"}) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(zero_pages);
      FreshGuest here(kind);
      FreshGuest there(kind);
      for (std::size_t i = 0; i < pages; i += 1000) here.write(i);
      here.write(pages - 1);
      here.to_write = {1, 2, 64, 5001, pages - 2};
      const std::size_t resident = here.written.size() + here.to_write.size();
      const auto [moved, taken] = migrate_between(here, there, {.zero_pages = zero_pages, .verify = Verify::required});
      REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
      REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
      CHECK(moved->pages_verified == pages);
      CHECK(moved->rounds[0].normal_pages + moved->rounds[0].zero_pages == pages);
      CHECK(moved->rounds[0].wire_bytes < 100 * 1024);
      CHECK(taken->zero_on_main >= pages - resident);
      CHECK(here.memory.resident() == resident);
      CHECK(there.memory.resident() == resident);
      check_equal(here, there);  // last, because it reads all
    }
  }
}

TEST_CASE(
    "A driver that is not to look for untouched memory reads all of it, and says no zeros on the main connection") {
  FreshGuest here(Kind::anonymous);
  FreshGuest there(Kind::anonymous);
  here.write(7);
  const auto [moved, taken] = migrate_between(here, there, {.verify = Verify::required, .find_untouched = false});
  REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
  REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
  CHECK(moved->pages_verified == pages);
  CHECK(taken->zero_on_main == 0);
  check_equal(here, there);
}

TEST_CASE("Known zeros overwrite what the destination's memory held before") {
  FreshGuest here(Kind::anonymous);
  FreshGuest there(Kind::anonymous);
  here.write(7);
  std::ranges::fill(there.memory.bytes(), std::byte{0xee});
  const auto [moved, taken] = migrate_between(here, there, {}, DestinationMemory::unknown);
  REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
  REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
  check_equal(here, there);
}

TEST_CASE("A comparison finds a page that is not zero at one end where the other end's was never touched") {
  for (const bool at_source : {true, false}) {
    CAPTURE(at_source);
    FreshGuest here(Kind::anonymous);
    FreshGuest there(Kind::anonymous);
    here.write(3);
    SourceOptions options{.verify = Verify::required};
    // When all pages have gone, somebody writes to memory that no dirty log watches.
    options.on_event = [&](const Event& event) {
      if (event.kind == EventKind::step && event.progress.step == MigrationStep::device_state)
        (at_source ? here : there).memory.bytes()[9000 * page + 5] = std::byte{1};
    };
    const auto [moved, taken] = migrate_between(here, there, options);
    REQUIRE_FALSE(moved.has_value());
    REQUIRE_FALSE(taken.has_value());
    CHECK(taken.error().code == Errc::digest_mismatch);
    CHECK(taken.error().detail == 9000 * page);
  }
}

TEST_CASE("Refused: known zeros of a source that has not said the feature, of no block, past a block, and too early") {
  enum class Fault { none, no_feature, no_block, past_block, misaligned, too_early };
  for (const Fault fault :
       {Fault::none, Fault::no_feature, Fault::no_block, Fault::past_block, Fault::misaligned, Fault::too_early}) {
    CAPTURE(static_cast<int>(fault));
    const test::Watchdog watchdog("known zeros by hand");
    FreshGuest there(Kind::anonymous);
    there.map = RamMap();
    REQUIRE(there.map.add("pc.ram", there.memory.bytes().first(70 * page)).has_value());
    std::ranges::fill(there.memory.bytes().first(80 * page), std::byte{0xee});
    auto listener = Listener::listen({.host = "127.0.0.1"}, 64);
    REQUIRE(listener.has_value());
    auto taken = std::async(std::launch::async, [&] { return migrate_from<Stacks>(there, *listener); });
    test::SourceByHand source(listener->local_address());
    source.ask();
    const std::uint64_t zeros = fault == Fault::past_block ? 0x42 : 0x22;
    const auto say = [&] {
      source.known_zeros(fault == Fault::no_block ? 1 : 0, fault == Fault::misaligned ? page : 64 * page, zeros,
                         fault != Fault::too_early);
    };
    wire::FeatureList features;
    if (fault != Fault::no_feature) features.add({.name = wire::feature_known_zeros});
    source.announce(70, {}, features, 1, {}, fault == Fault::too_early ? say : std::function<void()>());
    if (fault != Fault::too_early) {
      CHECK(source.answer().message.kind == wire::ExtensionKind::accepted);
      say();
    }
    if (fault == Fault::none) {
      source.end_ram();
      source.state_whole();
      CHECK(source.answer().message.kind == wire::ExtensionKind::loaded);
      source.hand_over();
      CHECK(taken.get().has_value());
    } else {
      CHECK_FALSE(source.failure().empty());
      const auto result = taken.get();
      REQUIRE_FALSE(result.has_value());
      CHECK(result.error().code == (fault == Fault::no_block     ? Errc::bad_extension_message
                                    : fault == Fault::past_block ? Errc::offset_past_block
                                    : fault == Fault::misaligned ? Errc::offset_misaligned
                                                                 : Errc::unexpected_extension_message));
    }
    for (std::size_t i = 0; i < 80; ++i) {
      CAPTURE(i);
      const bool zero = fault == Fault::none && (i == 65 || i == 69);
      CHECK(there.memory.bytes()[i * page] == (zero ? std::byte{0} : std::byte{0xee}));
    }
  }
}
