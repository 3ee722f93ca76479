// SPDX-License-Identifier: MIT
//
// Migration: the handle of one migration, for the threads beside the one that runs it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "multifd/migrate/ownership.hpp"
#include "multifd/migrate/resume_options.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/postcopy/userfaultfd.hpp"
#include "multifd/result.hpp"
#include "multifd/transport/interrupt.hpp"

namespace multifd::migrate {

class MigrationReporter;

/// What a migration lets others do with its paths; each may be empty.
struct PathHooks {
  std::function<std::vector<PathProgress>()> progress{};
  std::function<LostConnections()> lost{};
  std::function<void(std::size_t, std::uint64_t)> set_bandwidth{};
  std::function<void()> resume{};
};

/// Follows and steers one migration: given to migrate_to() or migrate_from() in their options. For one migration only.
///
/// Threads: any. Lifetime: outlives the call that has it; of a destination that has returned Errc::memory_lost also the guest,
///   whose threads go on with empty memory instead of what is lost once this object is gone. Cost: two descriptors; a mutex, taken a few times per round and
/// once per call of this object, never per page.
class Migration {
 public:
  /// Errors: the errno of eventfd(); ENOMEM.
  [[nodiscard]] static Result<Migration> create() {
    return catch_bad_alloc(Stage::setup, "Migration", []() -> Result<Migration> {
      MULTIFD_TRY_ASSIGN(Interrupt cancel, Interrupt::create());
      MULTIFD_TRY_ASSIGN(Interrupt proceed, Interrupt::create());
      return Migration(std::make_unique<State>(std::move(cancel), std::move(proceed)));
    });
  }

  // ---- Steering

  /// Ends the migration: the guest stays at the source, unless the hand-over has begun, which is seen through then. Returns
  /// at once; migrate_to() returns Errc::cancelled within a second. Also in a signal handler.
  /// Where memory follows: once the guest runs at the destination only MigrationStatus::postcopy_paused heeds it. The side
  /// that is called then gives the rest of the memory up, for good, and returns Errc::memory_lost.
  void cancel() noexcept {
    state_->cancels.fetch_add(1, std::memory_order_relaxed);
    state_->interrupt.trigger();
  }
  /// Asks for the switchover at the end of this round, whatever the downtime. For a source.
  void switch_over() noexcept { state_->switch_over.store(true, std::memory_order_relaxed); }
  /// Ends the wait in MigrationStatus::pre_switchover. Called before, there is no wait. For a source.
  void proceed() noexcept { state_->proceed.trigger(); }
  /// Changes the cap. Params `bytes_per_s`: over all channels; 0: none. For a source.
  void set_bandwidth(std::uint64_t bytes_per_s) {
    const std::scoped_lock lock(state_->mutex);
    state_->bandwidth = bytes_per_s;
    if (state_->apply_bandwidth) state_->apply_bandwidth(bytes_per_s);
  }

  /// Changes the cap of one path. Params `path`: its place in migrate_to()'s list; one that is not there is passed over.
  /// `bytes_per_s`: 0: none. For a source.
  void set_path_bandwidth(std::size_t path, std::uint64_t bytes_per_s) {
    const std::scoped_lock lock(state_->mutex);
    if (state_->steer_paths.set_bandwidth) state_->steer_paths.set_bandwidth(path, bytes_per_s);
  }
  /// Tries now to make lost connections again, also where ResumeOptions::automatic is off. For a source.
  void resume() {
    const std::scoped_lock lock(state_->mutex);
    if (state_->steer_paths.resume) state_->steer_paths.resume();
  }

  // ---- Following

  /// Each path, in migrate_to()'s order, while there are connections; else as they were last. Cost: copies. For a source.
  std::vector<PathProgress> paths() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->steer_paths.progress ? state_->steer_paths.progress() : state_->last_paths;
  }
  /// Now. Cost: a lock, and while there are channels a sum over them. Allocates nothing.
  MigrationProgress progress() const {
    const std::scoped_lock lock(state_->mutex);
    MigrationProgress now = state_->progress;
    if (state_->begun && !is_end(now.status)) now.elapsed = std::chrono::steady_clock::now() - state_->begin;
    if (state_->moved) now.moved = state_->moved();
    if (state_->steer_paths.lost) now.lost = state_->steer_paths.lost();
    return now;
  }
  /// Every round that has ended. Cost: copies them.
  std::vector<Round> rounds() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->rounds;
  }
  /// Which side may run the guest, as far as this side knows.
  Owner owner() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->owner;
  }
  /// What a person has to know of that when the migration has not completed: one line, static text.
  std::string_view owner_text() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->owner_text;
  }
  /// The other side's own words, when it has given up: all of them, of which Error::subject has the beginning. Printable
  /// ASCII.
  std::string peer_text() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->peer_text;
  }
  /// Why the guest could not be resumed at the source, when that failed after a migration that came to nothing.
  std::optional<Error> not_resumed() const {
    const std::scoped_lock lock(state_->mutex);
    return state_->not_resumed;
  }
  /// Triggered by cancel(): for waits of the caller's own that end with it.
  const Interrupt& interrupt() const noexcept { return state_->interrupt; }

 private:
  friend MigrationReporter;
  struct State {
    State(Interrupt cancel, Interrupt go_on) noexcept : interrupt(std::move(cancel)), proceed(std::move(go_on)) {}

    Interrupt interrupt;
    Interrupt proceed;
    std::atomic<bool> switch_over = false;
    std::atomic<unsigned> cancels = 0;
    /// Of a destination whose guest has lost memory: keeps the threads that need it standing still, as long as it is open.
    std::optional<postcopy::Userfaultfd> frozen;

    mutable std::mutex mutex;  ///< of all below
    bool begun = false;
    std::chrono::steady_clock::time_point begin{};
    MigrationProgress progress{};
    std::vector<Round> rounds;
    Owner owner = Owner::source;
    std::string_view owner_text;
    std::string peer_text;
    std::optional<Error> not_resumed;
    std::function<Moved()> moved;  ///< while there are channels
    std::function<void(std::uint64_t)> apply_bandwidth;
    std::optional<std::uint64_t> bandwidth;
    PathHooks steer_paths;  ///< while there are connections
    std::vector<PathProgress> last_paths;
  };
  explicit Migration(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

  std::unique_ptr<State> state_;
};

}  // namespace multifd::migrate
