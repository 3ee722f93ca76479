// SPDX-License-Identifier: MIT
//
// What a program prints while it works: on a terminal a line that is rewritten, and on any stderr a hint when nothing
// has moved for long or a source does not come to an end. The program supplies the line and the likely causes; this
// file decides when to print them.
#pragma once

#include <multifd/memory/ram_map.hpp>
#include <multifd/stats.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace program {

/// What a program does at one moment.
struct Snapshot {
  std::string line;         ///< the progress line: "received 1.20 GiB  0.80 GiB/s  epoch 3"
  std::uint64_t moved = 0;  ///< a number that changes whenever something has moved
  std::string stalled{};    ///< likely causes when nothing moves; empty: no hint
  bool again = false;       ///< all memory has come once; what comes now has been sent before
  std::string endless{};    ///< likely causes when that does not end; empty: no hint
};

/// What a program has received: "received 1.20 GiB  0.80 GiB/s  epoch 3", and how much has moved on the channels. Where
/// the source has no more memory than `ram`, also whether all of it has come once.
///
/// Params: `verb`: "received". `main_pages`: pages that came on the main stream. `seconds`: since the beginning.
Snapshot snapshot_of(const char* verb, const multifd::ReceiverStats& stats, const multifd::RamMap& ram,
                     std::uint64_t main_pages, double seconds);

/// Decides when a hint is due: first when nothing has moved for `hint_after`, or when sending again has taken as long
/// as everything before it, and at least that long; then each time after twice the time. `hint_after` 0: never.
class Patience {
 public:
  using Clock = std::chrono::steady_clock;

  Patience(std::chrono::milliseconds hint_after, Clock::time_point now)
      : hint_after_(hint_after.count() == 0 ? Clock::duration::max() : Clock::duration(hint_after)),
        began_(now),
        still_since_(now),
        next_still_(hint_after_) {}

  /// Notes what the program does now. Returns a hint to be printed, or an empty text.
  std::string look(const Snapshot& snapshot, Clock::time_point now);

  /// For how long nothing had moved at the last look().
  Clock::duration still() const noexcept { return still_; }

 private:
  const Clock::duration hint_after_;
  const Clock::time_point began_;
  std::uint64_t moved_ = 0;
  Clock::time_point still_since_;
  Clock::duration still_{};
  Clock::duration next_still_;
  Clock::time_point again_since_ = Clock::time_point::max();
  Clock::duration next_endless_{};
};

/// As long as it lives: rewrites the progress line five times a second where stderr is a terminal, and prints hints.
class Progress {
 public:
  using Look = std::function<Snapshot()>;

  /// Params `look`: called on a thread of its own. `hint_after`: TimeLimits::hint.
  Progress(Look look, std::chrono::milliseconds hint_after);
  /// For a wait in which nothing moves until it is over.
  Progress(const std::string& line, const std::string& causes, std::chrono::milliseconds hint_after)
      : Progress([=] { return Snapshot{.line = line, .stalled = causes}; }, hint_after) {}
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Rewrites the line at once: something else is being done from now on. Threads: any.
  void update();

 private:
  void run();
  void show();

  const Look look_;
  const std::chrono::milliseconds hint_after_;
  const bool terminal_;
  std::mutex mutex_;
  Patience patience_;
  std::condition_variable changed_;
  bool ended_ = false;
  std::thread thread_;
};

/// The progress line of long work on this side, or of a wait that may be long: what is being done, and since when. The
/// other side is not the cause of such waits, so there are no hints.
class Step : public Progress {
 public:
  explicit Step(const std::string& line) : Progress(line, "", std::chrono::milliseconds(0)) {}
};

}  // namespace program
