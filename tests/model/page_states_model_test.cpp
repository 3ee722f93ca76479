// SPDX-License-Identifier: MIT
//
// How the threads of a LazyMemory share pages (PageStates) and keep removals and placing apart (PlacementGate), under every
// order of a few steps; and protocols with one mistake each, which have to be found.
#include "model/instrument.hpp"

#include <doctest/doctest.h>

#include "model/report.hpp"
#include "multifd/postcopy/page_states.hpp"
#include "multifd/postcopy/placement_gate.hpp"

using namespace multifd::postcopy;
using model::expect;
using model::report;
using model::Run;
using From = PageStates::From;

namespace {

enum class Mistake {
  none,
  forgets_wanted_at_zero,    ///< a worker that finds a zero page does not look whether a fault waits
  puts_zero_back,            ///< a worker begins to place what is known to be zero, and puts it back
  places_twice,              ///< bytes are put in without begin_place()
  gives_back_after_placing,  ///< a lost worker gives back also what is placed: as absent
  ignores_gate,              ///< a worker places while removals are read
};

/// Unit 1 is zero, the others are not.
struct Guest {
  explicit Guest(unsigned units) : states(std::move(*PageStates::create(units))), times_placed(units) {
    for (unsigned u = 0; u < units; ++u) states.mark_missing(u);
  }
  static bool is_zero(std::uint64_t unit) { return unit == 1; }

  PageStates states;
  std::vector<unsigned> times_placed;
  std::vector<std::uint64_t> demanded;  ///< as DemandQueue: under a mutex there, one step here
  unsigned all_known = 0;

  /// The kernel: a page is put in, and who waits is woken.
  void put(std::uint64_t unit) {
    model::point();
    expect(++times_placed[unit] == 1, "a page is placed once");
  }
  void place(std::uint64_t unit, From most) {
    const From from = states.begin_place(unit, most);
    if (from == From::nowhere) return;
    put(unit);
    if (states.end_place(unit, from)) ++all_known;
  }

  /// What a worker does with what has come.
  void answer(std::uint64_t unit, Mistake mistake) {
    if (mistake == Mistake::places_twice) {
      put(unit);
      return place(unit, From::unknown);
    }
    if (mistake == Mistake::puts_zero_back) {
      const From from = states.begin_place(unit, From::zero);
      if (from == From::zero) return states.undo_place(unit, from);
      if (from == From::nowhere) return;
      states.undo_place(unit, from);
    }
    if (!is_zero(unit)) return place(unit, From::unknown);
    const auto noted = states.note_zero(unit);
    if (noted.all_known) ++all_known;
    if (noted.wanted && mistake != Mistake::forgets_wanted_at_zero) place(unit, From::zero);
  }
  /// A worker until nothing is absent. Its first answers are lost.
  void work(unsigned lost, Mistake mistake) {
    for (;;) {
      std::uint64_t unit = 0;
      bool claimed = false;
      if (!demanded.empty()) {
        unit = demanded.back();
        demanded.pop_back();
        if (states.state(unit) != PageState::absent && states.state(unit) != PageState::claimed) continue;
        claimed = states.claim(unit);
      } else {
        unit = states.next_absent(0, states.size());
        if (unit == states.size()) return;
        if (!states.claim(unit)) continue;
        claimed = true;
      }
      if (lost > 0) {
        --lost;
        const bool wanted = claimed && states.give_back(unit);
        if (wanted) demanded.push_back(unit);
        if (mistake == Mistake::gives_back_after_placing) states.mark_missing(unit);
        if (!claimed) demanded.push_back(unit);  // as FetchWorker::lost() does with what a fault waits for
        continue;
      }
      answer(unit, mistake);
    }
  }
  /// A fault thread with a lane: asks itself, whoever else has. Its first answers are lost.
  void fault_with_lane(std::uint64_t unit, unsigned lost) {
    while (states.state(unit) == PageState::absent || states.state(unit) == PageState::claimed) {
      const bool claimed = states.claim(unit);
      if (lost == 0) break;
      --lost;
      if (claimed) static_cast<void>(states.give_back(unit));
    }
    place(unit, From::zero);
  }
  /// A fault thread without: leaves to the workers what is not known.
  void fault_without_lane(std::uint64_t unit) {
    for (;;) {
      switch (states.want(unit)) {
        case PageState::absent:
        case PageState::claimed: demanded.push_back(unit); return;
        case PageState::placing: return;  // who places it wakes
        case PageState::placed: return;
        case PageState::zero: place(unit, From::zero); break;
      }
    }
  }
};

void known_at_end(Run& run, const std::shared_ptr<Guest>& guest) {
  run.at_end([guest] {
    expect(guest->states.remaining() == 0, "all is known");
    expect(guest->all_known == 1, "that is told once");
    for (unsigned u = 0; u < guest->times_placed.size(); ++u)
      expect(guest->times_placed[u] == 1 || Guest::is_zero(u), "each page is placed");
  });
}

model::Explored urgent_and_background(Mistake mistake, unsigned units = 2) {
  return model::explore(1 + model::preemptions(), [=](Run& run) {
    auto guest = std::make_shared<Guest>(units);
    run.spawn([=] { guest->work(1, mistake); });
    run.spawn([=] { guest->work(0, mistake); });
    run.spawn([=] { guest->fault_with_lane(0, 1); });
    known_at_end(run, guest);
  });
}

/// A fault on each unit is served, whoever does.
model::Explored demanded(Mistake mistake) {
  return model::explore(1 + model::preemptions(), [=](Run& run) {
    auto guest = std::make_shared<Guest>(2);
    run.spawn([=] { guest->fault_without_lane(1), guest->fault_without_lane(0); });
    run.spawn([=] { guest->work(1, mistake); });
    run.spawn([=] { guest->work(0, mistake); });
    run.at_end([=] {
      // Workers end when nothing is absent: what comes later is the next one's.
      guest->work(0, mistake);
      expect(guest->states.remaining() == 0 && guest->all_known == 1, "all is known, and that is told once");
      for (const unsigned each : guest->times_placed) expect(each == 1, "who waits for a page gets it");
    });
  });
}

/// Two workers have asked for the same zero page, because a fault waits there.
model::Explored zero_twice(Mistake mistake) {
  return model::explore(1 + model::preemptions(), [=](Run& run) {
    auto guest = std::make_shared<Guest>(2);
    run.spawn([=] { guest->answer(1, mistake); });
    run.spawn([=] { guest->answer(1, mistake); });
    run.spawn([=] { guest->fault_without_lane(1); });
    run.at_end([=] {
      guest->work(0, Mistake::none);
      expect(guest->times_placed[1] == 1, "who waits for a page gets it");
    });
  });
}

/// The kernel around a removal: from the event on it refuses to place, and takes the page away some time after the event
/// has been read.
struct Removal {
  Guest guest{1};
  PlacementGate gate;
  std::atomic<bool> changing{false};
  std::atomic<bool> unread{false};
  bool taken = false;

  void balloon() {
    changing.store(true);
    unread.store(true);
    unread.notify_all();
    unread.wait(true);
    changing.store(false);
    changing.notify_all();
    model::point();
    taken = true;
  }
  void read() {
    unread.wait(false);
    gate.begin_remove();
    unread.store(false);
    unread.notify_all();
    if (guest.states.remove(0).all_known) ++guest.all_known;
    gate.end_remove();
  }
  void work(Mistake mistake) {
    for (;;) {
      if (mistake != Mistake::ignores_gate) gate.begin_place();
      const From from = guest.states.begin_place(0, From::unknown);
      const bool refused = from != From::nowhere && changing.load();
      if (refused) guest.states.undo_place(0, from);
      if (from != From::nowhere && !refused) {
        model::point();
        expect(!taken, "nothing comes back from the dead");
        if (guest.states.end_place(0, from)) ++guest.all_known;
      }
      if (mistake != Mistake::ignores_gate) gate.end_place();
      if (!refused) return;
      changing.wait(true);
    }
  }
};

model::Explored removal(Mistake mistake) {
  return model::explore(1 + model::preemptions(), [=](Run& run) {
    auto shared = std::make_shared<Removal>();
    run.spawn([=] { shared->balloon(); });
    run.spawn([=] { shared->read(); });
    run.spawn([=] { shared->work(mistake); });
    run.at_end([=] {
      expect(shared->guest.states.remaining() == 0 && shared->guest.all_known == 1, "all is known, told once");
      expect(shared->guest.states.state(0) == PageState::zero, "what was given back is zero");
    });
  });
}

}  // namespace

TEST_CASE("A page that a fault and two workers fetch, one of them lost, is placed once, and the end is told once") {
  report("lane and workers", urgent_and_background(Mistake::none));
}

TEST_CASE("A fault that is left to the workers is served, also where they are lost or find a zero page") {
  report("demanded", demanded(Mistake::none));
  report("zero twice", zero_twice(Mistake::none));
}

TEST_CASE("Nothing is placed where a removal has been read, and who was about to learns that") {
  report("removal", removal(Mistake::none));
}

TEST_CASE("The background waits at the gate until the last urgent request has its answer, and no wake-up is lost") {
  report("gate", model::explore(1 + model::preemptions(), [](Run& run) {
           auto gate = std::make_shared<UrgentGate>();
           auto urgent = std::make_shared<unsigned>(2);
           gate->enter(), gate->enter();
           run.spawn([=] { --*urgent, gate->leave(); });
           run.spawn([=] { --*urgent, gate->leave(); });
           run.spawn([=] {
             gate->wait(std::chrono::hours(1));
             expect(*urgent == 0, "nothing is urgent any more");
           });
         }));
}

TEST_CASE("Mistakes in the protocol are found") {
  CHECK(urgent_and_background(Mistake::places_twice).failure);
  CHECK(urgent_and_background(Mistake::gives_back_after_placing).failure);
  CHECK(demanded(Mistake::forgets_wanted_at_zero).failure);
  CHECK(zero_twice(Mistake::puts_zero_back).failure);
  CHECK(removal(Mistake::ignores_gate).failure);
}
