// SPDX-License-Identifier: MIT
#include "multifd/migrate/dirty/dirty_union.hpp"

#include <doctest/doctest.h>

#include <cerrno>
#include <cstdint>
#include <span>
#include <vector>

#include "multifd/migrate/dirty/dirty_hooks.hpp"
#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using namespace multifd::migrate;
using test::bitmap_of;
using test::code_of;
using test::DirtyRam;
using test::fetched;
using Numbers = std::vector<std::uint64_t>;

namespace {

constexpr BlockId ram_block{0}, video_block{1};

/// A source that fails where the test says, and counts.
struct Scripted {
  static constexpr DirtyFetch fetches = DirtyFetch::complete_when_stopped;

  explicit Scripted(std::uint64_t bits = 0) : word(bits) {}

  Result<void> start() noexcept {
    ++starts;
    if (start_error != 0) return fail_errno(Stage::none, "start", start_error);
    on = true;
    return {};
  }
  Result<void> fetch(BlockId, std::span<std::uint64_t> bitmap) noexcept {
    if (fetch_error != 0) return fail_errno(Stage::none, "fetch", fetch_error);
    bitmap[0] |= word;
    return {};
  }
  Result<void> rearm(BlockId, std::uint64_t, std::span<const std::uint64_t> bitmap) noexcept {
    if (rearm_error != 0) return fail_errno(Stage::none, "rearm", rearm_error);
    word &= ~bitmap[0];
    return {};
  }
  bool needs_rearm() const noexcept { return true; }
  Result<void> stop() noexcept {
    ++stops;
    on = false;
    if (stop_error != 0) return fail_errno(Stage::none, "stop", stop_error);
    return {};
  }
  std::size_t page_bytes() const noexcept { return 65536; }

  std::uint64_t word;
  int start_error = 0, fetch_error = 0, rearm_error = 0, stop_error = 0;
  int starts = 0, stops = 0;
  bool on = false;
};

std::error_code system(int value) { return {value, std::system_category()}; }

}  // namespace

TEST_CASE("A union reports what any of its sources reports, and re-arms all") {
  const DirtyRam ram;
  auto devices = DirtyPages::create(ram.map);
  REQUIRE(devices.has_value());
  Scripted vcpus(0b1100);
  DirtyUnion both(vcpus, *devices);
  CHECK(both.fetches == DirtyFetch::complete_when_stopped);
  CHECK(both.needs_rearm());
  CHECK(both.page_bytes() == 65536);
  CHECK(DirtyUnion<DirtyPages>(*devices).fetches == DirtyFetch::complete);
  CHECK(!DirtyUnion<DirtyPages>(*devices).needs_rearm());

  REQUIRE(both.start().has_value());
  devices->mark(ram_block, 1, 1);
  CHECK(fetched(both, ram.map, ram_block) == Numbers{0, 2, 3});
  const Numbers sent{0b101};
  REQUIRE(both.rearm(ram_block, 0, sent).has_value());
  CHECK(fetched(both, ram.map, ram_block) == Numbers{3});
}

TEST_CASE("A union of which one source does not start is off, and says that source's error") {
  Scripted first, second, third;
  second.start_error = EBUSY;
  DirtyUnion all(first, second, third);
  CHECK(code_of(all.start()) == system(EBUSY));
  CHECK(!first.on);
  CHECK(third.starts == 0);
}

TEST_CASE("A union keeps what was reported before the source that fails") {
  const DirtyRam ram;
  Scripted first(0b1), second(0b10);
  second.fetch_error = EIO;
  DirtyUnion both(first, second);
  REQUIRE(both.start().has_value());
  auto bitmap = bitmap_of(ram.map, ram_block);
  CHECK(code_of(both.fetch(ram_block, bitmap)) == system(EIO));
  CHECK(bitmap[0] == 0b1);
  second.fetch_error = 0;
  first.rearm_error = ENXIO;
  CHECK(code_of(both.rearm(ram_block, 0, bitmap)) == system(ENXIO));
}

TEST_CASE("A union stops all of its sources, also when the first does not want to") {
  Scripted first, second, third;
  first.stop_error = EBADF;
  third.stop_error = EIO;
  DirtyUnion all(first, second, third);
  REQUIRE(all.start().has_value());
  CHECK(code_of(all.stop()) == system(EBADF));
  CHECK(second.stops == 1);
  CHECK(third.stops == 1);
}

TEST_CASE("DirtyPages marks the pages of any bytes, and drops what was marked before it is started") {
  const DirtyRam ram;
  auto pages = DirtyPages::create(ram.map);
  REQUIRE(pages.has_value());
  pages->mark(ram_block, 0, ram.map.block(ram_block).bytes);
  REQUIRE(pages->start().has_value());
  CHECK(fetched(*pages, ram.map, ram_block).empty());
  pages->mark(ram_block, 63 * 4096 + 4095, 2);  // the last byte of a word's last page, and the next
  pages->mark(ram_block, 303 * 4096 + 4095, 1);
  pages->mark(ram_block, 0, 0);
  pages->mark(ram_block, 304 * 4096, 0);
  pages->mark(video_block, 4096, 4096);
  CHECK(fetched(*pages, ram.map, ram_block) == Numbers{63, 64, 303});
  CHECK(fetched(*pages, ram.map, video_block) == Numbers{1});
  pages->mark(ram_block, 0, ram.map.block(ram_block).bytes);
  CHECK(fetched(*pages, ram.map, ram_block).size() == 304);
}

TEST_CASE("DirtyFromHooks refuses hooks that cannot work, and hands on what a hook says") {
  const DirtyRam ram;
  CHECK(code_of(DirtyFromHooks::create(ram.map, {})) == Errc::bad_option);
  const auto fetch = [](BlockId, std::span<std::uint64_t>) -> Result<void> {
    return fail_errno(Stage::none, "vhost", EIO);
  };
  CHECK(code_of(DirtyFromHooks::create(ram.map, {.fetch = fetch, .page_bytes = 4095})) == Errc::bad_option);

  int stops = 0, start_error = EPERM;
  {
    auto hooks = DirtyFromHooks::create(ram.map, {.start = [&]() -> Result<void> {
                                                    if (start_error == 0) return {};
                                                    return fail_errno(Stage::none, "vhost", start_error);
                                                  },
                                                  .fetch = fetch,
                                                  .stop = [&]() -> Result<void> {
                                                    ++stops;
                                                    return {};
                                                  }});
    REQUIRE(hooks.has_value());
    auto bitmap = bitmap_of(ram.map, ram_block);
    CHECK(code_of(hooks->start()) == system(EPERM));
    CHECK(code_of(hooks->fetch(ram_block, bitmap)) == Errc::already_closed);
    start_error = 0;
    REQUIRE(hooks->start().has_value());
    CHECK(code_of(hooks->fetch(ram_block, bitmap)) == system(EIO));
    CHECK(stops == 0);
    DirtyFromHooks moved(std::move(*hooks));
  }
  CHECK(stops == 1);  // by the one that was on when it was destroyed
}
