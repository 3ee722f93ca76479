// SPDX-License-Identifier: MIT
//
// What a VMM may say and insist on beside its guest: any page size, pages that it knows to be zero, its own words when it
// gives up. The guest stands still.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/detail/page_queue.hpp"
#include "multifd/migrate/dirty/dirty_hooks.hpp"
#include "multifd/migrate/fixed_downtime.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/multifd.hpp"
#include "support/basics.hpp"
#include "support/still_guest.hpp"

using namespace multifd;
using namespace multifd::migrate;

namespace {

struct Stacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesNone, ZeroPagesLegacy, ZeroPagesMultifd>;
};

constexpr std::size_t pages = 200;

/// Both halves. Every byte of its memory is set, also that of pages that it calls zero.
struct StillGuest {
  StillGuest(std::size_t page_bytes, std::byte fill) : memory(pages * page_bytes, fill), map(page_bytes) {
    REQUIRE(map.add("ram", memory).has_value());
    auto hooks = DirtyFromHooks::create(map, {.fetch = [this](BlockId, std::span<std::uint64_t> bitmap) {
                                          if (on_fetch) on_fetch();
                                          if (rounds-- > 1)
                                            std::ranges::fill(bitmap.first(pages / 64), ~std::uint64_t{0});
                                          return Result<void>();
                                        }});
    REQUIRE(hooks.has_value());
    dirty.emplace(std::move(*hooks));
  }

  Result<RamMap> ram() { return map; }
  DirtyFromHooks& dirty_source() { return *dirty; }
  Result<void> pause() { return {}; }
  Result<void> resume() { return {}; }
  Result<void> save(StateWriter& to) { return to.device({.idstr = "nothing"}, {}); }
  Result<void> known_zeros(BlockId, std::span<std::uint64_t> bitmap) {
    for (const std::size_t page : zeros) bitmap[page / 64] |= std::uint64_t{1} << page % 64;
    ++asked;
    return {};
  }

  Result<RamMap> prepare(const Announcement& announced) {
    announced_page_bytes = announced.page_bytes;
    announced_channels = announced.channels;
    if (refuses) return fail(Errc::bad_option, Stage::none, "the test's fault");
    return map;
  }
  Result<void> load(StateReader& from) {
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return {};
    }
  }

  std::vector<std::byte> memory;
  RamMap map;
  std::optional<DirtyFromHooks> dirty;
  unsigned rounds = 1;
  std::function<void()> on_fetch;  ///< what the guest has done meanwhile
  std::vector<std::size_t> zeros;
  unsigned asked = 0;
  bool refuses = false;
  std::size_t announced_page_bytes = 0;
  unsigned announced_channels = 0;
};

test::MigrationEnds migrate_between(StillGuest& here, StillGuest& there, const SourceOptions& from,
                                    const DestinationOptions& to) {
  return test::migrate_between<Stacks>(here, there, from, to);
}

Migration new_migration() {
  auto made = Migration::create();
  REQUIRE(made.has_value());
  return std::move(*made);
}

}  // namespace

TEST_CASE("A destination that insists on no page size takes the source's") {
  for (const std::size_t page_bytes : {1024u, 4096u, 16384u, 65536u}) {
    CAPTURE(page_bytes);
    StillGuest here(page_bytes, std::byte{7});
    StillGuest there(page_bytes, std::byte{0});
    const auto [moved, taken] = migrate_between(here, there, {.channels = 3}, {.page_bytes = std::nullopt});
    REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
    REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
    CHECK(there.announced_page_bytes == page_bytes);
    CHECK(there.announced_channels == 3);
    CHECK(taken->page_bytes == page_bytes);
    CHECK(taken->cipher.empty());
    CHECK(here.memory == there.memory);
  }
}

TEST_CASE("A destination that insists on a page size refuses another one, at both ends") {
  StillGuest here(16384, std::byte{7});
  StillGuest there(16384, std::byte{0});
  const auto [moved, taken] = migrate_between(here, there, {}, {});
  REQUIRE_FALSE(moved.has_value());
  REQUIRE_FALSE(taken.has_value());
  CHECK(taken.error().code == Errc::page_size_mismatch);
  CHECK(moved.error().peer_reason == Errc::page_size_mismatch);
}

TEST_CASE("A page that was known, then known to be zero, then as it was at first, is sent again") {
  StillGuest here(4096, std::byte{7});
  StillGuest there(4096, std::byte{0});
  here.rounds = 3;
  const auto fill = [&](std::byte with) { std::ranges::fill(std::span(here.memory).subspan(5 * 4096, 4096), with); };
  here.on_fetch = [&, fetches = 0]() mutable {
    ++fetches;
    here.zeros.clear();
    if (fetches == 1) here.zeros = {5};
    fill(fetches == 1 ? std::byte{0} : std::byte{7});
  };
  const auto [moved, taken] = migrate_between(
      here, there, {.bandwidth = 500'000'000, .converge = {.rule = FixedRounds(3)}, .skip_unchanged = true}, {});
  REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
  REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
  REQUIRE(moved->rounds.size() == 4);
  CHECK(moved->rounds[1].unchanged_pages > 100);
  CHECK(moved->rounds[2].normal_pages == 1);
  CHECK(here.memory == there.memory);
}

TEST_CASE("Pages that the guest knows to be zero arrive as zeros, and nobody reads them") {
  for (const char* zero_pages : {"none", "legacy", "multifd"})
    for (const unsigned rounds : {1u, 3u}) {
      CAPTURE(zero_pages);
      CAPTURE(rounds);
      StillGuest here(4096, std::byte{7});
      StillGuest there(4096, std::byte{0});
      here.zeros = {0, 1, 63, 64, 65, 100, 127, 128, 199};
      here.rounds = rounds;
      const auto [moved, taken] =
          migrate_between(here, there, {.zero_pages = zero_pages, .converge = {.rule = FixedRounds(rounds)}}, {});
      REQUIRE_MESSAGE(moved.has_value(), test::text(moved));
      REQUIRE_MESSAGE(taken.has_value(), test::text(taken));
      CHECK(moved->rounds.size() == rounds + 1);
      const bool as_bytes = std::string_view(zero_pages) == "none";
      CHECK(here.asked == (as_bytes ? 0 : rounds));
      CHECK(moved->rounds[0].zero_pages == (as_bytes ? 0 : here.zeros.size()));
      for (std::size_t page = 0; page < pages; ++page) {
        CAPTURE(page);
        const bool zero = !as_bytes && std::ranges::count(here.zeros, page) > 0;
        CHECK(there.memory[page * 4096 + 11] == std::byte{zero ? std::uint8_t{0} : std::uint8_t{7}});
      }
    }
}

TEST_CASE("A side's own words arrive whole at the other one") {
  const std::string words =
      "there is no room for this guest here, as somebody has to say in more words than fit an Error";
  const auto reason = [&](const Error&) { return words; };
  StillGuest here(4096, std::byte{7});
  StillGuest there(4096, std::byte{0});
  Migration source = new_migration();
  Migration destination = new_migration();
  SUBCASE("the destination's") {
    there.refuses = true;
    const auto [moved, taken] =
        migrate_between(here, there, {.migration = &source}, {.reason = reason, .migration = &destination});
    REQUIRE_FALSE(moved.has_value());
    CHECK(moved.error().code == Errc::peer_gave_up);
    CHECK(source.peer_text() == words);
    CHECK(destination.peer_text().empty());
  }
  SUBCASE("the source's") {
    const auto on_event = [&](const Event& event) {
      if (event.progress.status == MigrationStatus::device) source.cancel();
    };
    const auto [moved, taken] = migrate_between(
        here, there, {.on_event = on_event, .reason = reason, .migration = &source}, {.migration = &destination});
    REQUIRE_FALSE(taken.has_value());
    CHECK(taken.error().code == Errc::peer_gave_up);
    CHECK(destination.peer_text() == words);
    CHECK(moved.error().code == Errc::cancelled);
  }
}

TEST_CASE("Runs of pages that are in both of two bitmaps") {
  using Runs = std::vector<std::pair<std::uint64_t, std::uint64_t>>;
  const auto runs_of = [](std::vector<std::uint64_t> one, std::vector<std::uint64_t> other) {
    Runs runs;
    const auto done = migrate::detail::for_each_run_in_both(one, other, [&](std::uint64_t first, std::uint64_t count) {
      runs.emplace_back(first, count);
      return Result<void>();
    });
    CHECK(done.has_value());
    return runs;
  };
  constexpr std::uint64_t all = ~std::uint64_t{0};
  CHECK(runs_of({}, {}).empty());
  CHECK(runs_of({all}, {0}).empty());
  CHECK(runs_of({all, all, all}, {all, all, all}) == Runs{{0, 192}});
  CHECK(runs_of({1, 1}, {all, all}) == Runs{{0, 1}, {64, 1}});
  CHECK(runs_of({all << 60, 3}, {all, all}) == Runs{{60, 6}});
  CHECK(runs_of({all, 0, all}, {all << 1, all, all >> 1}) == Runs{{1, 63}, {128, 63}});
  CHECK(runs_of({0b1011'0110}, {0b1111'0011}) == Runs{{1, 1}, {4, 2}, {7, 1}});
  const auto stops = migrate::detail::for_each_run_in_both(
      std::vector<std::uint64_t>{5}, std::vector<std::uint64_t>{5},
      [](std::uint64_t, std::uint64_t) -> Result<void> { return fail(Errc::cancelled, Stage::none, "here"); });
  CHECK(stops.error().code == Errc::cancelled);
}
