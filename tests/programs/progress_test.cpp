// SPDX-License-Identifier: MIT
#include "common/progress.hpp"

#include <doctest/doctest.h>

using namespace program;
using namespace std::chrono_literals;

namespace {

constexpr Patience::Clock::time_point start{};

Snapshot moving(int moved) {
  return {.line = "round 3", .moved = static_cast<std::uint64_t>(moved), .stalled = "Is it stopped?"};
}

Snapshot again(int moved) {
  return {.line = "round 3",
          .moved = static_cast<std::uint64_t>(moved),
          .again = true,
          .endless = "Does it write too fast?"};
}

/// The seconds, of the next `seconds`, in which something is said.
template <class Take>
std::vector<int> said(Patience& patience, int from, int seconds, const Take& take) {
  std::vector<int> when;
  for (int i = from; i < from + seconds; ++i)
    if (!patience.look(take(i), start + std::chrono::seconds(i)).empty()) when.push_back(i);
  return when;
}

}  // namespace

TEST_CASE("A hint that nothing moves comes after the limit, and then each time after twice as long") {
  Patience patience(20s, start);
  CHECK(said(patience, 0, 700, [](int) { return moving(0); }) == std::vector{20, 40, 80, 160, 320, 640});
  CHECK(patience.still() == 699s);
}

TEST_CASE("The hint names the work, how long nothing has moved, and the likely causes") {
  Patience patience(20s, start);
  CHECK(patience.look(moving(5), start + 1s).empty());
  CHECK(patience.look(moving(5), start + 22s) == "round 3: nothing has moved for 21 s. Is it stopped?");
  CHECK(patience.look(moving(5), start + 601s) == "round 3: nothing has moved for 10 min. Is it stopped?");
}

TEST_CASE("While something moves no hint comes, and after a stand-still the limit begins anew") {
  Patience patience(20s, start);
  CHECK(said(patience, 0, 1000, [](int i) { return moving(i / 19); }).empty());
  CHECK(patience.still() < 20s);
  CHECK(said(patience, 1000, 50, [](int) { return moving(999); }) == std::vector{1020, 1040});
  CHECK(said(patience, 1050, 50, [](int) { return moving(1000); }) == std::vector{1070, 1090});
}

TEST_CASE("A limit below a second works") {
  Patience patience(100ms, start);
  CHECK(patience.look(moving(0), start + 99ms).empty());
  CHECK(patience.look(moving(0), start + 100ms) == "round 3: nothing has moved for 0.1 s. Is it stopped?");
}

TEST_CASE("A limit of 0 is none: no hint is ever due") {
  Patience patience(0s, start);
  CHECK(said(patience, 0, 700, [](int) { return moving(0); }).empty());
  CHECK(said(patience, 700, 700, [](int i) { return again(i); }).empty());
}

TEST_CASE("Without likely causes there is no hint") {
  Patience patience(20s, start);
  CHECK(said(patience, 0, 100, [](int) { return Snapshot{.line = "measuring"}; }).empty());
  CHECK(said(patience, 100, 100, [](int i) {
          Snapshot quiet = again(i);
          quiet.endless.clear();
          return quiet;
        }).empty());
}

TEST_CASE("A hint about sending again comes when that takes as long as everything before, and the limit") {
  Patience quick(20s, start);  // all memory has come after 3 s
  CHECK(said(quick, 0, 100, [](int i) { return i < 3 ? moving(i + 1) : again(i); }) == std::vector{23, 43, 83});
  Patience slow(20s, start);  // after 100 s
  CHECK(said(slow, 0, 500, [](int i) { return i < 100 ? moving(i + 1) : again(i); }) == std::vector{200, 300});
  CHECK(slow.look(again(1), start + 500s) ==
        "round 3: all memory had come once 7 min ago, and the source goes on. Does it write too fast?");
}
