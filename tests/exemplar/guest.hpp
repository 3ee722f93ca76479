// SPDX-License-Identifier: MIT
//
// The smallest guest that can be migrated: memory, one vCPU that is a thread and writes to it, and no other device.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stop_token>
#include <thread>
#include <vector>

#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/guest.hpp"

namespace exemplar {

class SmallGuest {
 public:
  void boot() { run(); }

  multifd::Result<multifd::RamMap> ram() { return ram_; }
  multifd::migrate::DirtyPages& dirty_source() { return dirty_; }
  multifd::Result<void> pause() {
    vcpu_ = {};
    return {};
  }
  multifd::Result<void> resume() {
    run();
    return {};
  }
  multifd::Result<void> save(multifd::migrate::StateWriter& to) {
    return to.device({.idstr = "vcpu"}, std::as_bytes(std::span(&next_, 1)));
  }

  multifd::Result<multifd::RamMap> prepare(const multifd::migrate::Announcement&) { return ram_; }
  multifd::Result<void> load(multifd::migrate::StateReader& from) {
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto device, from.next());
      if (!device) return {};
      if (device->state.size() == 1) next_ = device->state[0];
    }
  }

 private:
  void run() {
    vcpu_ = std::jthread([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        const std::size_t at = std::to_integer<std::size_t>(next_) * page;
        memory_[at] = next_;
        dirty_.mark(pc_ram_, at, 1);
        next_ = std::byte(std::to_integer<unsigned>(next_) + 1);
      }
    });
  }

  static constexpr std::size_t page = 4096;
  std::vector<std::byte> memory_ = std::vector<std::byte>(256 * page);
  multifd::RamMap ram_{page};
  multifd::BlockId pc_ram_ = *ram_.add("pc.ram", memory_);
  multifd::migrate::DirtyPages dirty_ = *multifd::migrate::DirtyPages::create(ram_);
  std::byte next_{};  ///< the vCPU's register
  std::jthread vcpu_;
};
static_assert(multifd::migrate::check_source_guest<SmallGuest>());
static_assert(multifd::migrate::check_destination_guest<SmallGuest>());

}  // namespace exemplar
