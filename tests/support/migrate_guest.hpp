// SPDX-License-Identifier: MIT
//
// A guest for tests of migrate_to() and migrate_from(): a thread that counts its writes into its own memory, and marks them.
// What it counts shows whether it runs, and whether its memory is that of the moment at which it was stopped.
#pragma once

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/guest.hpp"
#include "support/basics.hpp"

namespace test {

/// Both halves of a guest. The writer's state is a register that is no part of memory: how many pages it has written.
class MigratingGuest {
 public:
  static constexpr std::size_t page = 4096;

  explicit MigratingGuest(std::size_t pages, std::string idstr = "pc.ram")
      : memory_(pages * page, std::byte{}), idstr_(std::move(idstr)) {
    REQUIRE(ram_.add(idstr_, memory_).has_value());
    auto dirty = multifd::migrate::DirtyPages::create(ram_);
    REQUIRE(dirty.has_value());
    dirty_.emplace(std::move(*dirty));
  }
  ~MigratingGuest() { stop(); }

  /// Fills the memory: text, noise and zeros.
  void boot() {
    Rng rng(seed());
    for (std::size_t at = 0; at < memory_.size(); at += page) {
      const std::size_t kind = at / page % 4;
      if (kind == 0) continue;
      for (std::size_t i = 0; i < page; i += 8) {
        const std::uint64_t word = kind == 1 ? at : rng();
        std::memcpy(memory_.data() + at + i, &word, 8);
      }
    }
  }
  /// Params `working_set`: how many pages, from the first on, it goes on writing. `pause`: between two of them.
  void run(std::size_t working_set, std::chrono::microseconds pause = {}) {
    working_set_ = working_set;
    pause_ = pause;
    start();
  }
  void stop() {
    stopping_ = true;
    if (vcpu_.joinable()) vcpu_.join();
  }
  bool runs() const noexcept { return vcpu_.joinable(); }
  std::uint64_t written() const noexcept { return written_.load(); }
  std::span<std::byte> memory() noexcept { return memory_; }
  std::optional<multifd::Error> fails_in(std::string_view call) const {
    return call == failing_ ? std::optional(multifd::Error{.code = multifd::Errc::bad_option, .op = "the test's fault"})
                            : std::nullopt;
  }
  /// From now on this function of the guest fails.
  void fail_in(std::string call) { failing_ = std::move(call); }
  unsigned throttled() const noexcept { return throttled_; }

  // ---- SourceGuest

  multifd::Result<multifd::RamMap> ram() {
    if (auto error = fails_in("ram")) return std::unexpected(*error);
    return ram_;
  }
  multifd::migrate::DirtyPages& dirty_source() noexcept { return *dirty_; }
  multifd::Result<void> pause() {
    stop();
    if (auto error = fails_in("pause")) return std::unexpected(*error);
    return {};
  }
  multifd::Result<void> resume() {
    if (auto error = fails_in("resume")) return std::unexpected(*error);
    start();
    return {};
  }
  multifd::Result<void> save(multifd::migrate::StateWriter& to) {
    if (auto error = fails_in("save")) return std::unexpected(*error);
    const std::array<std::uint64_t, 2> registers{written_.load(), working_set_};
    MULTIFD_TRY(to.device({.idstr = "vcpu", .version_id = 2}, std::as_bytes(std::span(registers))));
    return to.device({.idstr = "disk", .instance_id = 7}, std::as_bytes(std::span(disk)));
  }
  void throttle(unsigned percent) noexcept { throttled_ = percent; }

  // ---- DestinationGuest

  multifd::Result<multifd::RamMap> prepare(const multifd::migrate::Announcement& announced) {
    announced_user.assign(announced.user.begin(), announced.user.end());
    announced_machine = announced.machine_type;
    if (auto error = fails_in("prepare")) return std::unexpected(*error);
    return ram_;
  }
  multifd::Result<void> load(multifd::migrate::StateReader& from) {
    if (auto error = fails_in("load")) return std::unexpected(*error);
    for (;;) {
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return {};
      devices.push_back(std::string(section->device.idstr) + ":" + std::to_string(section->device.instance_id));
      std::array<std::uint64_t, 2> registers{};
      if (section->device.idstr != "vcpu" || section->state.size() != sizeof registers) continue;
      std::memcpy(registers.data(), section->state.data(), sizeof registers);
      written_ = registers[0];
      working_set_ = registers[1];
    }
  }

  std::array<std::byte, 100'000> disk{};  ///< a device's state that is larger than any buffer
  std::vector<std::string> devices;       ///< those that were loaded
  std::vector<std::byte> announced_user;
  std::string announced_machine;

 private:
  void start() {
    stop();
    stopping_ = false;
    vcpu_ = std::thread([this] {
      while (!stopping_) {
        if (working_set_ == 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
          continue;
        }
        const std::uint64_t number = written_.load(std::memory_order_relaxed) + 1;
        const std::size_t at = number % working_set_ * page;
        std::atomic_ref(*reinterpret_cast<std::uint64_t*>(memory_.data() + at))
            .store(number, std::memory_order_relaxed);
        dirty_->mark(multifd::BlockId{0}, at, 8);
        written_ = number;
        if (pause_.count() > 0) std::this_thread::sleep_for(pause_);
      }
    });
  }

  std::vector<std::byte> memory_;
  std::string idstr_;
  multifd::RamMap ram_{page};
  std::optional<multifd::migrate::DirtyPages> dirty_;
  std::string failing_;
  std::size_t working_set_ = 0;
  std::chrono::microseconds pause_{};
  std::atomic<std::uint64_t> written_ = 0;
  unsigned throttled_ = 0;
  std::atomic<bool> stopping_ = false;
  std::thread vcpu_;
};

}  // namespace test
