// SPDX-License-Identifier: MIT
//
// Checks the rules of the SourceGuest and DestinationGuest concepts that types cannot express, with real migrations inside of one
// process. Run it on your own VMM's two halves, in any test framework:
//
//   auto report = multifd::check_guest_contract(source_vm, destination_vm);
//   assert(report.ok());  // else print report.text()
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "multifd/compress/nocomp.hpp"
#include "multifd/error_value.hpp"
#include "multifd/memory/page_digest.hpp"
#include "multifd/migrate/destination.hpp"
#include "multifd/migrate/guest.hpp"
#include "multifd/migrate/migration.hpp"
#include "multifd/migrate/source.hpp"
#include "multifd/testing/contract_report.hpp"
#include "multifd/transport/listen.hpp"
#include "multifd/zero/policy.hpp"

namespace multifd {
namespace testing::detail {

struct GuestStacks {
  using Link = FdTransport;
  using Compressors = PolicyList<NoComp>;
  using ZeroPages = PolicyList<ZeroPagesMultifd>;
};

/// A destination that is there and takes nothing: for a migration that is cancelled.
struct TakesAll {
  std::vector<std::vector<std::byte>> memory;
  [[nodiscard]] Result<RamMap> prepare(const migrate::Announcement& announced) {
    RamMap ram(announced.page_bytes);
    for (const qemu::BlockInfo& block : announced.blocks) {
      memory.emplace_back(block.used_length);
      MULTIFD_TRY(ram.add(block.idstr, memory.back()));
    }
    return ram;
  }
  [[nodiscard]] Result<void> load(migrate::StateReader&) { return {}; }
  [[nodiscard]] Result<void> resume() { return {}; }
};

template <migrate::SourceGuest S>
class GuestCheck {
 public:
  explicit GuestCheck(S& source) : source_(source) {}

  template <migrate::DestinationGuest D>
  ContractReport run(D& destination) {
    cancelled();
    if (report_.ok()) whole(destination);
    return std::move(report_);
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::vector<std::uint64_t> digests(const RamMap& ram) const {
    std::vector<std::uint64_t> digests;
    for (const RamBlock& block : ram.blocks()) digests.push_back(digest_of(block.host));
    return digests;
  }

  /// Between pause() and resume() nobody writes; afterwards the guest is the source's again, and can be migrated once more.
  void cancelled() {
    auto migration = migrate::Migration::create();
    if (!report_.expect(migration.has_value(), "setup: no descriptors")) return;
    std::optional<RamMap> ram;
    if (auto there = source_.ram(); report_.expect(there.has_value(), "ram(): fails")) ram.emplace(std::move(*there));
    if (!ram) return;
    bool stood_still = true;
    const auto on_event = [&](const migrate::Event& event) {
      if (event.progress.status != migrate::MigrationStatus::pre_switchover || event.kind != migrate::EventKind::status)
        return;
      const auto before = digests(*ram);
      for (const auto end = Clock::now() + std::chrono::milliseconds(100); Clock::now() < end && stood_still;)
        stood_still = digests(*ram) == before;
      migration->cancel();
    };
    TakesAll nowhere;
    const auto moved =
        move(nowhere, {.channels = 1, .pause_before_switchover = true, .on_event = on_event, .migration = &*migration});
    report_.expect(stood_still, "pause(): memory is written to behind it");
    report_.expect(!moved && moved.error().code == Errc::cancelled,
                   "a migration that is cancelled ends otherwise: " + (moved ? "completed" : describe(moved.error())));
    report_.expect(!migration->not_resumed(), "resume(): fails behind a pause() whose migration came to nothing");
  }

  template <class D>
  void whole(D& destination) {
    const auto moved = move(destination, {.channels = 2, .verify = migrate::Verify::required});
    report_.expect(moved.has_value(), "a migration fails: " + (moved ? "" : describe(moved.error())));
    if (moved) report_.expect(moved->pages_verified > 0, "no page was compared");
  }

  template <class D>
  [[nodiscard]] Result<migrate::MigrationReport> move(D& destination, const migrate::SourceOptions& options) {
    MULTIFD_TRY_ASSIGN(Listener listener, Listener::listen({.host = "127.0.0.1"}));
    MULTIFD_TRY_ASSIGN(auto taking, migrate::Migration::create());
    Result<migrate::ArrivalReport> taken = fail(Errc::cancelled, Stage::none, "not begun");
    Result<migrate::MigrationReport> moved = fail(Errc::cancelled, Stage::none, "not begun");
    {
      std::jthread there([&] {
        taken = migrate::migrate_from<GuestStacks>(
            destination, listener, {.first_timeout = std::chrono::milliseconds(10'000), .migration = &taking});
      });
      moved = migrate::migrate_to<GuestStacks>(source_, listener.local_address(), options);
      if (!moved) taking.cancel();
    }
    if (moved && !taken) return std::unexpected(taken.error());
    return moved;
  }

  S& source_;
  ContractReport report_;
};

}  // namespace testing::detail

/// Migrates a guest twice over loopback. The first migration is cancelled with the guest paused: nothing may write to memory
/// then, and the guest has to go on. The second one is whole, and every page is compared: a write that the dirty source does
/// not report shows, and so does a load() that does not read to the end.
///
/// Params `source`: its guest runs. `destination`: has nothing yet; its guest runs afterwards.
/// Not checked: that the guest's devices go on where they were: let the guest itself tell.
/// Threads: makes its own and joins them. Cost: twice the guest's memory while it runs.
template <migrate::SourceGuest S, migrate::DestinationGuest D>
[[nodiscard]] ContractReport check_guest_contract(S& source, D& destination) {
  return testing::detail::GuestCheck<S>(source).run(destination);
}

}  // namespace multifd
