// SPDX-License-Identifier: MIT
//
// Precopy in virtual time: a trace's guest runs, its pages are sent in rounds, its dirty bitmap is fetched; and what a
// switchover would really take at any round's end, which no rule is told.
#pragma once

#include <cstdint>
#include <vector>

#include "simulate/trace.hpp"

namespace simulate {

/// A round that was sent, and the bitmap that was fetched behind it.
struct SentRound {
  std::uint64_t number = 0;
  double sent_pages = 0;
  double send_s = 0;
  double sync_s = 0;
  double dirty_pages = 0;
  double now_s = 0;  ///< with the bitmap there
};

/// One migration. The trace has to outlive it.
///
/// A page that is written to between two fetches is dirty at the second, whether it has been sent since the first or not.
/// While a bitmap is fetched the guest runs on; what it writes then is in the next bitmap.
class Precopy {
 public:
  explicit Precopy(const Trace& trace);

  /// Sends what is dirty (first: everything), with the guest held for so many percent of its time, and fetches the bitmap.
  SentRound next(unsigned throttle_percent = 0);

  /// How long the guest would stand still if it were stopped now, at the end of the round. `sync_first`: no page is sent
  /// while the last bitmap is fetched.
  double downtime_s(bool sync_first = false) const;

  /// Seconds that the guest was held so far.
  double held_s() const { return held_s_; }

 private:
  /// Lets the guest run until `time`.
  void run_until(double time, double running);

  const Trace* trace_;
  double now_s_ = 0;
  double pages_ = 0;  ///< to be sent in the next round
  double held_s_ = 0;
  std::uint64_t rounds_ = 0;
  std::vector<double> written_;  ///< per set: writes to each of its pages since the last fetch
  std::vector<double> dirty_;    ///< per set: the share of its pages that is in the bitmap
};

}  // namespace simulate
