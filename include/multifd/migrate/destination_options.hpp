// SPDX-License-Identifier: MIT
//
// DestinationOptions: the settings of migrate_from().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "multifd/ends/into_memory.hpp"
#include "multifd/error_value.hpp"
#include "multifd/memory/keyed_digest.hpp"
#include "multifd/migrate/migration.hpp"
#include "multifd/migrate/postcopy_options.hpp"
#include "multifd/migrate/resume_options.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/options.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::migrate {

/// Settings of migrate_from(). Everything has a default. What the source announces is taken as it is; what is set here is
/// insisted on. Time limits: 0 is none (time_limit.hpp). Names are the caller's, and are used until the call returns.
struct DestinationOptions {
  // ---- What is insisted on; default: whatever the source announces

  std::optional<unsigned> channels{};             ///< how many
  std::optional<std::string_view> compression{};  ///< a name of the compressors that the program offers
  std::optional<std::string_view> zero_pages{};   ///< "none", "legacy", "multifd"
  std::optional<Digest> digest{};                 ///< whether each packet has one
  std::optional<Uuid> uuid{};                     ///< of the VM

  // ---- Memory

  /// The guest's page size, which must be the source's. None: whatever the source announces (Announcement::page_bytes).
  std::optional<std::size_t> page_bytes = 4096;
  std::uint64_t max_ram_bytes = std::uint64_t{1}
                                << 42;  ///< the most that a source may announce; prepare() sees no more
  std::uint64_t max_device_bytes = std::uint64_t{1} << 28;  ///< the most that one device's state may have
  /// What is known of the memory that prepare() gives, and whether it is populated ahead: IntoMemory explains these.
  IntoMemory into{};
  /// Says that the memory which prepare() gives holds an older copy of this guest's: a file that was made of one, or what an
  /// earlier migration has left; anything may be in it. A source with SourceOptions::base sends only what differs then, any other one
  /// sends all. Set it to gmac_digests() of migrate/gmac.hpp. Should the migration fail, the memory is a mix of both. Not with
  /// DestinationMemory::zeroed. Costs a read of all memory that is not known to be zero. Default: none.
  KeyedDigests base{};
  DestinationPostcopyOptions postcopy{};  ///< whether the guest may run before its memory is there, and how it gets it

  // ---- Lost connections

  DestinationResumeOptions
      resume{};  ///< what happens when the source's connections are lost, if it wants them to return

  // ---- Time limits

  std::chrono::milliseconds first_timeout{0};           ///< for a source to come
  std::chrono::milliseconds accept_timeout{10'000};     ///< from its first connection to its last
  std::chrono::milliseconds retry_timeout{3'000};       ///< for its next try, after one that it gave up
  std::chrono::milliseconds hello_timeout{10'000};      ///< for the channels' hellos, once all are there
  std::chrono::milliseconds progress_timeout{300'000};  ///< how long nothing may arrive
  /// How long nothing may arrive when all memory is here: while the source saves its devices' state, and reads its memory
  /// where it is to be verified.
  std::chrono::milliseconds save_timeout{300'000};
  std::chrono::milliseconds hand_over_timeout{120'000};  ///< for the source's HAND_OVER behind LOADED

  // ---- Hooks

  /// Called at each change of the status, by the thread that called migrate_from(). Keep it short.
  std::function<void(const Event&)> on_event{};
  /// Called when the guest runs with all of its memory, and the source has been told that it runs; may take long. What it returns, up to 510 bytes, goes to the
  /// source's SourceOptions::on_user_data. Default: nothing.
  std::function<std::vector<std::byte>()> farewell{};
  /// What the source is told when this side gives up, up to 400 bytes. Default: describe().
  std::function<std::string(const Error&)> reason{};
  /// Called for each connection that is closed because it belongs to no migration, or to another try. Default: nothing.
  /// Once a source is accepted with which memory may follow, another thread than the caller's calls it.
  std::function<void(const char* why)> on_stranger{};
  ThreadHook thread_hook{};  ///< runs in each channel's thread before its first byte
  /// Follows and ends the migration from other threads. Default: none. Not owned.
  Migration* migration = nullptr;
};

}  // namespace multifd::migrate
