// SPDX-License-Identifier: MIT
//
// Connects over several paths (path.hpp) at once. A path that does not come up is left out, as long as one does.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/result.hpp"
#include "multifd/thread.hpp"
#include "multifd/time_limit.hpp"
#include "multifd/transport/connect.hpp"
#include "multifd/transport/detail/wait.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/path.hpp"
#include "multifd/transport/socket_options.hpp"

namespace multifd {

/// How many paths have to come up.
enum class PathsNeeded : std::uint8_t {
  one,          ///< at least one; the channels of the others are left out
  one_for_all,  ///< at least one; the channels of the others go over those that are up, for a destination that counts them
  all,          ///< each; the first that does not is the error
};

/// A connection, and the index of the path that it goes over.
struct PathLink {
  FdTransport link;
  std::size_t path = 0;
};

/// A path that did not come up, and why. Error::subject is LOCAL=REMOTE.
struct PathLeftOut {
  std::size_t path = 0;
  Error error;
};

/// What connect_paths() returns.
struct ConnectedPaths {
  /// In the order of channel ids: the first channel of each path that is up, then the second of each that has one, and so
  /// on.
  std::vector<PathLink> links;
  std::vector<PathLeftOut> left_out;  ///< in the order of the paths
};

/// What connect_main() returns.
struct MainOverPaths {
  PathLink main;
  std::vector<PathLeftOut> left_out;  ///< the paths in front of it, which did not come up
};

/// `options` for the connections of a path: with its local address, device and MPTCP.
inline SocketOptions options_of(const Path& path, SocketOptions options) {
  options.local_address = path.local;
  options.device = path.device;
  options.mptcp = path.mptcp;
  return options;
}

namespace detail {

/// Errors: bad_channel_count (detail: the sum), bad_option without a path.
[[nodiscard]] inline Result<void> check_paths(std::span<const Path> paths) noexcept {
  if (paths.empty()) return fail(Errc::bad_option, Stage::connect, "no path to connect over");
  std::uint64_t channels = 0;
  for (const Path& path : paths) {
    if (path.channels < 1 || path.channels > max_channels)
      return fail(Errc::bad_channel_count, Stage::connect, "a path's channels", path.channels, 0, subject_of(path));
    channels += path.channels;
  }
  if (channels > max_channels)
    return fail(Errc::bad_channel_count, Stage::connect, "the channels of all paths together", channels, max_channels);
  return {};
}

inline Error about(const Path& path, Error error) noexcept {
  error.subject = subject_of(path);
  return error;
}

/// Connects the channels of one path. Threads: the one that runs it, until it is joined.
struct PathChannels {
  const Path* path;
  SocketOptions options;
  Clock::time_point deadline;
  std::vector<FdTransport> links;  ///< with room for all
  std::optional<Error> error = {};

  void run() noexcept {
    auto connected = catch_bad_alloc(Stage::connect, "connect", [this]() -> Result<void> {
      for (unsigned i = 0; i < path->channels; ++i) {
        auto link = connect_until(path->remote, deadline, options);
        if (!link) return std::unexpected(link.error());
        links.push_back(std::move(*link));
      }
      return {};
    });
    if (connected) return;
    error = about(*path, connected.error());
    links.clear();
  }
};

/// Connects `missing` more channels over the paths that are up, in turn. Errors: of the first that does not come up.
[[nodiscard]] inline Result<void> connect_missing(std::span<PathChannels> parts, std::size_t missing,
                                                  const SocketOptions& options) {
  const Clock::time_point deadline = deadline_after(as_timeout(options.connect_timeout));
  for (std::size_t i = 0; missing > 0; i = (i + 1) % parts.size()) {
    PathChannels& each = parts[i];
    if (each.error) continue;
    auto link = connect_until(each.path->remote, deadline, each.options);
    if (!link) return std::unexpected(about(*each.path, link.error()));
    each.links.push_back(std::move(*link));
    --missing;
  }
  return {};
}

/// Runs all but the first in threads of their own, which have ended when it returns. Errors: those of Thread::start().
[[nodiscard]] inline Result<void> run_at_once(std::span<PathChannels> parts) noexcept {
  return catch_bad_alloc(Stage::connect, "connect", [&]() -> Result<void> {
    const ThreadHook no_hook;
    std::vector<Thread> threads;
    threads.reserve(parts.size());
    for (std::size_t i = 1; i < parts.size(); ++i) {
      auto thread = Thread::start(parts[i], no_hook, {.role = "path", .channel = static_cast<std::uint32_t>(i)});
      if (!thread) return std::unexpected(thread.error());
      threads.push_back(std::move(*thread));
    }
    parts[0].run();
    return {};
  });
}

inline void interleave(std::span<PathChannels> parts, std::span<const Path> paths, std::vector<PathLink>& links) {
  for (unsigned round = 0; round < max_channels; ++round)
    for (PathChannels& each : parts)
      if (round < each.links.size())
        links.push_back({std::move(each.links[round]), static_cast<std::size_t>(each.path - paths.data())});
}

[[nodiscard]] inline Result<ConnectedPaths> connect_all_paths(std::span<const Path> paths, const SocketOptions& options,
                                                              PathsNeeded needed, std::vector<PathLeftOut> known) {
  const Clock::time_point deadline = deadline_after(as_timeout(options.connect_timeout));
  std::vector<PathChannels> parts;
  parts.reserve(paths.size());
  for (std::size_t i = 0; i < paths.size(); ++i) {
    if (std::ranges::find(known, i, &PathLeftOut::path) != known.end()) continue;
    MULTIFD_TRY_ASSIGN(auto room, room_for_links(paths[i].channels, Stage::connect, "connect"));
    parts.push_back({&paths[i], options_of(paths[i], options), deadline, std::move(room)});
  }
  if (parts.empty()) return std::unexpected(known.front().error);
  MULTIFD_TRY(run_at_once(parts));
  ConnectedPaths result{.links = {}, .left_out = std::move(known)};
  for (const PathChannels& each : parts)
    if (each.error) result.left_out.push_back({static_cast<std::size_t>(each.path - paths.data()), *each.error});
  std::ranges::sort(result.left_out, {}, &PathLeftOut::path);
  // Cancelled is not the path's doing.
  for (const PathLeftOut& each : result.left_out)
    if (each.error.code == Errc::cancelled) return std::unexpected(each.error);
  if (!result.left_out.empty() && (needed == PathsNeeded::all || result.left_out.size() == paths.size()))
    return std::unexpected(result.left_out.front().error);
  if (needed == PathsNeeded::one_for_all) {
    std::size_t missing = 0;
    for (const PathLeftOut& each : result.left_out) missing += paths[each.path].channels;
    MULTIFD_TRY(connect_missing(parts, missing, options));
  }
  result.links.reserve(max_channels);
  interleave(parts, paths, result.links);
  return result;
}

}  // namespace detail

/// Makes one connection over a path: for a channel that has lost its own, say.
/// Errors: as connect_to(), with the path as the subject. Threads: any thread.
[[nodiscard]] inline Result<FdTransport> connect_path(const Path& path, const SocketOptions& options = {}) {
  return catch_bad_alloc(Stage::connect, "connect", [&]() -> Result<FdTransport> {
    auto link = connect_to(path.remote, options_of(path, options));
    if (!link) return std::unexpected(detail::about(path, link.error()));
    return link;
  });
}

/// Connects the channels of all paths, those of different paths at the same time.
///
/// Params `paths`: at least one, of 1 to max_channels channels together; `options`: for every connection, with what the
///   paths say in the place of local_address, device and mptcp; `known`: paths that are known to be down, of connect_main()
///   for instance: they are not tried.
/// Errors: `bad_channel_count`; `bad_option`; when no path comes up, or with PathsNeeded::all one does not, that of the
///   first, as connect_to() has it, with the path as its subject; `cancelled`; ENOMEM, and EAGAIN of a thread that does not
///   start. A path comes up when all of its channels do. `options.connect_timeout` holds for all of them together, and
///   with PathsNeeded::one_for_all once more for what goes over another path instead.
/// Threads: any thread. Cost: for several paths a thread for each, which have ended when it returns.
[[nodiscard]] inline Result<ConnectedPaths> connect_paths(std::span<const Path> paths,
                                                          const SocketOptions& options = {},
                                                          PathsNeeded needed = PathsNeeded::one,
                                                          std::vector<PathLeftOut> known = {}) {
  MULTIFD_TRY(detail::check_paths(paths));
  return catch_bad_alloc(Stage::connect, "connect",
                         [&] { return detail::connect_all_paths(paths, options, needed, std::move(known)); });
}

/// Makes the main connection over the first path that is up. One path is tried after the other, because a destination may
/// take whichever connection comes first for the main one.
///
/// Params: as connect_paths(). Of `options.connect_timeout` each path gets its share, so that a silent one leaves time for
///   the next.
/// Errors: as connect_paths().
/// Threads: any thread.
[[nodiscard]] inline Result<MainOverPaths> connect_main(std::span<const Path> paths, const SocketOptions& options = {},
                                                        PathsNeeded needed = PathsNeeded::one) {
  MULTIFD_TRY(detail::check_paths(paths));
  return catch_bad_alloc(Stage::connect, "connect", [&]() -> Result<MainOverPaths> {
    std::vector<PathLeftOut> left_out;
    const auto deadline = deadline_after(as_timeout(options.connect_timeout));
    for (std::size_t i = 0; i < paths.size(); ++i) {
      const auto now = detail::Clock::now();
      const auto share = deadline == detail::Clock::time_point::max()
                             ? deadline
                             : now + std::max(deadline - now, detail::Clock::duration(0)) /
                                         static_cast<std::int64_t>(paths.size() - i);
      auto link = detail::connect_until(paths[i].remote, share, options_of(paths[i], options));
      if (link) return MainOverPaths{{std::move(*link), i}, std::move(left_out)};
      const Error error = detail::about(paths[i], link.error());
      if (error.code == Errc::cancelled || needed == PathsNeeded::all) return std::unexpected(error);
      left_out.push_back({i, error});
    }
    return std::unexpected(left_out.front().error);
  });
}

}  // namespace multifd
