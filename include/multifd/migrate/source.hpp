// SPDX-License-Identifier: MIT
//
// migrate_to(): a whole migration away from this host in one call: connections, settings, rounds, switchover, hand-over.
#pragma once

#include <functional>
#include <iterator>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/migrate/detail/connects_over_paths.hpp"
#include "multifd/migrate/detail/path_set.hpp"
#include "multifd/migrate/detail/source_run.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/migrate/source_report.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/transport/address.hpp"
#include "multifd/transport/capped.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/path.hpp"

namespace multifd::migrate {

/// Each of `links` as a Link.
template <class Link>
std::vector<Link> links_of(std::vector<FdTransport> links) {
  return {std::make_move_iterator(links.begin()), std::make_move_iterator(links.end())};
}

namespace detail {

template <class Stacks, SourceGuest G, class Connect>
[[nodiscard]] Result<MigrationReport> migrate_over(G& guest, const SourceOptions& options, Connect connect,
                                                   PathSet<Capped<typename Stacks::Link>>& paths) {
  static_assert(check_source_guest<G>());
  return catch_bad_alloc(Stage::setup, "migrate_to", [&]() -> Result<MigrationReport> {
    std::optional<Migration> own;
    if (options.migration == nullptr) {
      MULTIFD_TRY_ASSIGN(own, Migration::create());
    }
    SourceRun<Stacks, G> run(guest, options, own ? *own : *options.migration, paths);
    return run.migrate(connect);
  });
}

}  // namespace detail

/// Migrates a running guest over connections that are there already. All else as migrate_to() below.
/// Errors: as below, but for those of connecting.
///
/// Params `links`: the main connection and the channels, which all lead to the destination; for TLS with their handshakes
///   done. `options.channels` is not used. `dial`: makes one more connection to the destination, and another one whenever
///   one is lost; called by several threads at once; ends within a second when the Interrupt is triggered. Without it
///   `options.postcopy` and `options.resume` are refused.
template <class Stacks, SourceGuest G>
[[nodiscard]] Result<MigrationReport> migrate_to(
    G& guest, SourceLinks<typename Stacks::Link> links, const SourceOptions& options = {},
    const std::function<Result<typename Stacks::Link>(const Interrupt&)>& dial = {}) {
  using Link = Capped<typename Stacks::Link>;
  return catch_bad_alloc(Stage::setup, "migrate_to", [&]() -> Result<MigrationReport> {
    typename detail::PathSet<Link>::Dial dial_path;
    if (dial)
      dial_path = [&dial](std::size_t, const auto& path, const Interrupt& interrupt) -> Result<Link> {
        MULTIFD_TRY_ASSIGN(auto link, dial(interrupt));
        return Link(std::move(link), path);
      };
    const Path only;
    detail::PathSet<Link> paths(std::span(&only, 1), std::move(dial_path));
    const auto connect = [&]() -> Result<SourceLinks<Link>> {
      SourceLinks<Link> capped{Link(std::move(links.main), paths.shared(0)), {}};
      for (auto& channel : links.channels) {
        capped.channels.emplace_back(std::move(channel), paths.shared(0));
        paths.add_channel(0);
      }
      return capped;
    };
    return detail::migrate_over<Stacks>(guest, options, connect, paths);
  });
}

/// Migrates a running guest over several paths at once: networks, addresses, interfaces, with a cap for each. All else as
/// migrate_to() below.
///
/// Params `paths`: at least one; of 1 to 255 channels together, which take the place of `options.channels`. The main
///   connection goes over the first that comes up. One that does not come up is left out, and SourceOptions::on_path told,
///   unless SourceOptions::insist_on_paths. `secure`: makes a Link of a connection, by TLS' handshake for instance; called by
///   several threads at once; empty: the connection itself is the Link.
/// Errors: as below; those of connect_paths().
template <class Stacks, SourceGuest G>
[[nodiscard]] Result<MigrationReport> migrate_to(
    G& guest, std::span<const Path> paths, const SourceOptions& options = {},
    const std::function<Result<typename Stacks::Link>(FdTransport, const Interrupt&)>& secure = {}) {
  return catch_bad_alloc(Stage::setup, "migrate_to", [&]() -> Result<MigrationReport> {
    std::optional<Interrupt> never;
    if (options.migration == nullptr) {
      MULTIFD_TRY_ASSIGN(never, Interrupt::create());
    }
    const Interrupt& cancel = never ? *never : options.migration->interrupt();
    detail::ConnectsOverPaths<typename Stacks::Link> connects(paths, options, secure, cancel);
    return detail::migrate_over<Stacks>(guest, options, [&] { return connects.connect(); }, connects.set);
  });
}

/// Migrates a running guest to a destination that listens at `address`, whose migrate_from() takes it, or a QEMU.
///
/// Returns when the guest runs at the destination with all of its memory, and has said so. On an error the guest runs on at the source, as fast
/// as before; but once the hand-over has begun it stays stopped, because it may run at the destination: then
/// Migration::owner() is Owner::unknown, and Migration::owner_text() says what to do.
///
/// Params `Stacks`: what the program offers: `Link`, a Transport that FdTransport converts to; `Compressors` and
///   `ZeroPages`, PolicyLists (stack.hpp). Each combination is compiled. `guest`: outlives the call.
/// Errors: Errc::cancelled by Migration::cancel(); Errc::peer_gave_up with the destination's own reason;
///   Errc::did_not_converge; Errc::memory_lost: the guest runs at the destination without the rest of its memory
///   (PostcopyOptions), and cancel() was called while that was out of reach; those of connect_to(), Sender, DirtySource, MainStreamWriter, and of the guest's functions.
/// Threads: any; the guest's functions and the hooks are called by the same. One thread per channel besides.
/// Cost: memory: as Sender::open(), a dirty bitmap, and 64 KiB.
template <class Stacks, SourceGuest G>
[[nodiscard]] Result<MigrationReport> migrate_to(G& guest, const Address& address, const SourceOptions& options = {}) {
  const Path path{.remote = address, .channels = options.channels};
  return migrate_to<Stacks>(guest, std::span(&path, 1), options);
}

}  // namespace multifd::migrate
