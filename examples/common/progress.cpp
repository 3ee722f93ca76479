// SPDX-License-Identifier: MIT
#include "common/progress.hpp"

#include "common/program.hpp"
#include "common/report.hpp"
#include "common/tell.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

namespace program {

using namespace std::chrono_literals;

namespace {

/// "1.5 s", "40 s", "12 min".
std::string text_of(Patience::Clock::duration time) {
  const double seconds = std::chrono::duration<double>(time).count();
  if (seconds < 10) return fmt::format("{:.1f} s", seconds);
  return seconds < 120 ? fmt::format("{:.0f} s", seconds) : fmt::format("{:.0f} min", seconds / 60);
}

}  // namespace

Snapshot snapshot_of(const char* verb, const multifd::ReceiverStats& stats, const multifd::RamMap& ram,
                     std::uint64_t main_pages, double seconds) {
  const multifd::ChannelStats sum = multifd::total(stats.channels);
  const std::uint64_t pages = sum.normal_pages + sum.zero_pages;
  const auto moved = static_cast<double>(pages * ram.page_bytes());
  return {.line = fmt::format("{} {}  {:.2f} GiB/s  epoch {}", verb, format_bytes(moved), rate(moved, seconds),
                              stats.epochs),
          .moved = sum.wire_bytes,
          .again = pages + main_pages >= ram.total_bytes() / ram.page_bytes()};
}

std::string Patience::look(const Snapshot& snapshot, Clock::time_point now) {
  if (snapshot.moved != moved_) {
    moved_ = snapshot.moved;
    still_since_ = now;
    next_still_ = hint_after_;
  }
  still_ = now - still_since_;
  if (snapshot.again && again_since_ == Clock::time_point::max()) {
    again_since_ = now;
    next_endless_ = std::max(hint_after_, now - began_);
  }
  if (!snapshot.stalled.empty() && still_ >= next_still_) {
    next_still_ = 2 * still_;
    return fmt::format("{}: nothing has moved for {}. {}", snapshot.line, text_of(still_), snapshot.stalled);
  }
  if (snapshot.again && !snapshot.endless.empty() && now - again_since_ >= next_endless_) {
    const Clock::duration lasting = now - again_since_;
    next_endless_ = 2 * lasting;
    return fmt::format("{}: all memory had come once {} ago, and the source goes on. {}", snapshot.line,
                       text_of(lasting), snapshot.endless);
  }
  return {};
}

Progress::Progress(Look look, std::chrono::milliseconds hint_after)
    : look_(std::move(look)),
      hint_after_(hint_after),
      terminal_(::isatty(STDERR_FILENO) != 0),
      patience_(hint_after, Patience::Clock::now()),
      thread_([this] { run(); }) {}

void Progress::update() {
  if (!terminal_) return;
  const std::lock_guard lock(mutex_);
  show();
}

void Progress::show() {
  const char* const clear = terminal_ ? "\r\x1b[K" : "";
  const Snapshot snapshot = look_();
  if (const std::string hint = patience_.look(snapshot, Patience::Clock::now()); !hint.empty())
    tell("{}hint: {}\n", clear, hint);
  if (!terminal_) return;
  const bool still = patience_.still() >= 2s;
  tell("{}{}{}", clear, snapshot.line,
       !still                     ? std::string()
       : snapshot.stalled.empty() ? "  for " + text_of(patience_.still())
                                  : "  nothing has moved for " + text_of(patience_.still()));
}

void Progress::run() {
  if (!terminal_ && hint_after_.count() == 0) return;  // there is nothing to say
  const auto interval = terminal_ ? 200ms : std::clamp<std::chrono::milliseconds>(hint_after_ / 4, 20ms, 500ms);
  std::unique_lock lock(mutex_);
  do {  // at least once, so that the terminal shows what was done last, however short that was
    show();
  } while (!changed_.wait_for(lock, interval, [this] { return ended_; }));
  if (terminal_) tell("\r\x1b[K");
}

Progress::~Progress() {
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

}  // namespace program
