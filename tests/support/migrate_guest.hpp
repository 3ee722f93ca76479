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
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/guest.hpp"
#include "support/basics.hpp"
#include "support/memory.hpp"

namespace test {

/// Which call of which of a guest's functions fails: `fail_in("save")`, or the third `fail_in("dirty.fetch", 3)`.
class GuestFaults {
 public:
  void fail_in(std::string call, unsigned number = 1) { left_[std::move(call)] = number; }
  multifd::Result<void> come_to(const char* call) {
    const auto found = left_.find(call);
    if (found == left_.end() || --found->second != 0) return {};
    return std::unexpected(
        multifd::Error{.code = multifd::Errc::bad_option, .op = "the test's fault", .subject = call});
  }

 private:
  std::map<std::string, unsigned, std::less<>> left_;
};

/// DirtyPages that is seen to be on or off, and fails where a test says so. Re-arms what it gets, as KVM's log does.
class WatchedDirtyPages {
 public:
  static constexpr auto fetches = multifd::migrate::DirtyFetch::complete;

  WatchedDirtyPages(multifd::migrate::DirtyPages pages, GuestFaults& faults)
      : pages_(std::move(pages)), faults_(&faults) {}
  multifd::Result<void> start() noexcept {
    MULTIFD_TRY(faults_->come_to("dirty.start"));
    on = true;
    return pages_.start();
  }
  multifd::Result<void> fetch(multifd::BlockId block, std::span<std::uint64_t> bitmap) noexcept {
    ++fetched;
    MULTIFD_TRY(faults_->come_to("dirty.fetch"));
    return pages_.fetch(block, bitmap);
  }
  multifd::Result<void> rearm(multifd::BlockId block, std::uint64_t first_page,
                              std::span<const std::uint64_t> bitmap) noexcept {
    MULTIFD_TRY(faults_->come_to("dirty.rearm"));
    return pages_.rearm(block, first_page, bitmap);
  }
  bool needs_rearm() const noexcept { return true; }
  multifd::Result<void> stop() noexcept {
    on = false;
    MULTIFD_TRY(faults_->come_to("dirty.stop"));
    return pages_.stop();
  }
  std::size_t page_bytes() const noexcept { return pages_.page_bytes(); }
  void mark(multifd::BlockId block, std::uint64_t offset, std::uint64_t bytes) noexcept {
    pages_.mark(block, offset, bytes);
  }

  std::atomic<bool> on = false;
  std::atomic<unsigned> fetched = 0;

 private:
  multifd::migrate::DirtyPages pages_;
  GuestFaults* faults_;
};

/// What a guest writes, by the number of the write.
enum class Writes {
  numbers,  ///< each time another value
  equal,    ///< always the same
  a_b_a,    ///< two values in turn
};

/// Both halves of a guest. The writer's state is a register that is no part of memory: how many pages it has written.
class MigratingGuest {
 public:
  static constexpr std::size_t page = 4096;

  explicit MigratingGuest(std::size_t pages, std::string idstr = "pc.ram")
      : memory_(pages * page), idstr_(std::move(idstr)) {
    memory_.fill(std::byte{});  // touched, as a guest has it
    REQUIRE(ram_.add(idstr_, memory_.bytes()).has_value());
    auto dirty = multifd::migrate::DirtyPages::create(ram_);
    REQUIRE(dirty.has_value());
    dirty_.emplace(std::move(*dirty), faults_);
  }
  MigratingGuest(const MigratingGuest&) = delete;
  MigratingGuest& operator=(const MigratingGuest&) = delete;
  ~MigratingGuest() { stop(); }

  /// More memory, which the guest does not write. Before any migration.
  void add_block(const std::string& idstr, std::size_t pages) {
    more_.emplace_back(pages * page).fill(std::byte{0x5a});
    REQUIRE(ram_.add(idstr, more_.back().bytes()).has_value());
    auto dirty = multifd::migrate::DirtyPages::create(ram_);
    REQUIRE(dirty.has_value());
    dirty_.emplace(std::move(*dirty), faults_);
  }

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
    if (!vcpu_.joinable()) return;
    vcpu_.join();
    if (running_guests != nullptr) running_guests->fetch_sub(1);
  }
  bool runs() const noexcept { return vcpu_.joinable(); }
  std::uint64_t written() const noexcept { return written_.load(); }
  std::span<std::byte> memory() noexcept { return memory_.bytes(); }
  /// That function of the guest, named as here or "dirty.start" and its like, fails the n-th time from now on.
  void fail_in(std::string call, unsigned number = 1) { faults_.fail_in(std::move(call), number); }
  bool logging() const noexcept { return dirty_->on; }
  /// Whether it writes when it runs.
  bool works() const noexcept { return working_set_ > 0; }
  unsigned fetched() const noexcept { return dirty_->fetched; }
  unsigned throttled() const noexcept { return throttled_; }
  unsigned most_throttled() const noexcept { return most_throttled_; }
  /// How many pages of the working set are not as the register says that they were left.
  std::size_t torn() const noexcept {
    std::size_t wrong = 0;
    for (std::uint64_t i = 0; i < working_set_; ++i) {
      const std::uint64_t written_so_far = written_.load();
      if (written_so_far < i + 1) continue;
      // The last number that is congruent to i.
      const std::uint64_t last = written_so_far - (written_so_far - i) % working_set_;
      std::uint64_t found = 0;
      std::memcpy(&found, memory_.data() + last % working_set_ * page, 8);
      wrong += last != 0 && found != value(last);
    }
    return wrong;
  }

  // ---- SourceGuest

  multifd::Result<multifd::RamMap> ram() {
    MULTIFD_TRY(faults_.come_to("ram"));
    return ram_;
  }
  WatchedDirtyPages& dirty_source() noexcept { return *dirty_; }
  multifd::Result<void> pause() {
    stop();
    return faults_.come_to("pause");
  }
  multifd::Result<void> resume() {
    MULTIFD_TRY(faults_.come_to("resume"));
    if (looks_when_resumed) torn_when_resumed = torn();
    try {
      start();
    } catch (const std::system_error& error) {  // no thread to be had
      return std::unexpected(
          multifd::Error{.code = {error.code().value(), std::system_category()}, .op = "start the guest"});
    }
    return {};
  }
  multifd::Result<void> save(multifd::migrate::StateWriter& to) {
    MULTIFD_TRY(faults_.come_to("save"));
    const std::array<std::uint64_t, 2> registers{written_.load(), working_set_};
    MULTIFD_TRY(to.device({.idstr = "vcpu", .version_id = 2}, std::as_bytes(std::span(registers))));
    MULTIFD_TRY(faults_.come_to("save.disk"));
    return to.device({.idstr = "disk", .instance_id = 7}, std::as_bytes(std::span(disk)));
  }
  void throttle(unsigned percent) noexcept {
    throttled_ = percent;
    if (percent > most_throttled_) most_throttled_ = percent;
  }

  // ---- DestinationGuest

  multifd::Result<multifd::RamMap> prepare(const multifd::migrate::Announcement& announced) {
    announced_user.assign(announced.user.begin(), announced.user.end());
    announced_machine = announced.machine_type;
    MULTIFD_TRY(faults_.come_to("prepare"));
    return ram_;
  }
  multifd::Result<void> load(multifd::migrate::StateReader& from) {
    MULTIFD_TRY(faults_.come_to("load"));
    for (;;) {
      if (!faults_.come_to("load.unread")) return {};
      MULTIFD_TRY_ASSIGN(const auto section, from.next());
      if (!section) return faults_.come_to("load.end");
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
  bool looks_when_resumed = true;              ///< resume() touches what it goes on writing
  std::size_t torn_when_resumed = 0;           ///< torn(), as resume() found it
  Writes writes = Writes::numbers;             ///< the same at both ends
  std::atomic<int>* running_guests = nullptr;  ///< how many of all guests run; for tests that allow one
  std::atomic<bool> ran_beside = false;        ///< it was started while another one ran

 private:
  std::uint64_t value(std::uint64_t number) const noexcept {
    switch (writes) {
      case Writes::numbers: break;
      case Writes::equal: return 42;
      case Writes::a_b_a: return number / working_set_ % 2 + 1;
    }
    return number;
  }

  /// As a vCPU writes. What a sender reads meanwhile may be torn, which is why the page is marked: no data race for
  /// ThreadSanitizer.
#if defined(__clang__)
  [[gnu::noinline]] __attribute__((no_sanitize("thread")))
#endif
  static void
  store(std::byte* to, std::uint64_t value) noexcept {
    *reinterpret_cast<volatile std::uint64_t*>(to) = value;
  }

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
        store(memory_.data() + at, value(number));
        dirty_->mark(multifd::BlockId{0}, at, 8);
        written_ = number;
        if (pause_.count() > 0) std::this_thread::sleep_for(pause_);
      }
    });
    if (running_guests != nullptr && running_guests->fetch_add(1) != 0) ran_beside = true;
  }

  Block memory_;
  std::string idstr_;
  multifd::RamMap ram_{page};
  std::deque<Block> more_;
  GuestFaults faults_;
  std::optional<WatchedDirtyPages> dirty_;
  std::size_t working_set_ = 0;
  std::chrono::microseconds pause_{};
  std::atomic<std::uint64_t> written_ = 0;
  std::atomic<unsigned> throttled_ = 0, most_throttled_ = 0;
  std::atomic<bool> stopping_ = false;
  std::thread vcpu_;
};

}  // namespace test
