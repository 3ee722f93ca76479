// SPDX-License-Identifier: MIT
//
// The two sides of a migration whose memory follows as two processes, of which one is killed at an operation of its links
// that is drawn by lot. The other one comes back, with a text: at once, or when its user says so who knows that nobody will
// come. What is there of the guest's memory is right, also where the rest is lost.
//
// MULTIFD_KILLS says how many; 8 by default, 500 at night.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <string_view>
#include <thread>

#include "support/migrate_on_demand.hpp"

using namespace multifd;
using namespace multifd::migrate;
using namespace test;

namespace {

constexpr std::size_t pages = 2048;
constexpr std::size_t working_set = 64;
enum Which : std::size_t { source, destination };

unsigned wanted_kills() { return how_often("MULTIFD_KILLS", 8); }

/// What one process tells the test's. It is in memory that all have.
struct Report {
  std::atomic<std::uint64_t> operations = 0;
  std::atomic<MigrationStatus> hit_in = MigrationStatus::none;
  std::atomic<bool> ended = false;  ///< all below is there
  bool completed = false;
  bool runs = false;
  Owner owner{};
  std::size_t wrong_pages = 0;  ///< of those that are there, at the destination
  std::array<char, 400> error{};
  std::array<char, 400> owner_text{};
};
struct Shared {
  std::array<Report, 2> sides;
  std::atomic<std::uint16_t> port = 0;
  std::atomic<bool> victim_gone = false;
};

template <class Condition>
bool in_time(Condition&& holds) {
  for (const Stopwatch watch; watch.elapsed() < 40s; std::this_thread::sleep_for(200us))
    if (holds()) return true;
  return false;
}

/// One side, in a process of its own. Ends it without a destructor: threads of a guest may stand still for good.
class Side {
 public:
  Side(Shared& shared, Which which, std::uint64_t at) : shared_(shared), which_(which), at_(at) {}

  [[noreturn]] void be() {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    which_ == source ? be_source() : be_destination();
    ::_exit(0);
  }

 private:
  Report& report() { return shared_.sides[which_]; }
  std::function<void()> die(Followed& followed) {
    return [this, &followed] {
      report().hit_in = followed->progress().status;
      ::kill(::getpid(), SIGKILL);
    };
  }
  /// The user of a side that waits for one which will not come.
  std::thread user(Followed& followed) {
    return std::thread([this, &followed] {
      for (; !report().ended; std::this_thread::sleep_for(2ms))
        if (shared_.victim_gone && followed->progress().status == MigrationStatus::postcopy_paused) followed->cancel();
    });
  }
  void end(Followed& followed, bool completed, bool runs, const std::string& why) {
    report().completed = completed;
    report().runs = runs;
    report().owner = followed->owner();
    why.copy(report().error.data(), report().error.size() - 1);
    followed->owner_text().copy(report().owner_text.data(), report().owner_text.size() - 1);
    report().ended = true;
  }

  void be_source() {
    MigratingGuest here(pages);
    here.boot();
    here.run(working_set, 50us);
    if (!in_time([&] { return shared_.port != 0; })) ::_exit(4);
    Followed followed;
    Script script(shared_.port, at_, die(followed));
    std::thread other = user(followed);
    SourceOptions options = at_once();
    options.channels = OnDemand::channels;
    options.answer_timeout = options.progress_timeout = options.load_timeout = 2s;
    options.farewell_timeout = 1s;
    options.migration = &*followed.handle;
    const auto sent = send_guest(here, {.host = "127.0.0.1", .port = shared_.port}, options);
    report().operations = script.operations();
    end(followed, sent.has_value(), here.runs(), text(sent));
    other.join();
    here.stop();
  }

  void be_destination() {
    There there(pages, {.first_timeout = 5s,
                        .accept_timeout = 2s,
                        .retry_timeout = 100ms,
                        .progress_timeout = 2s,
                        .save_timeout = 2s,
                        .hand_over_timeout = 2s});
    there.guest.looks_when_resumed = false;  // nobody can end that once the source is gone
    std::ranges::fill(there.guest.memory(), std::byte{0xee});
    Script script(there.address.port, at_, die(there.followed));
    std::thread other = user(there.followed);
    there.begin();
    shared_.port = there.address.port;
    const auto taken = there.result();
    report().operations = script.operations();
    if (there.guest.runs()) report().wrong_pages = wrong_pages(there.guest);
    end(there.followed, taken.has_value(), there.guest.runs(), text(taken));
    other.join();
    ::_exit(0);
  }

  /// Pages that are there, and are not what the source has booted. Those that the guest writes are not looked at.
  static std::size_t wrong_pages(MigratingGuest& guest) {
    MigratingGuest booted(pages);
    booted.boot();
    std::size_t wrong = 0;
    for (std::size_t i = working_set; i < pages; ++i) {
      const auto page = guest.memory().subspan(i * MigratingGuest::page, MigratingGuest::page);
      unsigned char resident = 0;
      if (::mincore(page.data(), page.size(), &resident) != 0 || (resident & 1) == 0) continue;
      wrong += !std::ranges::equal(page, booted.memory().subspan(i * MigratingGuest::page, MigratingGuest::page));
    }
    return wrong;
  }

  Shared& shared_;
  const Which which_;
  const std::uint64_t at_;
};

/// Both processes. Params `victim`, `at`: which one is killed, at which of its operations.
class Processes {
 public:
  Processes(Which victim, std::uint64_t at) : victim_(victim) {
    void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    shared_ = new (memory) Shared;
    for (const Which side : {source, destination}) {
      pids_[side] = ::fork();
      REQUIRE(pids_[side] >= 0);
      if (pids_[side] == 0) Side(*shared_, side, side == victim ? at : Script::never).be();
    }
  }
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;
  ~Processes() {
    for (const Which side : {source, destination}) {
      if (gone_[side]) continue;
      if (!in_time([&] { return ::waitpid(pids_[side], nullptr, WNOHANG) == pids_[side]; })) {
        ::kill(pids_[side], SIGKILL);
        ::waitpid(pids_[side], nullptr, 0);
        CHECK_MESSAGE(false, "a side did not end");
      }
    }
    ::munmap(shared_, sizeof(Shared));
  }

  const Report& operator[](Which side) const { return shared_->sides[side]; }
  bool runs(Which side) const { return !gone_[side] && shared_->sides[side].runs; }
  /// Waits until the victim was killed, or has come back. Whether it was killed.
  bool wait_for_kill() {
    int status = 0;
    bool killed = false;
    CHECK(in_time([&] {
      const bool exited = ::waitpid(pids_[victim_], &status, WNOHANG) == pids_[victim_];
      gone_[victim_] = gone_[victim_] || exited;
      killed = exited && WIFSIGNALED(status);
      return exited || shared_->sides[victim_].ended;
    }));
    shared_->victim_gone = true;
    return killed;
  }
  bool wait_for_end(Which side) {
    return in_time([&] { return shared_->sides[side].ended.load(); });
  }

 private:
  const Which victim_;
  Shared* shared_ = nullptr;
  std::array<pid_t, 2> pids_{};
  std::array<bool, 2> gone_{};
};

std::array<std::uint64_t, 2> operations() {
  Processes undisturbed(source, Script::never);
  for (const Which side : {source, destination}) {
    REQUIRE(undisturbed.wait_for_end(side));
    CHECK_MESSAGE(undisturbed[side].completed, undisturbed[side].error.data());
  }
  CHECK_FALSE(undisturbed[source].runs);
  CHECK(undisturbed[destination].runs);
  CHECK(undisturbed[destination].wrong_pages == 0);
  return {undisturbed[source].operations, undisturbed[destination].operations};
}

using Counts = std::map<std::string, unsigned>;
std::string shown(const Counts& counts) {
  std::string text;
  for (const auto& [what, count] : counts) text += (text.empty() ? "" : ", ") + what + " " + std::to_string(count);
  return text;
}

}  // namespace

TEST_CASE("kill -9 of one side while memory follows: the other one has a text, and no wrong byte") {
  const unsigned kills = wanted_kills();
  Rng rng(seed() + 6);
  INFO("seed ", seed());
  const auto ends = operations();
  Counts states, found;
  for (unsigned i = 0; i < kills; ++i) {
    const Which victim = i % 4 == 3 ? destination : source;
    const Which survivor = victim == source ? destination : source;
    CAPTURE(i);
    Processes both(victim, below(rng, ends[victim]));
    const bool killed = both.wait_for_kill();
    REQUIRE(both.wait_for_end(survivor));
    const Report& report = both[survivor];
    const std::string_view owner_text = report.owner_text.data();
    const std::string_view error = report.error.data();
    CAPTURE(error);
    CAPTURE(owner_text);
    CHECK_FALSE(owner_text.empty());
    if (!report.completed) CHECK_FALSE(error.empty());
    CHECK(report.wrong_pages == 0);
    std::string what;
    if (survivor == destination) {
      const bool lost = report.runs && !report.completed;
      if (lost) CHECK(error.contains("memory cannot be had any more"));
      if (lost) CHECK(owner_text.contains("lost"));
      if (!report.runs) CHECK(owner_text.contains("source"));
      what = lost ? "stands still where its memory is lost" : report.runs ? "runs, whole" : "never ran here";
    } else {
      CHECK(report.runs == (report.owner == Owner::source));
      if (report.owner == Owner::unknown) CHECK(owner_text.contains("look there"));
      what = std::string("source says: ") + std::string(to_string(report.owner));
    }
    ++found[(victim == source ? "source gone, guest " : "destination gone, ") + what];
    const std::string state = to_string(both[victim].hit_in.load());
    ++states[(victim == source ? "source " : "destination ") + (killed ? "in " + state : std::string("too late"))];
  }
  MESSAGE(kills, " kills: ", shown(states), "; ", shown(found));
}
