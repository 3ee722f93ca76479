// SPDX-License-Identifier: MIT
//
// Every order in which two sides can send, read, die and lose their connection during a switchover: at most one guest
// runs, and where none runs, a text says where the whole guest is. The search also has to find mistakes that are put into
// a side on purpose: what finds none of them proves nothing.
#include <doctest/doctest.h>

#include <deque>
#include <fstream>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/migrate/ownership.hpp"

using namespace multifd::migrate;

namespace {

enum class Said : char { state = 's', loaded = 'l', run = 'r', running = 'g', failed = 'x', end = 'e' };

/// Who talks to whom. On demand, the destination gets the rest of the memory behind RUNNING, over connections that are made
/// again whenever they are lost. A QEMU runs the guest as soon as it has read the stream's end, and at the source again unless it has
/// read SHUT(0).
enum class Pair { own, to_qemu, from_qemu, own_on_demand };

/// What a side does wrong.
enum class Mistake {
  none,
  hands_over_after_write,   ///< hand_over() behind the write that it is about
  resumes_when_unknown,     ///< the source runs the guest again whenever the connection breaks
  believes_any_failed,      ///< the source runs the guest again behind RUNNING, because a FAILED comes
  starts_when_loaded,       ///< the destination does not wait for HAND_OVER
  fails_without_refusing,   ///< FAILED goes out, and HAND_OVER is obeyed all the same
  refuses_while_running,    ///< FAILED goes out though the guest runs
  starts_without_allowing,  ///< the guest is started ahead of run_allowed(), so that the texts lie
  whole_too_early,          ///< on demand: memory_there() of a guest that lacks memory
};

/// Both sides, the connection between them, and what each has done so far. A value: exploring copies it.
struct World {
  Pair pair = Pair::own;
  Mistake mistake = Mistake::none;
  SourceOwnership source;
  DestinationOwnership destination{Peer::own};
  std::deque<Said> to_destination, to_source;
  bool cut = false;  ///< what is under way arrives or not; nothing new does
  bool source_alive = true, destination_alive = true;
  bool source_runs = false, destination_runs = false;  ///< the guest was stopped when the switchover began
  unsigned source_at = 0, destination_at = 0;          ///< where each is in its code
  bool memory_there = false;                           ///< on demand: the destination has all pages
  bool source_gave_up = false;                         ///< on demand: it gives no more

  std::string key() const {
    std::string text;
    for (const Said each : to_destination) text += static_cast<char>(each);
    text += '|';
    for (const Said each : to_source) text += static_cast<char>(each);
    for (const bool each : {cut, source_alive, destination_alive, source_runs, destination_runs, source.may_run(),
                            destination.may_run(), memory_there, source_gave_up})
      text += each ? '1' : '0';
    return text + std::to_string(source_at) + '.' + std::to_string(destination_at) +
           std::string(to_string(source.owner())) + std::string(source.text()) + std::string(destination.text());
  }
};

using Step = std::function<void(World&)>;

Said read(std::deque<Said>& queue) {
  const Said said = queue.front();
  queue.pop_front();
  return said;
}

void write(const World& world, std::deque<Said>& queue, Said said) {
  if (!world.cut) queue.push_back(said);
}

/// The side's guest goes on, if it may.
void resume(World& w) { w.source_runs = w.source_runs || w.source.may_run(); }

/// What the source can do next. It runs the guest again as soon as it knows of a loss and may.
void source_steps(const World& w, const std::function<void(Step)>& can) {
  if (!w.source_alive || w.source_runs) return;
  const bool own = w.pair == Pair::own || w.pair == Pair::own_on_demand;
  const bool late = w.mistake == Mistake::hands_over_after_write;
  const bool done = w.source.owner() == Owner::destination;
  if (done && w.mistake != Mistake::believes_any_failed) return;
  switch (w.source_at) {
    case 0:  // the rest of the state; to a QEMU that lets it run
      if (own)
        can([](World& n) {
          if (n.pair == Pair::own_on_demand) n.source.memory_follows();
          write(n, n.to_destination, Said::state), n.source_at = 1;
        });
      else
        can([](World& n) { n.source_at = 2; });
      break;
    case 1:  // waits for LOADED, and may be told FAILED
      if (!w.to_source.empty())
        can([](World& n) {
          const Said said = read(n.to_source);
          if (said == Said::failed) n.source.refused(), resume(n);
          if (said == Said::loaded) n.source_at = 2;
        });
      break;
    case 2:  // from here on the destination may run it
      can([late](World& n) {
        if (!late) n.source.hand_over();
        n.source_at = 3;
      });
      break;
    case 3: can([own](World& n) { write(n, n.to_destination, own ? Said::run : Said::state), n.source_at = 4; }); break;
    case 4: can([](World& n) { n.source.hand_over(), n.source_at = 5; }); break;
    default:
      if (!w.to_source.empty())
        can([](World& n) {
          const Said said = read(n.to_source);
          if (said == Said::running) n.source.running_there();
          if (said == Said::failed) n.source.refused();
          if (said == Said::failed && n.mistake == Mistake::believes_any_failed) n.source_runs = true;
          if (n.pair == Pair::from_qemu && said == Said::running) write(n, n.to_destination, Said::end);
          resume(n);
        });
  }
  if (done || !w.cut || !w.to_source.empty()) return;
  if (w.source.may_run()) can(resume);
  if (w.mistake == Mistake::resumes_when_unknown || w.pair == Pair::from_qemu)
    can([](World& n) { n.source_runs = true; });
}

/// A QEMU that takes the guest in.
void qemu_steps(const World& w, const std::function<void(Step)>& can) {
  if (w.destination_at == 0 && !w.to_destination.empty()) {
    can([](World& n) { read(n.to_destination), n.destination_runs = true, n.destination_at = 1; });
    can([](World& n) { read(n.to_destination), write(n, n.to_source, Said::failed), n.destination_at = 2; });
  } else if (w.destination_at == 1) {
    can([](World& n) { write(n, n.to_source, Said::running), n.destination_at = 2; });
  }
}

void destination_steps(const World& w, const std::function<void(Step)>& can) {
  if (!w.destination_alive) return;
  if (w.pair == Pair::to_qemu) return qemu_steps(w, can);
  const bool own = w.pair == Pair::own || w.pair == Pair::own_on_demand;
  const auto fail = [](World& n) {
    if (n.mistake != Mistake::fails_without_refusing) n.destination.refuse();
    write(n, n.to_source, Said::failed);
    if (n.mistake != Mistake::fails_without_refusing) n.destination_at = 9;
  };
  switch (w.destination_at) {
    case 0:  // reads the state, and loads it
      if (w.to_destination.empty()) break;
      can([](World& n) {
        if (n.pair == Pair::own_on_demand) n.destination.memory_follows();
        read(n.to_destination), n.destination.loaded(), n.destination_at = 1;
      });
      can([fail](World& n) { read(n.to_destination), fail(n), n.destination_at = 9; });
      break;
    case 1:
      can([own](World& n) {
        if (!own) n.destination.confirming();
        write(n, n.to_source, own ? Said::loaded : Said::running);
        n.destination_at = 2;
        if (n.mistake == Mistake::starts_when_loaded) n.destination_runs = true;
      });
      break;
    case 2:  // waits to be allowed to run it; its user may cancel
      if (!w.to_destination.empty())
        can([](World& n) {
          read(n.to_destination);
          if (n.mistake != Mistake::starts_without_allowing) n.destination.run_allowed();
          n.destination_at = 3;
        });
      if (own) can(fail);
      break;
    case 3:  // starts the guest, or cannot
      can([own](World& n) {
        n.destination_runs = n.destination.may_run() || n.mistake == Mistake::starts_without_allowing;
        n.destination.running();
        n.destination_at = own ? 4 : 9;
      });
      if (own) can(fail);
      break;
    case 4:
      can([](World& n) { write(n, n.to_source, Said::running), n.destination_at = 9; });
      if (w.mistake == Mistake::refuses_while_running) can(fail);
      if (w.mistake == Mistake::believes_any_failed)
        can([](World& n) {
          write(n, n.to_source, Said::running), write(n, n.to_source, Said::failed), n.destination_at = 9;
        });
      break;
    default: break;
  }
}

/// What page connections do, which are there whether the main connection is cut or not.
void page_steps(const World& w, const std::function<void(Step)>& can) {
  if (w.pair != Pair::own_on_demand || !w.destination_runs || !w.destination_alive) return;
  const bool gives = w.source_alive && w.source_at >= 4 && !w.source_gave_up && !w.source_runs;
  const bool early = w.mistake == Mistake::whole_too_early;
  if (gives && !w.memory_there) can([](World& n) { n.memory_there = true, n.destination.memory_there(); });
  // Not for ever: a state in which nothing changes any more is an end.
  const auto changes = [&](void (DestinationOwnership::*call)() noexcept) {
    DestinationOwnership next = w.destination;
    (next.*call)();
    return next.text() != w.destination.text();
  };
  if (early && !w.memory_there && changes(&DestinationOwnership::memory_there))
    can([](World& n) { n.destination.memory_there(); });
  // The destination's word that it needs nothing more.
  if (w.memory_there && gives) can([](World& n) { n.source.memory_there(), n.source_gave_up = true; });
  // The user of a source whose connections are all lost.
  if (gives && !w.memory_there) can([](World& n) { n.source.memory_lost(), n.source_gave_up = true; });
  if (!gives && !w.memory_there && changes(&DestinationOwnership::memory_lost))
    can([](World& n) { n.destination.memory_lost(); });
}

void losses(const World& w, const std::function<void(Step)>& can) {
  if (!w.cut) {
    can([](World& n) { n.cut = true; });
    // What is under way is lost from its end.
    for (std::size_t kept = 0; kept < w.to_destination.size(); ++kept)
      can([kept](World& n) { n.cut = true, n.to_destination.resize(kept); });
    for (std::size_t kept = 0; kept < w.to_source.size(); ++kept)
      can([kept](World& n) { n.cut = true, n.to_source.resize(kept); });
  }
  if (w.source_alive) can([](World& n) { n.source_alive = false, n.source_runs = false, n.cut = true; });
  if (w.destination_alive) can([](World& n) { n.destination_alive = false, n.destination_runs = false, n.cut = true; });
}

struct Seen {
  std::size_t states = 0, ended_at_source = 0, ended_at_destination = 0, ended_unknown = 0, dead = 0;
  bool refused_behind_hand_over = false;  ///< the guest came back to the source
  std::string wrong;                      ///< what must not be, and where
};

/// What is wrong with a state in which both sides have done all that they can, or nothing.
std::string wrong_at_end(const World& w) {
  const bool both = w.source_alive && w.destination_alive;
  const bool our_source = w.pair != Pair::from_qemu, our_destination = w.pair != Pair::to_qemu;
  if (both && !w.source_runs && !w.destination_runs && w.cut && w.source.owner() != Owner::unknown &&
      w.destination.owner() != Owner::unknown)
    return "both live, nobody runs the guest, and nobody says so";
  if (our_source && w.source_alive && !w.source_runs && w.cut && w.source.owner() == Owner::source)
    return "the source says that it runs the guest, and does not";
  if (our_destination && w.destination_alive && w.destination_runs != (w.destination.owner() == Owner::destination))
    return "the destination says something else than it does";
  if (w.pair == Pair::own_on_demand && w.destination_alive && w.destination_runs) {
    const bool says_whole = w.destination.text() == "the guest runs at the destination";
    if (says_whole != w.memory_there) return "what the destination says of the memory is not so";
  }
  if (w.pair == Pair::own_on_demand && w.source_alive && w.source.owner() == Owner::destination) {
    const bool says_whole = w.source.text() == "the guest runs at the destination";
    if (says_whole && !w.memory_there) return "the source says that the memory is there";
  }
  return {};
}

Seen explore(Pair pair, Mistake mistake = Mistake::none) {
  World first;
  first.pair = pair;
  first.mistake = mistake;
  first.destination = DestinationOwnership(pair == Pair::own || pair == Pair::own_on_demand ? Peer::own : Peer::qemu);
  Seen seen;
  std::set<std::string> known;
  std::deque<World> open{first};
  while (!open.empty() && seen.wrong.empty()) {
    const World w = open.front();
    open.pop_front();
    if (!known.insert(w.key()).second) continue;
    ++seen.states;
    const auto wrong = [&](std::string_view what) { seen.wrong = std::string(what) + ": " + w.key(); };
    if (w.source_runs && w.destination_runs) wrong("two run");
    // Also between the two: neither may start while the other can.
    if (w.source.may_run() && w.destination.may_run()) wrong("both may run");
    bool more = false;
    const auto can = [&](const Step& step) {
      more = true;
      open.push_back(w);
      step(open.back());
    };
    source_steps(w, can);
    destination_steps(w, can);
    page_steps(w, can);
    const bool acts = more;
    losses(w, can);
    if (acts) continue;  // not an end: a side can still act
    if (const std::string found = wrong_at_end(w); !found.empty()) wrong(found);
    if (w.source_runs) {
      ++seen.ended_at_source;
      seen.refused_behind_hand_over = seen.refused_behind_hand_over || w.source_at == 5;
    } else if (w.destination_runs) {
      ++seen.ended_at_destination;
    } else if (!w.source_alive || !w.destination_alive) {
      ++seen.dead;
    } else if (w.cut) {
      ++seen.ended_unknown;
    }
  }
  return seen;
}

void print(const Seen& seen) {
  MESSAGE(seen.states, " states; ends: source ", seen.ended_at_source, ", destination ", seen.ended_at_destination,
          ", unknown ", seen.ended_unknown, ", a side dead ", seen.dead);
}

// ---- The table at the head of ownership.hpp

/// The table's rows: "what was lost" -> what it says of source and destination.
std::vector<std::vector<std::string>> table_of_the_header() {
  std::string root = __FILE__;
  root.resize(root.rfind("tests/unit/migrate"));
  std::ifstream in(root + "include/multifd/migrate/ownership.hpp");
  REQUIRE(in.good());
  std::vector<std::vector<std::string>> rows;
  std::size_t source = 0, destination = 0;
  for (std::string line; std::getline(in, line);) {
    const auto cell = [&](std::size_t from, std::size_t to) {
      std::string text = line.substr(std::min(from, line.size()), to - from);
      text.erase(text.find_last_not_of(' ') + 1);
      return text;
    };
    if (line.starts_with("//   what was lost")) {
      source = line.find("source");
      destination = line.find("destination");
    } else if (source != 0) {
      if (line == "//") break;
      rows.push_back({cell(5, source), cell(source, destination), cell(destination, line.size())});
    }
  }
  return rows;
}

std::string said_of(const SourceOwnership& source) {
  switch (source.owner()) {
    case Owner::source: return "runs the guest again";
    case Owner::destination: return "is done";
    case Owner::unknown: break;
  }
  return "stands still: \"unknown\"";
}

}  // namespace

TEST_CASE("At most one guest runs, whatever is lost when: two ends of ours") {
  const Seen seen = explore(Pair::own);
  print(seen);
  CHECK_MESSAGE(seen.wrong.empty(), seen.wrong);
  CHECK(seen.states > 100);
  CHECK(seen.ended_at_source > 0);
  CHECK(seen.ended_at_destination > 0);
  CHECK(seen.ended_unknown > 0);
  CHECK(seen.refused_behind_hand_over);
}

TEST_CASE("The same where the memory follows, and each side says what it knows of that") {
  const Seen seen = explore(Pair::own_on_demand);
  print(seen);
  CHECK_MESSAGE(seen.wrong.empty(), seen.wrong);
  CHECK(seen.ended_at_source > 0);
  CHECK(seen.ended_at_destination > 0);
  CHECK(seen.ended_unknown > 0);
  CHECK(seen.refused_behind_hand_over);
}

TEST_CASE("The same with a QEMU at the other end") {
  for (const Pair pair : {Pair::to_qemu, Pair::from_qemu}) {
    CAPTURE(static_cast<int>(pair));
    const Seen seen = explore(pair);
    print(seen);
    CHECK_MESSAGE(seen.wrong.empty(), seen.wrong);
    CHECK(seen.ended_at_source > 0);
    CHECK(seen.ended_at_destination > 0);
    CHECK(seen.ended_unknown > 0);
  }
}

TEST_CASE("The search finds every mistake that is put into a side") {
  for (const Mistake mistake :
       {Mistake::hands_over_after_write, Mistake::resumes_when_unknown, Mistake::believes_any_failed,
        Mistake::starts_when_loaded, Mistake::fails_without_refusing, Mistake::refuses_while_running,
        Mistake::starts_without_allowing}) {
    CAPTURE(static_cast<int>(mistake));
    const Seen seen = explore(Pair::own, mistake);
    CHECK_FALSE(seen.wrong.empty());
    MESSAGE(seen.wrong);
  }
  for (const Mistake mistake : {Mistake::hands_over_after_write, Mistake::resumes_when_unknown,
                                Mistake::starts_when_loaded, Mistake::whole_too_early}) {
    CAPTURE(static_cast<int>(mistake));
    CHECK_FALSE(explore(Pair::own_on_demand, mistake).wrong.empty());
  }
  for (const Mistake mistake : {Mistake::hands_over_after_write, Mistake::resumes_when_unknown}) {
    CAPTURE(static_cast<int>(mistake));
    CHECK_FALSE(explore(Pair::to_qemu, mistake).wrong.empty());
  }
  for (const Mistake mistake : {Mistake::starts_when_loaded, Mistake::starts_without_allowing})
    CHECK_FALSE(explore(Pair::from_qemu, mistake).wrong.empty());
}

TEST_CASE("What the head of ownership.hpp says of each loss is so") {
  const auto rows = table_of_the_header();
  CHECK(rows.size() == 6);
  for (const auto& row : rows) {
    CAPTURE(row[0]);
    SourceOwnership source;
    DestinationOwnership destination(Peer::own);
    destination.loaded();
    const bool before = row[0] == "anything before HAND_OVER is written";
    const bool arrives = !before && !row[0].starts_with("HAND_OVER, or the peer");
    if (!before) source.hand_over();
    if (arrives) destination.run_allowed();
    const bool failed = row[0].contains("FAILED");
    if (arrives && failed) destination.refuse();
    if (arrives && !failed) destination.running();
    if (row[0] == "nothing: RUNNING is read") source.running_there();
    if (row[0] == "nothing: FAILED is read") source.refused();
    CHECK(row[1] == said_of(source));
    CHECK(row[2] == (destination.may_run() ? "runs the guest"
                     : arrives             ? "does not run"
                                           : "never has HAND_OVER: does not run"));
    CHECK_FALSE((source.may_run() && destination.may_run()));
  }
}

TEST_CASE("Calls out of order change nothing") {
  SourceOwnership source;
  source.running_there();
  source.refused();
  CHECK(source.owner() == Owner::source);
  source.hand_over();
  source.running_there();
  source.refused();
  source.hand_over();
  CHECK(source.owner() == Owner::destination);

  DestinationOwnership early(Peer::own);
  early.run_allowed();
  early.running();
  CHECK_FALSE(early.may_run());
  early.refuse();
  early.loaded();
  early.run_allowed();
  CHECK_FALSE(early.may_run());

  DestinationOwnership destination(Peer::own);
  destination.loaded();
  destination.confirming();  // of a QEMU only
  CHECK(destination.owner() == Owner::source);
  destination.running();
  CHECK_FALSE(destination.may_run());
  destination.run_allowed();
  CHECK(destination.owner() == Owner::destination);

  DestinationOwnership broken = destination;
  broken.refuse();  // the guest did not start
  CHECK(broken.owner() == Owner::source);
  CHECK_FALSE(broken.may_run());

  destination.running();
  destination.refuse();
  destination.loaded();
  CHECK(destination.owner() == Owner::destination);
  CHECK(destination.text() == "the guest runs at the destination");
}

TEST_CASE("Each side says where the memory is that follows") {
  SourceOwnership source;
  DestinationOwnership destination(Peer::own);
  source.memory_there();  // nothing was handed over
  source.memory_lost();
  CHECK(source.owner() == Owner::source);
  source.memory_follows();
  destination.memory_follows();
  destination.loaded();
  CHECK(destination.text() == "not all of the guest's memory has arrived; it is at the source");
  source.hand_over();
  destination.run_allowed();
  destination.running();
  CHECK(destination.text() == "the guest runs at the destination, and the rest of its memory is at the source");

  SourceOwnership lost_track = source;  // RUNNING is lost, and then all pages are there
  CHECK(lost_track.owner() == Owner::unknown);
  lost_track.memory_lost();
  CHECK(lost_track.owner() == Owner::unknown);
  lost_track.memory_there();
  CHECK(lost_track.owner() == Owner::destination);
  CHECK(lost_track.text() == "the guest runs at the destination");

  source.running_there();
  CHECK(source.text() == "the guest runs at the destination, and needs the source until all of its memory is there");
  SourceOwnership gave_up = source;
  gave_up.memory_lost();
  gave_up.memory_there();
  CHECK(gave_up.text().starts_with("the guest runs at the destination without the rest of its memory"));
  DestinationOwnership stuck = destination;
  stuck.memory_lost();
  stuck.memory_there();
  CHECK(stuck.owner() == Owner::destination);
  CHECK(stuck.text().starts_with("the rest of the guest's memory is lost"));

  source.memory_there();
  destination.memory_there();
  CHECK(source.text() == "the guest runs at the destination");
  CHECK(destination.text() == "the guest runs at the destination");
  destination.memory_lost();
  CHECK(destination.text() == "the guest runs at the destination");
}
