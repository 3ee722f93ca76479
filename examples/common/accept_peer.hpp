// SPDX-License-Identifier: MIT
//
// The connections of ram_send, or of live_migration's source, at one address: what multifd::accept_source() is for a
// QEMU. How many channels there are, and which are of the same try, the main connection's hello says.
#pragma once

#include "common/control.hpp"

namespace program {

/// Everything that a destination accepts: one main connection and the channels that its hello announces, all on one
/// address, in any order.
struct Accepted {
  Control control;
  nlohmann::json hello;
  std::vector<Link> channels;
  multifd::UuidCheck uuid;  ///< that of the try, where the hello has one
};

/// Waits for a source. The first connection may take for ever, all others together TimeLimits::accept. Connections that
/// end meanwhile, or are neither, are closed with a word on stderr; a second main connection is another try of the
/// source, and takes the place of the one before. A source that has said its hello and gives up has a moment to come
/// again; the Failure then is what it said.
///
/// Params: `channels`: what this side insists on, 0 for whatever the source announces.
/// Throws Failure. The source is told what it is.
Accepted accept_peer(multifd::Listener& listener, unsigned channels, const multifd::Interrupt& interrupt,
                     const TimeLimits& limits = {}, const Tls& tls = {});

}  // namespace program
