// SPDX-License-Identifier: MIT
//
// The two sides of a migration as two processes, of which one is killed, or stands still for a while, at an operation of
// its links that is drawn by lot: the other one comes back in time, with a text, and at most one guest runs; also when the
// one that stood still goes on.
//
// MULTIFD_KILLS says how many of each; 8 by default. With MULTIFD_TEST_FULL=1 each side stands still at every operation.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/migrate_ends.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 512;
enum Which : std::size_t { source, destination };

unsigned wanted_kills() { return how_often("MULTIFD_KILLS", 8); }

/// What one process tells the test's. It is in memory that all have.
struct Report {
  std::atomic<std::uint64_t> operations = 0;
  std::atomic<int> running = 0;  ///< its guests
  std::atomic<bool> beside = false;
  std::atomic<std::size_t> torn = 0;
  std::atomic<MigrationStatus> hit_in = MigrationStatus::none;  ///< the state in which it was hit
  bool completed = false;
  Owner owner{};
  std::array<char, 400> error{};
  std::array<char, 400> owner_text{};
  std::atomic<bool> ended = false;  ///< all above is there

  void end(Followed& followed, bool is_completed, const std::string& why) {
    completed = is_completed;
    owner = followed->owner();
    why.copy(error.data(), error.size() - 1);
    followed->owner_text().copy(owner_text.data(), owner_text.size() - 1);
    ended = true;
  }
};
struct Shared {
  std::array<Report, 2> sides;
  std::atomic<std::uint16_t> port = 0;
  std::atomic<bool> over = false;  ///< the processes may end
};

/// What happens to whom, and when.
struct Plan {
  Which victim = source;
  std::uint64_t at = Script::never;
  int signal = SIGKILL;
};

/// Two processes that migrate a guest from one to the other.
class Processes {
 public:
  Processes(const Plan& plan, std::size_t working_set) : plan_(plan) {
    void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    shared_ = new (memory) Shared;
    for (const Which side : {source, destination}) {
      pids_[side] = ::fork();
      REQUIRE(pids_[side] >= 0);
      if (pids_[side] != 0) continue;
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      try {
        side == source ? be_source(working_set) : be_destination();
      } catch (...) {
        ::_exit(3);
      }
      ::_exit(0);
    }
  }
  Processes(const Processes&) = delete;
  ~Processes() {
    shared_->over = true;
    for (const Which side : {source, destination}) {
      if (gone_[side]) continue;
      ::kill(pids_[side], SIGCONT);
      if (!wait_until([&] { return ::waitpid(pids_[side], nullptr, WNOHANG) == pids_[side]; })) {
        ::kill(pids_[side], SIGKILL);
        ::waitpid(pids_[side], nullptr, 0);
        CHECK_MESSAGE(false, "a side did not end");
      }
    }
    ::munmap(shared_, sizeof(Shared));
  }

  const Report& operator[](Which side) const { return shared_->sides[side]; }
  bool alive(Which side) const { return !gone_[side]; }
  int runs(Which side) const { return gone_[side] ? 0 : shared_->sides[side].running.load(); }

  /// Waits until the victim was hit, or has come back without. Whether it was hit.
  bool wait_for_hit() {
    int status = 0;
    bool hit = false;
    CHECK(wait_until([&] {
      hit = ::waitpid(pids_[plan_.victim], &status, WNOHANG | WUNTRACED) == pids_[plan_.victim];
      return hit || shared_->sides[plan_.victim].ended;
    }));
    if (!hit) hit = ::waitpid(pids_[plan_.victim], &status, WNOHANG | WUNTRACED) == pids_[plan_.victim];
    if (hit && !WIFSTOPPED(status)) gone_[plan_.victim] = true;
    if (hit && WIFEXITED(status)) FAIL_CHECK("a side has failed by itself: ", WEXITSTATUS(status));
    return hit;
  }
  void go_on() { ::kill(pids_[plan_.victim], SIGCONT); }
  /// Bounded by the side's own time limits.
  bool wait_for_end(Which side) {
    return wait_until([&] { return shared_->sides[side].ended.load(); });
  }

 private:
  template <class Condition>
  static bool wait_until(Condition&& holds) {
    for (const Stopwatch watch; watch.elapsed() < 40s; std::this_thread::sleep_for(200us))
      if (holds()) return true;
    return false;
  }

  std::function<void()> hit(Report& report, Followed& followed) const {
    return [&report, &followed, signal = plan_.signal] {
      report.hit_in = followed->progress().status;
      ::kill(::getpid(), signal);
    };
  }
  std::uint64_t moment_of(Which side) const { return side == plan_.victim ? plan_.at : Script::never; }

  void be_source(std::size_t working_set) {
    Report& report = shared_->sides[source];
    MigratingGuest here(pages);
    here.running_guests = &report.running;
    here.boot();
    here.run(working_set, 50us);
    if (!wait_until([&] { return shared_->port != 0; })) ::_exit(4);
    Followed followed;
    Script script(shared_->port, moment_of(source), hit(report, followed));
    const auto sent = send_guest(here, {.host = "127.0.0.1", .port = shared_->port},
                                 {.channels = 2,
                                  .converge = {.at_time_limit = Action::switch_now, .max_rounds = 4},
                                  .answer_timeout = 1s,
                                  .progress_timeout = 1s,
                                  .load_timeout = 1s,
                                  .farewell_timeout = 1s,
                                  .migration = &*followed.handle});
    report.operations = script.operations();
    report.end(followed, sent.has_value(), text(sent));
    stay(here);
  }

  void be_destination() {
    Report& report = shared_->sides[destination];
    There there(pages, {.first_timeout = 5s,
                        .accept_timeout = 2s,
                        .retry_timeout = 100ms,
                        .progress_timeout = 1s,
                        .save_timeout = 1s,
                        .hand_over_timeout = 1s});
    there.guest.running_guests = &report.running;
    Script script(there.address.port, moment_of(destination), hit(report, there.followed));
    there.begin();
    shared_->port = there.address.port;
    const auto taken = there.result();
    report.operations = script.operations();
    report.torn = there.guest.torn_when_resumed;
    report.end(there.followed, taken.has_value(), text(taken));
    stay(there.guest);
  }

  /// The guest goes on until the test has seen it.
  void stay(MigratingGuest& guest) {
    while (!shared_->over) std::this_thread::sleep_for(1ms);
    guest.stop();
  }

  const Plan plan_;
  Shared* shared_ = nullptr;
  std::array<pid_t, 2> pids_{};
  std::array<bool, 2> gone_{};
};

/// The operations of both sides of a migration that nothing happens to.
std::array<std::uint64_t, 2> operations() {
  Processes undisturbed({}, 16);
  for (const Which side : {source, destination}) {
    REQUIRE(undisturbed.wait_for_end(side));
    CHECK_MESSAGE(undisturbed[side].completed, undisturbed[side].error.data());
  }
  CHECK(undisturbed.runs(source) == 0);
  CHECK(undisturbed.runs(destination) == 1);
  return {undisturbed[source].operations, undisturbed[destination].operations};
}

std::uint64_t moment(Rng& rng, std::uint64_t end) {
  return below(rng, 2) == 0 ? below(rng, end) : end - std::min(end, below(rng, 12));
}

/// What a side that came back says, and does.
void check_side(const Processes& both, Which side) {
  const Report& report = both[side];
  const std::string_view owner_text = report.owner_text.data();
  CAPTURE(report.error.data());
  CAPTURE(owner_text);
  CHECK_FALSE(owner_text.empty());
  if (side == source) {
    CHECK(both.runs(source) == (report.owner == Owner::source));
    CHECK(report.completed == (report.owner == Owner::destination));
    if (report.owner == Owner::unknown) CHECK(owner_text.contains("look there"));
    if (report.owner == Owner::source) CHECK(owner_text.contains("runs there"));
  } else {
    CHECK(both.runs(destination) == report.completed);
    CHECK(report.torn == 0);
    if (!report.completed) CHECK(owner_text.contains("source"));
  }
}

using Counts = std::map<std::string, unsigned>;
std::string shown(const Counts& counts) {
  std::string text;
  for (const auto& [what, count] : counts) text += (text.empty() ? "" : ", ") + what + " " + std::to_string(count);
  return text;
}
std::string where(const Processes& both) {
  return both.runs(source) > 0 ? "at the source" : both.runs(destination) > 0 ? "at the destination" : "nowhere";
}

}  // namespace

TEST_CASE("kill -9 of one side at any moment: the other one comes back with a text, and runs the guest if it may") {
  const unsigned kills = wanted_kills();
  Rng rng(seed() + 2);
  INFO("seed ", seed());
  const auto ends = operations();
  Counts states, found;
  for (unsigned i = 0; i < kills; ++i) {
    const Which victim = i % 2 == 0 ? source : destination;
    const Which survivor = victim == source ? destination : source;
    const Plan plan{.victim = victim, .at = moment(rng, ends[victim])};
    CAPTURE(i);
    CAPTURE(plan.at);
    Processes both(plan, 16);
    const bool hit = both.wait_for_hit();
    REQUIRE(both.wait_for_end(survivor));
    if (!hit) REQUIRE(both.wait_for_end(victim));
    check_side(both, survivor);
    if (!hit) check_side(both, victim);
    CHECK(both.runs(source) + both.runs(destination) <= 1);
    const std::string state = to_string(both[victim].hit_in.load());
    ++states[(victim == source ? "source " : "destination ") + (hit ? "in " + state : std::string("too late"))];
    ++found[(victim == source ? "source gone, guest " : "destination gone, guest ") + where(both)];
  }
  MESSAGE(kills, " kills: ", shown(states), "; ", shown(found));
}

TEST_CASE("One side stands still at any moment, and goes on when the other has given up: at most one guest runs") {
  Rng rng(seed() + 3);
  INFO("seed ", seed());
  const auto ends = operations();
  // Every operation of both sides, or some.
  const unsigned stops =
      full() ? static_cast<unsigned>(2 * std::max(ends[source], ends[destination]) + 2) : wanted_kills();
  Counts states, found;
  for (unsigned done = 0; done < stops;) {
    struct Case {
      Which victim;
      std::unique_ptr<Processes> both;
      bool hit = false;
    };
    std::vector<Case> cases;  // they mostly wait: several at once
    for (; cases.size() < 4 && done < stops; ++done) {
      const Which victim = done % 2 == 0 ? source : destination;
      const std::uint64_t at = full() ? done / 2 : moment(rng, ends[victim]);
      const Plan plan{.victim = victim, .at = at, .signal = SIGSTOP};
      cases.push_back({victim, std::make_unique<Processes>(plan, 16)});
    }
    for (Case& each : cases) each.hit = each.both->wait_for_hit();
    for (Case& each : cases) {
      Processes& both = *each.both;
      const Which other = each.victim == source ? destination : source;
      CAPTURE(both[each.victim].hit_in.load());
      REQUIRE(both.wait_for_end(other));
      both.go_on();
      REQUIRE(both.wait_for_end(each.victim));
      check_side(both, source);
      check_side(both, destination);
      CHECK(both.runs(source) + both.runs(destination) <= 1);
      if (both.runs(source) + both.runs(destination) == 0) {
        CHECK(both[source].owner == Owner::unknown);
        CHECK(std::string_view(both[destination].owner_text.data()).contains("all of the guest has arrived"));
      }
      const std::string state = to_string(both[each.victim].hit_in.load());
      ++states[(each.victim == source ? "source " : "destination ") +
               (each.hit ? "in " + state : std::string("too late"))];
      ++found["guest " + where(both)];
    }
  }
  MESSAGE(stops, " stops: ", shown(states), "; ", shown(found));
}
