// SPDX-License-Identifier: MIT
//
// migrate_from(): takes a whole migration in, in one call: connections, settings, memory, devices, hand-over.
#pragma once

#include <optional>

#include "multifd/migrate/destination_options.hpp"
#include "multifd/migrate/destination_report.hpp"
#include "multifd/migrate/detail/destination_run.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/transport/acceptor.hpp"
#include "multifd/transport/listen.hpp"

namespace multifd::migrate {

/// Takes a guest in at an acceptor of the caller's: with a TlsAcceptor over TLS. All else as migrate_from() below.
/// Errors: as below, but for those of listening.
template <class Stacks, DestinationGuest G, Acceptor A>
[[nodiscard]] Result<ArrivalReport> migrate_from(G& guest, A& acceptor, const DestinationOptions& options = {}) {
  static_assert(check_destination_guest<G>());
  return catch_bad_alloc(Stage::setup, "migrate_from", [&]() -> Result<ArrivalReport> {
    std::optional<Migration> own;
    if (options.migration == nullptr) {
      MULTIFD_TRY_ASSIGN(own, Migration::create());
    }
    detail::DestinationRun<Stacks, G> run(guest, options, own ? *own : *options.migration);
    return run.migrate(acceptor);
  });
}

/// Waits for a migrate_to(), takes its guest in, and runs it. Strangers, silent connections, and tries that a source has
/// given up are closed and do no harm.
///
/// Returns when the guest runs here. On an error it does not run here, and never will by itself: Migration::owner_text()
/// says where it is.
///
/// Params `Stacks`: as migrate_to()'s; `ZeroPages` is not used. `guest`: outlives the call. `listener`: with room for all
///   connections in its queue.
/// Errors: Errc::cancelled by Migration::cancel(); Errc::peer_gave_up with the source's own reason; settings that differ
///   (compare_settings()), block_list_mismatch; those of Receiver, MainStreamReader, and of the guest's functions.
/// Threads: any; the guest's functions and the hooks are called by the same. One thread per channel besides.
/// Cost: memory: as Receiver::open(), 128 KiB, and the largest device's state.
template <class Stacks, DestinationGuest G>
[[nodiscard]] Result<ArrivalReport> migrate_from(G& guest, Listener& listener, const DestinationOptions& options = {}) {
  MULTIFD_TRY_ASSIGN(auto acceptor, PlainAcceptor::open(listener));
  return migrate_from<Stacks>(guest, acceptor, options);
}

}  // namespace multifd::migrate
