// SPDX-License-Identifier: MIT
//
// migrate_to(): a whole migration away from this host in one call: connections, settings, rounds, switchover, hand-over.
#pragma once

#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "multifd/migrate/detail/source_run.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/transport/connect.hpp"

namespace multifd::migrate {

/// Each of `links` as a Link.
template <class Link>
std::vector<Link> links_of(std::vector<FdTransport> links) {
  return {std::make_move_iterator(links.begin()), std::make_move_iterator(links.end())};
}

namespace detail {

template <class Stacks, SourceGuest G, class Connect>
[[nodiscard]] Result<MigrationReport> migrate_over(G& guest, const SourceOptions& options, Connect connect) {
  static_assert(check_source_guest<G>());
  return catch_bad_alloc(Stage::setup, "migrate_to", [&]() -> Result<MigrationReport> {
    std::optional<Migration> own;
    if (options.migration == nullptr) {
      MULTIFD_TRY_ASSIGN(own, Migration::create());
    }
    SourceRun<Stacks, G> run(guest, options, own ? *own : *options.migration);
    return run.migrate(connect);
  });
}

}  // namespace detail

/// Migrates a running guest over connections that are there already. All else as migrate_to() below.
/// Errors: as below, but for those of connecting.
///
/// Params `links`: the main connection and the channels, which all lead to the destination; for TLS with their handshakes
///   done. `options.channels` is not used.
template <class Stacks, SourceGuest G>
[[nodiscard]] Result<MigrationReport> migrate_to(G& guest, SourceLinks<typename Stacks::Link> links,
                                                 const SourceOptions& options = {}) {
  using Links = SourceLinks<typename Stacks::Link>;
  return detail::migrate_over<Stacks>(guest, options, [&]() -> Result<Links> { return std::move(links); });
}

/// Migrates a running guest to a destination that listens at `address`, whose migrate_from() takes it, or a QEMU.
///
/// Returns when the guest runs at the destination, and has said so. On an error the guest runs on at the source, as fast
/// as before; but once the hand-over has begun it stays stopped, because it may run at the destination: then
/// Migration::owner() is Owner::unknown, and Migration::owner_text() says what to do.
///
/// Params `Stacks`: what the program offers: `Link`, a Transport that FdTransport converts to; `Compressors` and
///   `ZeroPages`, PolicyLists (stack.hpp). Each combination is compiled. `guest`: outlives the call.
/// Errors: Errc::cancelled by Migration::cancel(); Errc::peer_gave_up with the destination's own reason;
///   Errc::did_not_converge; those of connect_to(), Sender, DirtySource, MainStreamWriter, and of the guest's functions.
/// Threads: any; the guest's functions and the hooks are called by the same. One thread per channel besides.
/// Cost: memory: as Sender::open(), a dirty bitmap, and 64 KiB.
template <class Stacks, SourceGuest G>
[[nodiscard]] Result<MigrationReport> migrate_to(G& guest, const Address& address, const SourceOptions& options = {}) {
  using Link = typename Stacks::Link;
  return detail::migrate_over<Stacks>(guest, options, [&]() -> Result<SourceLinks<Link>> {
    const SocketOptions sockets{.connect_timeout = options.connect_timeout,
                                .interrupt = options.migration != nullptr ? &options.migration->interrupt() : nullptr};
    MULTIFD_TRY_ASSIGN(FdTransport main, connect_to(address, sockets));
    MULTIFD_TRY_ASSIGN(std::vector<FdTransport> channels, connect_channels(address, options.channels, sockets));
    return SourceLinks<Link>{Link(std::move(main)), links_of<Link>(std::move(channels))};
  });
}

}  // namespace multifd::migrate
