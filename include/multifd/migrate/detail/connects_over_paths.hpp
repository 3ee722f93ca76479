// SPDX-License-Identifier: MIT
//
// How a source's connections are made over its paths: all at the beginning, and single ones later.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "multifd/migrate/detail/path_set.hpp"
#include "multifd/migrate/source_options.hpp"
#include "multifd/qemu/accept_source.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/capped.hpp"
#include "multifd/transport/connect.hpp"
#include "multifd/transport/connect_paths.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/path.hpp"

namespace multifd::migrate::detail {

/// Params `L`: what the program's links are. Threads: connect() the migration's; dialling in `set` any.
template <class L>
class ConnectsOverPaths {
 public:
  using Link = Capped<L>;
  using Secure = std::function<Result<L>(FdTransport, const Interrupt&)>;

  /// Params: all outlive this object. `secure`: may be empty. `cancel`: ends connect().
  ConnectsOverPaths(std::span<const Path> paths, const SourceOptions& options, const Secure& secure,
                    const Interrupt& cancel)
      : set(paths, [this](std::size_t path, const std::shared_ptr<PathShared>& shared,
                          const Interrupt& interrupt) { return dial(path, shared, interrupt); }),
        paths_(paths),
        options_(options),
        secure_(secure),
        cancel_(cancel) {}
  ConnectsOverPaths(const ConnectsOverPaths&) = delete;
  ConnectsOverPaths& operator=(const ConnectsOverPaths&) = delete;

  /// The main connection first, because a QEMU takes the first that comes for it.
  [[nodiscard]] Result<SourceLinks<Link>> connect() {
    const SocketOptions sockets = socket_options(cancel_);
    SocketOptions of_main = sockets;
    of_main.send_buffer_bytes = of_main.receive_buffer_bytes = 0;
    // A QEMU counts the channels; an own destination is told how many there are.
    const PathsNeeded needed = options_.insist_on_paths ? PathsNeeded::all
                               : options_.peer.digests  ? PathsNeeded::one
                                                        : PathsNeeded::one_for_all;
    MULTIFD_TRY_ASSIGN(MainOverPaths main, connect_main(paths_, of_main, needed));
    set.set_main_path(main.main.path);
    MULTIFD_TRY_ASSIGN(Link main_link, link_of(std::move(main.main.link), set.shared(main.main.path), cancel_));
    MULTIFD_TRY_ASSIGN(ConnectedPaths channels, connect_paths(paths_, sockets, needed, std::move(main.left_out)));
    for (const PathLeftOut& each : channels.left_out) {
      set.leave_out(each.path);
      if (options_.on_path)
        options_.on_path({.path = each.path, .main = false, .channel = 0, .left_out = true, .lost = &each.error});
    }
    SourceLinks<Link> links{std::move(main_link), {}};
    for (PathLink& each : channels.links) {
      MULTIFD_TRY_ASSIGN(Link link, link_of(std::move(each.link), set.shared(each.path), cancel_));
      links.channels.push_back(std::move(link));
      set.add_channel(each.path);
    }
    return links;
  }

  PathSet<Link> set;

 private:
  SocketOptions socket_options(const Interrupt& interrupt) const {
    SocketOptions sockets = options_.sockets;
    sockets.connect_timeout = options_.connect_timeout;
    sockets.interrupt = &interrupt;
    return sockets;
  }
  [[nodiscard]] Result<Link> dial(std::size_t path, const std::shared_ptr<PathShared>& shared,
                                  const Interrupt& interrupt) {
    MULTIFD_TRY_ASSIGN(FdTransport link,
                       connect_to(paths_[path].remote, options_of(paths_[path], socket_options(interrupt))));
    return link_of(std::move(link), shared, interrupt);
  }
  [[nodiscard]] Result<Link> link_of(FdTransport link, const std::shared_ptr<PathShared>& shared,
                                     const Interrupt& interrupt) const {
    if (!secure_) return Link(L(std::move(link)), shared);
    MULTIFD_TRY_ASSIGN(L secured, secure_(std::move(link), interrupt));
    return Link(std::move(secured), shared);
  }

  const std::span<const Path> paths_;
  const SourceOptions& options_;
  const Secure& secure_;
  const Interrupt& cancel_;
};

}  // namespace multifd::migrate::detail
