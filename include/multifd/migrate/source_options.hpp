// SPDX-License-Identifier: MIT
//
// SourceOptions: the settings of migrate_to().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "multifd/any.hpp"
#include "multifd/error_value.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/migrate/any_rule.hpp"
#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/dirty/rearm_chunks.hpp"
#include "multifd/migrate/migration.hpp"
#include "multifd/migrate/postcopy_options.hpp"
#include "multifd/migrate/resume_options.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/options.hpp"
#include "multifd/peer_profile.hpp"
#include "multifd/transport/interrupt.hpp"
#include "multifd/transport/socket_options.hpp"

namespace multifd::migrate {

/// When the guest is stopped, and what happens when that takes too long.
struct ConvergeOptions {
  /// The downtime that the guest's user does not mind much. Most callers set this and leave the rest alone. It is the
  /// default rule's price limit, and no hard bound: see PricedDowntime. Ignored where `rule` is given.
  std::chrono::milliseconds max_downtime{300};
  /// Another rule than PricedDowntime: `FixedDowntime({.max_downtime = 300ms})`. Default: none.
  std::optional<AnySwitchRule> rule{};
  /// Slows a guest that dirties too much: AutoConverge. Default: off; the guest's user notices it.
  AnyThrottleRule throttle{};
  /// How long the migration may take up to the switchover, and what happens then. Default: no limit.
  std::chrono::milliseconds time_limit{0};
  /// Action::give_up, Action::switch_now, or, with a strategy of PostcopyOptions, Action::memory_on_demand.
  Action at_time_limit = Action::give_up;
  /// What stopping the vCPUs, saving, loading and starting them takes, as far as it is known: part of each promised downtime.
  /// Default: 0. Measure it once (MigrationReport::downtime) where downtimes of some milliseconds matter.
  std::chrono::microseconds device_state{0};
  std::uint64_t max_rounds = 0;  ///< the same for rounds. Default: no limit; most callers leave it alone
};

/// Whether both memories are compared page by page before the guest is handed over.
enum class Verify : std::uint8_t {
  off,
  where_possible,  ///< where the destination is one of ours, with that feature; MigrationReport::pages_verified tells
  required,        ///< another destination is refused before a page travels
};

/// Settings of migrate_to(). Everything has a default: most callers set `channels`, `compression` and
/// `converge.max_downtime`. Time limits: 0 is none (time_limit.hpp). Names and spans are the caller's, and are used until
/// the call returns.
struct SourceOptions {
  // ---- The stack: AnySenderOptions explains these

  unsigned channels = 4;                    ///< 1 to 255: where migrate_to() connects
  std::string_view compression = "none";    ///< a name of the compressors that the program offers
  std::optional<int> level{};               ///< none: the compressor's default
  std::string_view zero_pages = "multifd";  ///< a name of the zero policies that the program offers
  std::uint64_t bandwidth = 0;  ///< cap in bytes per second over all channels; 0: none. See Migration::set_bandwidth()
  Digest digest = Digest::off;  ///< a digest in each packet

  // ---- The peer

  /// Which generation receives. Default: migrate_from(). With a QEMU's the stream is QEMU's alone: no settings are compared
  /// and no reason is told.
  PeerProfile peer = peer_multifd;
  /// What the stream's configuration says; a QEMU compares it with its own, and takes the stream's style from it.
  std::string_view machine_type = "multifd";
  Uuid uuid{};                        ///< of the VM; default: none
  std::span<const std::byte> user{};  ///< for DestinationGuest::prepare(), up to 1024 bytes. Own peers only

  // ---- What is sent

  ConvergeOptions converge{};  ///< when the guest is stopped
  PostcopyOptions postcopy{};  ///< whether it may run at the destination before its memory is there
  ResumeOptions resume{};      ///< what happens when connections are lost
  bool insist_on_paths =
      false;  ///< whether a path that does not come up is an error. Default: a warning, as long as one does
  /// Compares both memories page by page before the guest is handed over. Costs a read of all memory on both sides while
  /// the guest stands still. Default: off; for tests, and for hosts that are not trusted. Not where memory follows: so not
  /// Verify::required with a strategy of PostcopyOptions.
  Verify verify = Verify::off;
  /// Leaves out pages that were written and yet are as they were last sent. Default: off: dirty pages are copied and hashed
  /// for it, and 16 bytes a page are kept. Under a cap of 1 GB/s or less all are; else, because copies would slow
  /// it down, a sample of those behind the first round, and all once half of these are unchanged. Switch it on for guests that rewrite what they have: caches, collected heaps.
  bool skip_unchanged = false;
  /// Looks, once, which memory was never touched: that is zero, and is neither read nor sent as pages. Default: on. Switch it off
  /// where memory that was never touched is not zero: while a userfaultfd still fills it (missing mode), as behind a lazy
  /// restore; or where the process may not read /proc/self/pagemap. Costs a scan of the page tables, and a look at the open
  /// descriptors for the file of shared memory.
  bool find_untouched = true;
  /// Sends only what differs from an older copy, where the destination's memory holds one (DestinationOptions::base). Set it to
  /// gmac_digests() of migrate/gmac.hpp (component `openssl`), with which the two compare their pages ahead of the first round.
  /// Costs a read of all memory on both sides then, 16 bytes a page the other way; nothing where there is no older copy. Default: none.
  KeyedDigests base{};
  /// Waits with the guest stopped, ahead of the last round, for Migration::proceed(). Default: off.
  bool pause_before_switchover = false;
  /// What DirtySource::rearm() clears at once. Most callers leave this alone.
  std::uint64_t rearm_pages = default_rearm_pages;

  // ---- Time limits

  std::chrono::milliseconds connect_timeout{10'000};  ///< for all connections together
  /// Of the channels' connections, where migrate_to() makes them. What paths and the other options say goes before.
  SocketOptions sockets{};
  /// How long the destination may take to answer during setup: to read the settings and prepare its memory.
  std::chrono::milliseconds answer_timeout{30'000};
  std::chrono::milliseconds progress_timeout = default_send_progress_timeout;  ///< how long nothing may move
  /// How long the destination may take to load the state, and to run the guest, while the guest stands still.
  std::chrono::milliseconds load_timeout{120'000};
  /// How long to wait for the destination's end behind RUNNING, for its USER_DATA. The migration has completed by then.
  std::chrono::milliseconds farewell_timeout{10'000};

  // ---- Hooks

  /// Called at each change of the status and at each round's end, by the thread that called migrate_to(). Keep it short.
  std::function<void(const Event&)> on_event{};
  /// Called when a path does not come up, when a connection is lost, and when it has come back: one call at a time, by whichever
  /// thread has noticed. Keep it short.
  std::function<void(const PathEvent&)> on_path{};
  /// What the destination is told when this side gives up, up to 400 bytes. Default: describe(). Own peers only.
  std::function<std::string(const Error&)> reason{};
  /// Called with what the destination's VMM says (DestinationOptions::farewell). Own peers only.
  std::function<void(std::span<const std::byte>)> on_user_data{};
  ThreadHook thread_hook{};  ///< runs in each channel's thread before its first packet
  /// Follows and steers the migration from other threads. Default: none. Not owned.
  Migration* migration = nullptr;
};

}  // namespace multifd::migrate
