// SPDX-License-Identifier: MIT
//
// Measuring a link: the peer listens and throws away what comes; this side sends over 1, 2, 4, ... connections at once.
//
//   connecting side, per connection        listening side
//   "MFDL", be32 what (0 stream, 1 bye)
//   bytes until the time is over, end  ->
//                                      <-  be64 bytes, be64 ns from the first byte to the last, be64 cores
#pragma once

#include <multifd/transport/address.hpp>
#include <multifd/transport/interrupt.hpp>
#include <multifd/transport/listen.hpp>

#include "advise/costs.hpp"
#include "advise/model.hpp"

namespace advise {

/// What the other end said.
struct MeasuredLink {
  Link link{};
  unsigned peer_cores = 1;
};

/// Measures with 1, 2, 4, ... up to `most_connections` connections, `seconds` each. Throws program::Failure; ends
/// within some seconds more than asked for, whatever the peer does.
MeasuredLink measure_link(const multifd::Address& address, unsigned most_connections, double seconds, Steps& steps);

/// The other side: serves connections until one says bye, `idle` has passed without any, or `interrupt` triggers.
/// Returns whether one said bye.
bool serve_link(multifd::Listener& listener, std::chrono::seconds idle, const multifd::Interrupt& interrupt);

/// measure_link() against serve_link() in this process, over loopback TCP.
MeasuredLink measure_loopback(unsigned most_connections, double seconds, Steps& steps);

}  // namespace advise
