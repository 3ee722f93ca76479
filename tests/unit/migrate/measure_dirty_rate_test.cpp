// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cerrno>
#include <chrono>
#include <functional>
#include <optional>
#include <span>
#include <system_error>
#include <vector>

#include "multifd/migrate/dirty/dirty_hooks.hpp"
#include "multifd/migrate/measure_dirty_rate.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace std::chrono_literals;

namespace {

/// A guest that writes so many pages between two fetches of its first block's bitmap.
struct Scripted {
  explicit Scripted(std::vector<std::uint64_t> each) : pages(std::move(each)) {
    auto made = DirtyFromHooks::create(
        ram.map, {.start =
                      [this] {
                        on = true;
                        return Result<void>{};
                      },
                  .fetch = [this](BlockId block, std::span<std::uint64_t> bitmap) { return fetch(block, bitmap); },
                  .stop =
                      [this] {
                        on = false;
                        return Result<void>{};
                      }});
    REQUIRE(made.has_value());
    source.emplace(std::move(*made));
  }
  Result<void> fetch(BlockId block, std::span<std::uint64_t> bitmap) {
    if (index(block) != 0) return {};
    const std::size_t now = fetches++;
    if (fails_at == now) return fail_errno(Stage::none, "the test's fault", EIO);
    for (std::uint64_t page = 0; page < pages[now]; ++page) bitmap[page / 64] |= std::uint64_t{1} << page % 64;
    return {};
  }

  test::DirtyRam ram;
  std::vector<std::uint64_t> pages;
  std::optional<DirtyFromHooks> source;
  std::size_t fetches = 0;
  std::optional<std::size_t> fails_at;
  bool on = false;
};

}  // namespace

TEST_CASE("The dirty rate is what each period has written, without what was written before") {
  Scripted guest({300, 5, 0, 200});
  const auto measured = measure_dirty_rate(*guest.source, guest.ram.map, {.period = 5ms, .periods = 3});
  REQUIRE_MESSAGE(measured.has_value(), test::text(measured));
  REQUIRE(measured->size() == 3);
  CHECK((*measured)[0].pages == 5);
  CHECK((*measured)[1].pages == 0);
  CHECK((*measured)[2].pages == 200);
  for (const DirtyPeriod& each : *measured) CHECK(each.time >= 5ms);
  CHECK_FALSE(guest.on);
}

TEST_CASE("Dirty logging is off after an error, and after an interrupt") {
  Scripted guest({0, 1, 1, 1});
  guest.fails_at = 2;
  const auto failed = measure_dirty_rate(*guest.source, guest.ram.map, {.period = 1ms, .periods = 3});
  REQUIRE_FALSE(failed.has_value());
  CHECK(failed.error().code == std::error_code(EIO, std::system_category()));
  CHECK_FALSE(guest.on);

  auto interrupt = Interrupt::create();
  REQUIRE(interrupt.has_value());
  interrupt->trigger();
  const auto ended = measure_dirty_rate(*guest.source, guest.ram.map, {.period = 10min, .interrupt = &*interrupt});
  REQUIRE_FALSE(ended.has_value());
  CHECK(ended.error().code == Errc::cancelled);
  CHECK_FALSE(guest.on);
}

TEST_CASE("Settings of a dirty rate that make no sense are refused") {
  Scripted guest({});
  for (const MeasureOptions& options : {MeasureOptions{.period = 0ms}, MeasureOptions{.period = -1ms},
                                        MeasureOptions{.periods = 0}, MeasureOptions{.periods = 100'001}}) {
    const auto refused = measure_dirty_rate(*guest.source, guest.ram.map, options);
    REQUIRE_FALSE(refused.has_value());
    CHECK(refused.error().code == Errc::bad_option);
  }
  CHECK(guest.fetches == 0);
}
