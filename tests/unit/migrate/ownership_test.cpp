// SPDX-License-Identifier: MIT
//
// Every order in which two sides can send, read, die and lose their connection during a switchover: at most one guest
// runs, and where none runs, a text says where the whole guest is.
#include <doctest/doctest.h>

#include <deque>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <tuple>

#include "multifd/migrate/ownership.hpp"

using namespace multifd::migrate;

namespace {

enum class Said : char { state = 's', loaded = 'l', run = 'r', running = 'g', refused = 'x', end = 'e' };

/// Both sides, the connection between them, and what each has done so far. A value: exploring copies it.
struct World {
  Peer kind = Peer::own;
  SourceOwnership source;
  DestinationOwnership destination{Peer::own};
  std::deque<Said> to_destination, to_source;
  bool cut = false;  ///< what is under way arrives or not; nothing new does
  bool source_alive = true, destination_alive = true;
  bool source_runs = false, destination_runs = false;  ///< the guest was stopped when the switchover began
  unsigned source_at = 0, destination_at = 0;
  bool closed_in_order = false;

  std::string key() const {
    std::string text;
    for (const Said each : to_destination) text += static_cast<char>(each);
    text += '|';
    for (const Said each : to_source) text += static_cast<char>(each);
    for (const bool each : {cut, source_alive, destination_alive, source_runs, destination_runs, closed_in_order,
                            source.may_run(), destination.may_run()})
      text += each ? '1' : '0';
    return text + std::to_string(source_at) + std::to_string(destination_at) + std::string(to_string(source.owner())) +
           std::string(destination.text());
  }
};

using Step = std::function<void(World&)>;

std::optional<Said> read(std::deque<Said>& queue) {
  if (queue.empty()) return std::nullopt;
  const Said said = queue.front();
  queue.pop_front();
  return said;
}

void write(const World& world, std::deque<Said>& queue, Said said) {
  if (!world.cut) queue.push_back(said);
}

/// What the source can do next. It runs the guest again as soon as it knows of a loss and may.
void source_steps(const World& w, const std::function<void(Step)>& can) {
  if (!w.source_alive || w.source_runs || w.source.owner() == Owner::destination) return;
  const bool own = w.kind == Peer::own;
  switch (w.source_at) {
    case 0:
      can([own](World& n) {
        if (!own) n.source.hand_over();
        write(n, n.to_destination, Said::state);
        n.source_at = own ? 1 : 2;
      });
      break;
    case 1:
      if (!w.to_source.empty())
        can([](World& n) {
          const Said said = *read(n.to_source);
          if (said == Said::refused) n.source_runs = n.source.may_run();
          if (said != Said::loaded) return;
          n.source.hand_over();
          write(n, n.to_destination, Said::run);
          n.source_at = 2;
        });
      break;
    case 2:
      if (!w.to_source.empty())
        can([own](World& n) {
          const Said said = *read(n.to_source);
          if (said == Said::running) n.source.running_there();
          if (said == Said::refused) n.source.refused();
          if (!own && said == Said::running) write(n, n.to_destination, Said::end);
          if (n.source.may_run()) n.source_runs = true;
        });
      break;
    default: break;
  }
  if (w.cut && w.to_source.empty() && w.source.may_run()) can([](World& n) { n.source_runs = true; });
}

void destination_steps(const World& w, const std::function<void(Step)>& can) {
  if (!w.destination_alive || w.destination_runs || w.to_destination.empty()) return;
  for (const bool works : {true, false}) {  // loading or starting the guest
    can([works](World& n) {
      const bool own = n.kind == Peer::own;
      const Said said = *read(n.to_destination);
      const auto refuse = [&n] {
        n.destination.refuse();
        write(n, n.to_source, Said::refused);
      };
      if (said == Said::state) {
        if (!works) return refuse();
        n.destination.loaded();
        if (!own) n.destination.confirming();
        write(n, n.to_source, own ? Said::loaded : Said::running);
      } else if (said == Said::run || said == Said::end) {
        if (!works && own) return refuse();
        n.destination.run_allowed();
        if (n.destination.may_run()) n.destination_runs = true;
        if (own) write(n, n.to_source, Said::running);
      }
    });
  }
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
};

Seen explore(Peer kind) {
  World first;
  first.kind = kind;
  first.destination = DestinationOwnership(kind);
  Seen seen;
  std::set<std::string> known;
  std::deque<World> open{first};
  while (!open.empty()) {
    const World w = open.front();
    open.pop_front();
    if (!known.insert(w.key()).second) continue;
    ++seen.states;
    INFO("state ", w.key());
    REQUIRE_FALSE((w.source_runs && w.destination_runs));
    // Also between the two: neither may start while the other can.
    REQUIRE_FALSE((w.source.may_run() && w.destination.may_run()));
    bool more = false;
    const auto can = [&](const Step& step) {
      more = true;
      open.push_back(w);
      step(open.back());
    };
    source_steps(w, can);
    destination_steps(w, can);
    const bool acts = more;
    losses(w, can);
    if (acts) continue;  // not an end: a side can still act
    if (w.source_runs)
      ++seen.ended_at_source;
    else if (w.destination_runs)
      ++seen.ended_at_destination;
    else if (!w.source_alive || !w.destination_alive)
      ++seen.dead;
    else if (w.cut) {
      // Both live, nobody runs the guest: a side must say that it does not know.
      REQUIRE((w.source.owner() == Owner::unknown || w.destination.owner() == Owner::unknown));
      ++seen.ended_unknown;
    }
    // A side that lives and does not run the guest never says that it runs here.
    if (w.source_alive && !w.source_runs && w.cut) REQUIRE(w.source.owner() != Owner::source);
    if (w.destination_alive && !w.destination_runs) REQUIRE(w.destination.owner() != Owner::destination);
  }
  return seen;
}

}  // namespace

TEST_CASE("At most one guest runs, whatever is lost when: two ends of ours") {
  const Seen seen = explore(Peer::own);
  MESSAGE(seen.states, " states; ends: source ", seen.ended_at_source, ", destination ", seen.ended_at_destination,
          ", unknown ", seen.ended_unknown, ", a side dead ", seen.dead);
  CHECK(seen.states > 50);
  CHECK(seen.ended_at_source > 0);
  CHECK(seen.ended_at_destination > 0);
  CHECK(seen.ended_unknown > 0);
}

TEST_CASE("The same with a side that speaks QEMU's messages only") {
  const Seen seen = explore(Peer::qemu);
  MESSAGE(seen.states, " states; ends: source ", seen.ended_at_source, ", destination ", seen.ended_at_destination,
          ", unknown ", seen.ended_unknown, ", a side dead ", seen.dead);
  CHECK(seen.ended_at_destination > 0);
  CHECK(seen.ended_unknown > 0);
}

TEST_CASE("Calls out of order change nothing") {
  SourceOwnership source;
  source.running_there();
  source.refused();
  CHECK(source.owner() == Owner::source);
  source.hand_over();
  source.running_there();
  source.refused();
  CHECK(source.owner() == Owner::destination);
  DestinationOwnership destination(Peer::own);
  destination.run_allowed();
  CHECK_FALSE(destination.may_run());
  destination.refuse();
  destination.loaded();
  destination.run_allowed();
  CHECK_FALSE(destination.may_run());
}
