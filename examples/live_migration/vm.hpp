// SPDX-License-Identifier: MIT
//
// The small VMM's guest as multifd::migrate sees it: a SourceGuest and a DestinationGuest.
#pragma once

#include <multifd/migrate/dirty/dirty_hooks.hpp>
#include <multifd/migrate/guest.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "live_migration/guest.hpp"

namespace live {

/// A guest that runs at the source.
class SourceVm {
 public:
  /// Params `guest`: has booted; outlives this object. Throws program::Failure.
  explicit SourceVm(Guest& guest);

  multifd::Result<multifd::RamMap> ram() { return ram_; }
  multifd::migrate::DirtyFromHooks& dirty_source() { return *dirty_; }
  multifd::Result<void> pause();
  multifd::Result<void> resume();
  multifd::Result<void> save(multifd::migrate::StateWriter& to);

 private:
  Guest& guest_;
  multifd::RamMap ram_{guest_page_size};
  std::optional<multifd::migrate::DirtyFromHooks> dirty_;
};

/// What a source's VMM says of its guest beside its memory: SourceOptions::user.
struct Machine {
  Backend backend = Backend::automatic;
  double run_after_s = 0;  ///< how long the destination runs it before the verdict

  /// As bytes, and back.
  std::string text() const;
  static multifd::Result<Machine> parse(std::span<const std::byte> text);
};

/// A guest that is made when a source has announced it.
class DestinationVm {
 public:
  /// Params `backend`: what the user insists on; automatic: what the source has. `most_memory`: what is taken.
  DestinationVm(Backend backend, std::uint64_t most_memory) : backend_(backend), most_memory_(most_memory) {}

  multifd::Result<multifd::RamMap> prepare(const multifd::migrate::Announcement& announced);
  multifd::Result<void> load(multifd::migrate::StateReader& from);
  multifd::Result<void> resume();

  const Machine& machine() const { return machine_; }
  Guest& guest() { return *guest_; }

 private:
  const Backend backend_;
  const std::uint64_t most_memory_;
  Machine machine_;
  std::unique_ptr<Guest> guest_;
};

}  // namespace live
