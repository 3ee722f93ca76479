// SPDX-License-Identifier: MIT
//
// Where a source connects: one address with --connect and --channels, or several paths with --path; and what becomes of
// connections that are lost. A path's channels keep its cap together, and its bytes are counted.
#pragma once

#include <multifd/migrate/resume_options.hpp>
#include <multifd/migrate/status.hpp>
#include <multifd/transport/connect_paths.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "common/link.hpp"
#include "common/program.hpp"
#include "common/tls.hpp"

namespace program {

/// --path and --insist, and what they stand in the place of.
class PathOptions {
 public:
  /// Adds the options. Params `prefix`: "" or "out-"; the other options are --connect and --PREFIXchannels.
  void add_to(CLI::App& app, const std::string& prefix = {});

  /// Reads them; without --path, `connect` is the address. Throws Usage, for --path beside --connect or --channels, too.
  ///
  /// Params `channels`: of all paths together, when there are some.
  void read(const std::string& connect, unsigned& channels);

  /// Whether there is a --path.
  bool given() const noexcept { return !texts_.empty(); }
  /// Never empty behind read(); without --path one.
  const std::vector<multifd::Path>& paths() const noexcept { return paths_; }
  bool insist() const noexcept { return insist_; }
  /// "--path" with the prefix.
  const std::string& name() const noexcept { return name_; }
  /// The address that TLS and warnings are about: the first that other machines can reach, else the first.
  const multifd::Address& address() const;
  /// The addresses, for messages.
  std::string text() const;

 private:
  std::vector<std::string> texts_;
  bool insist_ = false;
  std::string name_;
  const CLI::Option* connect_ = nullptr;
  const CLI::Option* channels_ = nullptr;
  std::vector<multifd::Path> paths_;
};

/// --resume and what goes with it.
class ResumeOptions {
 public:
  void add_to(CLI::App& app);
  /// The time limits alone: for a destination.
  void add_limits_to(CLI::App& app);
  /// Behind parsing.
  multifd::migrate::ResumeOptions options() const;
  /// The time limits with their values, for a destination that is another program.
  std::vector<std::string> limit_arguments() const;

 private:
  bool automatic_ = false;
  bool by_signal_ = false;
  multifd::migrate::ResumeOptions options_;
};

/// How guest pages get into a plain connection: multifd::SpliceTransport, or copied.
enum class Way {
  copied,
  spliced,
  automatic,  ///< spliced over UNIX sockets, where that always pays
};

/// Makes connections into links: TLS' handshake where it is on. Threads: any.
class Securing {
 public:
  /// Params: `tls` has to outlive it.
  Securing(const Tls& tls, std::chrono::milliseconds limit, Way way = Way::copied)
      : tls_(tls), limit_(limit), way_(way) {}

  /// For migrate_to().
  std::function<multifd::Result<Link>(multifd::FdTransport, const multifd::Interrupt&)> function();
  /// Of the first connection; empty: plain, or there was none.
  std::string cipher() const;

 private:
  const Tls& tls_;
  const std::chrono::milliseconds limit_;
  const Way way_;
  mutable std::mutex mutex_;
  std::optional<std::string> cipher_;
};

/// What a migration tells of its paths: on stderr, and in the report. Threads: the hook any.
class PathLog {
 public:
  /// Params `options`: has to outlive it. `name`: "destination", "receiver": who is at the other end.
  PathLog(const PathOptions& options, std::string name) : options_(options), name_(std::move(name)) {}

  /// For SourceOptions::on_path.
  std::function<void(const multifd::migrate::PathEvent&)> hook();

  /// Adds the keys "paths", when there is a --path, and "lost".
  void add_to(nlohmann::json& report, const std::vector<multifd::migrate::PathProgress>& paths,
              const multifd::migrate::LostConnections& lost) const;
  /// The same as the end of a summary, or nothing.
  std::string note(const std::vector<multifd::migrate::PathProgress>& paths,
                   const multifd::migrate::LostConnections& lost) const;

 private:
  const PathOptions& options_;
  const std::string name_;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::string> left_out_;
};

/// The connections of one run. Threads: the main one; report() and note() any, behind the others.
class Connections {
 public:
  /// Params `options`: has to outlive it. `missing`: what becomes of the channels of a path that is down, unless the
  ///   user insists on all paths.
  Connections(const PathOptions& options, multifd::PathsNeeded missing);

  /// The main connection, over the first path that is up. Warns of those that are not. Throws Failure, with `whom` in
  /// front where there is one path.
  multifd::FdTransport main(const multifd::SocketOptions& options, const std::string& whom);
  /// The channels. Throws as main(), behind which it comes.
  std::vector<multifd::FdTransport> channels(const multifd::SocketOptions& options, const std::string& whom);

  /// Puts connections, in the order in which main() and channels() have returned them, under their paths' caps.
  Link on_path(Link main) const;
  std::vector<Link> on_paths(std::vector<Link> channels) const;

  /// Adds the key "paths" when there is a --path: their addresses, channels, whether they are up, and bytes.
  void add_to(nlohmann::json& report) const;
  /// The same as the end of a summary, or nothing.
  std::string note() const;

 private:
  struct PathState {
    std::shared_ptr<multifd::PathShared> shared;
    unsigned channels = 0;  ///< that go over it
    std::string error{};    ///< why it is not up; empty: it is
  };

  multifd::PathsNeeded needed() const noexcept;
  Failure failure_of(const multifd::Error& error, const std::string& whom) const;
  void tell_of(const std::vector<multifd::PathLeftOut>& left_out);

  const PathOptions& options_;
  multifd::PathsNeeded missing_;
  std::vector<PathState> states_;
  std::size_t main_path_ = 0;
  std::vector<std::size_t> channel_paths_;
  std::vector<multifd::PathLeftOut> down_;
};

}  // namespace program
