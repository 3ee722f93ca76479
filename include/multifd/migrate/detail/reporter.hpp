// SPDX-License-Identifier: MIT
//
// The side of a Migration that runs it: what it has been asked, and what it tells.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>

#include "multifd/migrate/convergence.hpp"
#include "multifd/migrate/migration.hpp"
#include "multifd/migrate/ownership.hpp"
#include "multifd/migrate/round.hpp"
#include "multifd/migrate/status.hpp"
#include "multifd/postcopy/userfaultfd.hpp"
#include "multifd/result.hpp"

namespace multifd::migrate {

/// Threads: the one that runs the migration.
class MigrationReporter {
 public:
  /// Params `migration`: outlives this object. `on_event`: may be empty.
  MigrationReporter(Migration& migration, const std::function<void(const Event&)>& on_event)
      : state_(*migration.state_), on_event_(on_event) {
    const std::scoped_lock lock(state_.mutex);
    state_.begun = true;
    state_.begin = std::chrono::steady_clock::now();
  }
  MigrationReporter(const MigrationReporter&) = delete;
  MigrationReporter& operator=(const MigrationReporter&) = delete;
  ~MigrationReporter() {
    channels({}, {});
    steer_paths({});
  }

  /// Since the migration began.
  Time now() const noexcept { return std::chrono::steady_clock::now() - state_.begin; }

  // ---- What was asked

  const Interrupt& interrupt() const noexcept { return state_.interrupt; }
  const Interrupt& proceed() const noexcept { return state_.proceed; }
  /// How often cancel() was called.
  unsigned cancels() const noexcept { return state_.cancels.load(std::memory_order_relaxed); }
  bool switchover_asked() const noexcept { return state_.switch_over.load(std::memory_order_relaxed); }

  // ---- What is told

  void status(MigrationStatus status) {
    tell(EventKind::status, [&](MigrationProgress& now) {
      now.status = status;
      now.since = now.elapsed;
      now.step = MigrationStep::none;
    });
  }
  /// Whether it is that one now.
  bool is(MigrationStatus status) const {
    const std::scoped_lock lock(state_.mutex);
    return state_.progress.status == status;
  }
  /// status() when the migration ends, or must not: a hook that gets no memory then keeps nothing from being done.
  void end_status(MigrationStatus status) {
    ignore_bad_alloc([&] { this->status(status); });
  }
  void step(MigrationStep step) {
    tell(EventKind::step, [&](MigrationProgress& now) { now.step = step; });
  }
  void connections(unsigned announced, unsigned connected) {
    const std::scoped_lock lock(state_.mutex);
    state_.progress.channels = announced;
    state_.progress.connected = connected;
  }
  void peer_gave_up(std::string_view text) {
    const std::scoped_lock lock(state_.mutex);
    state_.peer_text = text;
  }
  void memory(std::uint64_t ram_bytes) {
    const std::scoped_lock lock(state_.mutex);
    state_.progress.ram_bytes = ram_bytes;
  }
  /// Params `pages`: that the destination does not have.
  void missing(std::uint64_t pages) {
    const std::scoped_lock lock(state_.mutex);
    state_.progress.missing_pages = pages;
  }
  void round_begun(std::uint64_t number, std::uint64_t dirty_pages) {
    const std::scoped_lock lock(state_.mutex);
    state_.progress.round = number;
    state_.progress.dirty_pages = dirty_pages;
  }
  void round_ended(const Round& round, const Decision& decision) {
    const auto update = [&](MigrationProgress& now) {
      state_.rounds.push_back(round);
      now.pages_per_s = round.pages_per_s;
      now.dirty_pages_per_s = round.dirty_pages_per_s;
      now.predicted_downtime = decision.downtime.total();
      now.reason = decision.reason;
      now.throttle_percent = decision.throttle_percent;
      now.bound = round.bound;
    };
    tell(EventKind::round_end, update, &round, &decision);
  }
  template <class Ownership>
  void owner(const Ownership& ownership) {
    const std::scoped_lock lock(state_.mutex);
    state_.owner = ownership.owner();
    state_.owner_text = ownership.text();
  }
  /// Keeps what holds a guest's threads that wait for memory which is lost.
  void freeze(std::optional<postcopy::Userfaultfd> held) noexcept {
    const std::scoped_lock lock(state_.mutex);
    state_.frozen = std::move(held);
  }
  void not_resumed(const Error& error) {
    const std::scoped_lock lock(state_.mutex);
    state_.not_resumed = error;
  }
  /// Params `moved`, `bandwidth`: empty once the channels are gone; the last numbers are kept then.
  void channels(std::function<Moved()> moved, std::function<void(std::uint64_t)> bandwidth) {
    const std::scoped_lock lock(state_.mutex);
    if (state_.moved) state_.progress.moved = state_.moved();
    state_.moved = std::move(moved);
    state_.apply_bandwidth = std::move(bandwidth);
    if (state_.apply_bandwidth && state_.bandwidth) state_.apply_bandwidth(*state_.bandwidth);
  }

  /// Params `paths`: empty once they are gone; the last numbers are kept then.
  void steer_paths(PathHooks paths) {
    const std::scoped_lock lock(state_.mutex);
    if (state_.steer_paths.lost) state_.progress.lost = state_.steer_paths.lost();
    if (state_.steer_paths.progress) ignore_bad_alloc([&] { state_.last_paths = state_.steer_paths.progress(); });
    state_.steer_paths = std::move(paths);
  }

 private:
  template <class Update>
  void tell(EventKind kind, const Update& update, const Round* round = nullptr, const Decision* decision = nullptr) {
    MigrationProgress now;
    {
      const std::scoped_lock lock(state_.mutex);
      state_.progress.elapsed = this->now();
      if (state_.moved) state_.progress.moved = state_.moved();
      if (state_.steer_paths.lost) state_.progress.lost = state_.steer_paths.lost();
      update(state_.progress);
      now = state_.progress;
    }
    if (on_event_) on_event_({.kind = kind, .progress = now, .round = round, .decision = decision});
  }

  Migration::State& state_;
  const std::function<void(const Event&)>& on_event_;
};

}  // namespace multifd::migrate
