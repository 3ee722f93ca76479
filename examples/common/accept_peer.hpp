// SPDX-License-Identifier: MIT
//
// Accepts the connections of ram_send, or of live_migration's source, at one address, as multifd::accept_source() does
// for a QEMU. The main connection's hello says how many channels there are, and which of them belong to the same try.
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
/// end meanwhile, or are neither, are closed with a message on stderr; a second main connection is another try of the
/// source, and takes the place of the one before. After a source has sent its hello and given up, its next try is
/// waited for briefly; the Failure then has the source's own text.
///
/// Params: `channels`: what this side insists on, 0 for whatever the source announces.
/// Throws Failure, whose text is also sent to the source.
Accepted accept_peer(multifd::Listener& listener, unsigned channels, const multifd::Interrupt& interrupt,
                     const TimeLimits& limits = {}, const Tls& tls = {});

}  // namespace program
