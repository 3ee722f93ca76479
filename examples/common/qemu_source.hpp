// SPDX-License-Identifier: MIT
//
// A real QEMU that migrates to one of the programs: its connections, and its main stream as elements.
#pragma once

#include <multifd/qemu/accept_source.hpp>
#include <multifd/qemu/main_stream_reader.hpp>

#include <chrono>
#include <optional>
#include <string>

#include "common/pipe.hpp"
#include "common/report.hpp"
#include "common/stacks.hpp"
#include "common/tls.hpp"
#include "common/uuid.hpp"

namespace program {

/// Options that say what the source is expected to be: nothing of it is negotiated.
struct SourceOptions {
  std::string listen;
  unsigned channels = 2;
  std::string compression = "none";
  std::string uuid;
  std::chrono::milliseconds timeout = std::chrono::seconds(30);  ///< 0: no limit (time_limit.hpp)
  std::uint64_t page_size = 4096;
  std::uint64_t max_ram = std::uint64_t{1} << 40;
  TimeLimits limits;  ///< --peer-timeout of it
  Tls tls;
  std::optional<PipeAddress> pipe;  ///< `listen`, where it is one

  /// `prefix`: "" or "in-", for the options that a program has twice.
  /// `fewest`: none: also a source without multifd, at a socket or at a pipe (pipe.hpp).
  void add_to(CLI::App& app, const std::string& prefix, FewestChannels fewest = FewestChannels::one);
  /// Checks --listen, --uuid and what they do not go with, and reads the credentials of TLS. Throws Usage, Failure.
  void prepare();
  /// Throws Usage.
  multifd::UuidCheck uuid_check() const;

  /// A limit of a program's own that has no option: --timeout shortens the one and lengthens the other, and 0 lifts
  /// both.
  std::chrono::milliseconds at_most(std::chrono::milliseconds usual) const;
  std::chrono::milliseconds at_least(std::chrono::milliseconds usual) const;
};

/// Listens (or opens a pipe) until a source has connected with everything it should have; says on stderr where it listens, and when it
/// turns a stranger away. The first connection may take for ever. Throws Failure.
class QemuSource {
 public:
  QemuSource(const SourceOptions& options, const multifd::Interrupt& interrupt);

  Link& main() noexcept { return links_.main; }
  std::vector<Link> take_channels() { return std::move(links_.channels); }

  /// AnyReceiver::finish() when everything is there. A source that has completed closes its channels; one that does not
  /// is waited for no longer than end_limit(), and that nobody is harmed by: returns then what was late, in words.
  /// Throws Failure for channels that end in another way.
  /// `receiver`: null where there are no channels.
  std::optional<std::string> finish(AnyReceiver* receiver);

  /// Behind the stream, of a pipe: waits for the command to end, no longer than end_limit(). Returns what was late, in words.
  /// Throws Failure where the command has failed.
  std::optional<std::string> end_command();
  /// Throws Failure where a pipe's command has ended by now, and has failed: the reason of what was wrong in its stream.
  void check_command();
  /// Whether the source gets answers, if it wants any: not from a pipe.
  bool takes_answers() const noexcept { return links_.main.is_two_way(); }

  /// How long a source that has said everything may keep its connections open.
  std::chrono::milliseconds end_limit() const noexcept;

  /// Throws Failure if the source has opened more channels than it should have: pages would be missing that travel on
  /// them. A source has connected all of them before its first epoch ends. Other connections are none of its business: a
  /// second source may be early. Under TLS they are closed with a line, for what they are is known only by reading;
  /// plain ones wait for the end of the program.
  ///
  /// `receiver`: who has taken the channels; null where there are none.
  void refuse_more_channels(const AnyReceiver* receiver);

  /// For a silent main connection ahead of RAM's end: a source that fails can leave it open without a word, and then
  /// only its channels tell. Throws Failure if one of them has ended, or if the source does not begin.
  ///
  /// `receiver`: who has taken the channels; null as long as nobody has.
  void check_channels(const AnyReceiver* receiver) const;

  /// A failure in words, with what this side expects where a code alone does not say it.
  Failure failure(const multifd::Error& error) const;
  /// What end_limit() has passed for, in words: `what`: "its channels".
  std::string still_open(const char* what) const;

 private:
  struct Links {
    Link main;
    std::vector<Link> channels;
  };
  Links accept();
  Links listen();
  /// Whether a connection is there that is not the source's.
  bool any_more() const noexcept;

  const SourceOptions& options_;
  multifd::AcceptSourceOptions accept_options_;
  std::optional<Pipe> pipe_;
  std::optional<multifd::Listener> listener_;  ///< unless there is a pipe
  std::optional<TlsAcceptor> acceptor_;        ///< under TLS
  Links links_;
  Stopwatch since_whole_;  ///< since all connections were there
};

/// The failure of a source that breaks off: the same words wherever that is noticed first. `noticed`: where, and how.
Failure source_lost(const std::string& noticed);

/// A MainStreamReader whose failures are in words. Throws Failure.
class MainStream {
 public:
  struct Hooks {
    std::function<void()> before_wait{};  ///< before each wait for the source: for what is to be sent on by then
    /// After each second in which nothing came; true ends the wait. May throw.
    std::function<bool()> on_silence{};
  };
  MainStream(Link& link, const SourceOptions& options, Hooks hooks);

  /// The next element; none at the end of the connection, when nothing has come for `idle`, or as Hooks::on_silence says.
  std::optional<multifd::qemu::Element> next(std::chrono::milliseconds idle = multifd::no_timeout);

  // As MainStreamReader has them.
  std::uint64_t bytes() const noexcept { return reader_.bytes(); }
  bool ended() const noexcept { return reader_.ended(); }
  const multifd::qemu::MainStreamParser& parser() const noexcept { return reader_.parser(); }

 private:
  Failure failure(const multifd::Error& error);

  multifd::qemu::MainStreamReader<Link> reader_;
  const Hooks hooks_;
  const bool is_pipe_;
};

/// Likely causes when a QEMU that migrates to a program stands still, and when it goes on for ever.
inline constexpr const char* source_stands_still =
    "Is the source's QEMU stopped (SIGSTOP, a debugger, its host paused), or held before its switchover "
    "(pause-before-switchover: migrate-continue), or the network between cut? `info migrate` in its monitor says more; "
    "a guest that is paused migrates all the same";
inline constexpr const char* source_goes_on =
    "The guest may write memory faster than the connection carries it: raise the source's max-bandwidth or "
    "downtime-limit, slow the guest down (auto-converge) or pause it";

const char* to_string(multifd::SyncStyle style);

/// Text from a peer, fit for a terminal: control characters and what is not ASCII as '?'.
std::string printable(std::string_view text);

}  // namespace program
