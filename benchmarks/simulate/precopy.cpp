// SPDX-License-Identifier: MIT
#include "simulate/precopy.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace simulate {

Precopy::Precopy(const Trace& trace)
    : trace_(&trace), pages_(trace.ram_pages), written_(trace.sets.size()), dirty_(trace.sets.size()) {}

void Precopy::run_until(double time, double running) {
  for (std::size_t i = 0; i < written_.size(); ++i) {
    const Steps& writes = trace_->sets[i].writes;
    written_[i] += running * (writes.area(time) - writes.area(now_s_));
  }
  held_s_ += (1 - running) * (time - now_s_);
  now_s_ = time;
}

SentRound Precopy::next(unsigned throttle_percent) {
  const double running = 1 - throttle_percent / 100.0;
  SentRound round{.number = rounds_++, .sent_pages = pages_};
  const double sent = trace_->link.reach(now_s_, pages_);
  round.send_s = sent - now_s_;
  run_until(sent, running);
  round.sync_s = trace_->sync.at(now_s_);
  pages_ = 0;
  for (std::size_t i = 0; i < written_.size(); ++i) {
    dirty_[i] = -std::expm1(-written_[i]);
    written_[i] = 0;
    pages_ += dirty_[i] * trace_->sets[i].pages.at(now_s_);
  }
  run_until(now_s_ + round.sync_s, running);
  round.dirty_pages = pages_;
  round.now_s = now_s_;
  return round;
}

double Precopy::downtime_s(bool sync_first) const {
  // In the last bitmap, or written to since.
  double pages = 0;
  for (std::size_t i = 0; i < written_.size(); ++i)
    pages += (1 - (1 - dirty_[i]) * std::exp(-written_[i])) * trace_->sets[i].pages.at(now_s_);
  const double known = sync_first ? 0 : std::min(pages, pages_);
  const double fetched = std::max(now_s_ + trace_->sync.at(now_s_), trace_->link.reach(now_s_, known));
  return trace_->link.reach(fetched, pages - known) - now_s_ + trace_->device_state_s + trace_->round_trip_s;
}

}  // namespace simulate
