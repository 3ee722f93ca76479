// SPDX-License-Identifier: MIT
//
// Two guests of which one becomes the other, with memory that follows, for tests.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "multifd/migrate/fixed_downtime.hpp"
#include "support/migrate_ends.hpp"

namespace test {

/// Both sides of a migration whose memory follows. What must not be seen of the destination's memory is 0xee.
struct OnDemand {
  static constexpr std::size_t working_set = 256;
  static constexpr unsigned channels = 2;

  explicit OnDemand(std::size_t pages, multifd::migrate::DestinationOptions at_destination = {})
      : here(pages), there(pages, std::move(at_destination)) {
    here.running_guests = there.guest.running_guests = &running;
    here.boot();
    here.add_block("vga", 64);
    there.guest.add_block("vga", 64);
    std::ranges::fill(there.guest.memory(), std::byte{0xee});
    here.run(working_set, 20us);
  }

  /// A side that is alone, and can do nothing but wait for the other one, is cancelled: when that has ended.
  Tried migrate(multifd::migrate::SourceOptions options) {
    options.channels = channels;
    using multifd::migrate::MigrationStatus;
    std::atomic<bool> over = false;
    std::thread nurse([&] {
      for (; !over; std::this_thread::sleep_for(2ms)) {
        const auto at_source = followed->progress().status, at_destination = there.followed->progress().status;
        if (at_source == MigrationStatus::postcopy_paused && is_end(at_destination)) followed->cancel();
        if (at_destination == MigrationStatus::postcopy_paused && is_end(at_source)) there.followed->cancel();
      }
    });
    const Tried tried = migrate_once(here, followed, there, std::move(options));
    over = true;
    nurse.join();
    return tried;
  }
  /// How many pages differ that the guest does not write.
  std::size_t different() {
    std::size_t pages = 0;
    for (std::size_t at = working_set * MigratingGuest::page; at < here.memory().size(); at += MigratingGuest::page)
      pages += !std::ranges::equal(here.memory().subspan(at, MigratingGuest::page),
                                   there.guest.memory().subspan(at, MigratingGuest::page));
    return pages;
  }
  /// The guest is whole there, and goes on.
  void check_whole() {
    CHECK_FALSE(here.runs());
    CHECK(there.guest.runs());
    const std::uint64_t before = there.guest.written();
    CHECK(eventually([&] { return there.guest.written() > before; }));
    there.guest.stop();
    CHECK(there.guest.written() > here.written());
    CHECK(there.guest.torn() == 0);
    CHECK(different() == 0);
    CHECK(there.guest.devices == std::vector<std::string>{"vcpu:0", "disk:7"});
  }

  std::atomic<int> running = 0;
  MigratingGuest here;
  Followed followed;
  There there;
};

inline multifd::migrate::SourceOptions at_once() {
  multifd::migrate::SourceOptions options;
  options.postcopy.strategy = multifd::migrate::Postcopy::at_once;
  return options;
}

/// Behind two rounds.
inline multifd::migrate::SourceOptions fallback() {
  multifd::migrate::SourceOptions options;
  options.postcopy.strategy = multifd::migrate::Postcopy::fallback;
  options.converge.rule = multifd::migrate::FixedRounds(2);
  options.converge.max_downtime = 0ms;
  return options;
}

}  // namespace test
