// SPDX-License-Identifier: MIT
//
// KvmDirtyLog on a real KVM.
#include "multifd/migrate/dirty/kvm_dirty_log.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "multifd/migrate/dirty/dirty_pages.hpp"
#include "multifd/migrate/dirty/dirty_union.hpp"
#include "multifd/testing/dirty_source_contract.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"
#include "support/kvm_vm.hpp"
#include "support/skip.hpp"

#if defined(__x86_64__)

using namespace multifd;
using namespace multifd::migrate;
using test::bitmap_of;
using test::code_of;
using test::DirtyRam;
using test::fetched;
using test::KvmVm;
using test::text;
using Numbers = std::vector<std::uint64_t>;

namespace {

constexpr BlockId ram_block{0}, video_block{1};
constexpr std::uint64_t page = 4096;

unsigned manual_protect(int vm) {
  return static_cast<unsigned>(::ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
}

void leave_manual_protect_on(int vm) {
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  enable.args[0] = manual_protect(vm);
  REQUIRE(::ioctl(vm, KVM_ENABLE_CAP, &enable) == 0);
}

KvmDirtyLog make_log(KvmVm& vm, const DirtyRam& ram, KvmDirtyLogOptions options = {}) {
  auto log = KvmDirtyLog::create(vm.fd(), ram.map, vm.slots(), options);
  REQUIRE_MESSAGE(log.has_value(), text(log));
  return std::move(*log);
}

/// Re-arms all pages of all blocks, as the first round does.
void rearm_all(KvmDirtyLog& log, const RamMap& map) {
  for (const BlockId block : {ram_block, video_block}) {
    const std::vector<std::uint64_t> all(bitmap_of(map, block).size(), ~std::uint64_t{0});
    REQUIRE(log.rearm(block, 0, all).has_value());
  }
}

/// The manner that `best` takes here, and the other.
std::vector<WriteProtect> manners(const KvmVm& vm) {
  if (manual_protect(vm.fd()) != 0) return {WriteProtect::at_fetch, WriteProtect::at_rearm};
  std::printf("skipped in part: this KVM has no manual protect\n");
  return {WriteProtect::at_fetch};
}

/// What watching costs; nothing where KVM does not count it.
std::function<std::uint64_t()> working_faults(KvmVm& vm, const DirtyRam& ram) {
  const auto faults = vm.vcpu().faults();
  if (!faults) return {};
  KvmDirtyLog log = make_log(vm, ram, {.write_protect = WriteProtect::at_fetch});
  vm.write(ram_block, 0, 1);
  REQUIRE(log.start().has_value());
  const std::uint64_t before = faults();
  vm.write(ram_block, 0, 1);
  if (faults() > before) return faults;
  std::printf("skipped in part: KVM does not count the faults of write-protection here\n");
  return {};
}

}  // namespace

TEST_CASE("KvmDirtyLog keeps the DirtySource contract, in both manners and with all page sizes") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("KVM's dirty log");
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    const DirtyRam ram(page_bytes);
    KvmVm vm(ram);
    const auto faults = working_faults(vm, ram);
    for (const WriteProtect manner : manners(vm)) {
      CAPTURE(page_bytes);
      CAPTURE(static_cast<int>(manner));
      KvmDirtyLog log = make_log(vm, ram, {.write_protect = manner});
      CHECK(log.needs_rearm() == (manner == WriteProtect::at_rearm));
      CHECK(log.page_bytes() == 4096);
      test::check(check_dirty_source_contract(
          log,
          {.ram = ram.map,
           .write = [&](BlockId block, std::uint64_t offset, std::uint64_t value) { vm.write(block, offset, value); },
           .faults = faults,
           .seed = test::seed()}));
      CHECK(vm.vcpu().failure() == "");
    }
  }
}

TEST_CASE("KvmDirtyLog works in a VM that has manual protect on already, and leaves it off") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  if (manual_protect(vm.fd()) == 0) return test::skip("this KVM has no manual protect");
  for (const WriteProtect manner : manners(vm)) {
    CAPTURE(static_cast<int>(manner));
    leave_manual_protect_on(vm.fd());
    KvmDirtyLog log = make_log(vm, ram, {.write_protect = manner});
    REQUIRE(log.start().has_value());
    rearm_all(log, ram.map);
    vm.write(ram_block, 5 * page, 1);
    vm.write(ram_block, 75 * page, 1);
    CHECK(fetched(log, ram.map, ram_block) == Numbers{5, 75});
    rearm_all(log, ram.map);
    CHECK(fetched(log, ram.map, ram_block).empty());
    vm.write(ram_block, 5 * page, 2);
    CHECK(fetched(log, ram.map, ram_block) == Numbers{5});
    REQUIRE(log.stop().has_value());
  }
  // Off: a log that is read is cleared.
  KvmDirtyLog log = make_log(vm, ram, {.write_protect = WriteProtect::at_rearm});
  REQUIRE(log.start().has_value());
  REQUIRE(log.stop().has_value());
  kvm_userspace_memory_region region = vm.slots()[2].region;
  region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
  REQUIRE(::ioctl(vm.fd(), KVM_SET_USER_MEMORY_REGION, &region) == 0);
  vm.write(video_block, 0, 1);
  std::uint64_t words[2] = {};
  kvm_dirty_log read{};
  read.slot = region.slot;
  read.dirty_bitmap = words;
  REQUIRE(::ioctl(vm.fd(), KVM_GET_DIRTY_LOG, &read) == 0);
  CHECK(words[0] == 1);
  REQUIRE(::ioctl(vm.fd(), KVM_GET_DIRTY_LOG, &read) == 0);
  CHECK(words[0] == 0);
}

TEST_CASE("KvmDirtyLog switches KVM's log off in stop() and in its destructor") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  const auto logging = [&] { return vm.logs(0) + vm.logs(1) + vm.logs(2); };
  std::optional<KvmDirtyLog> log(make_log(vm, ram));
  CHECK(logging() == 0);
  REQUIRE(log->start().has_value());
  CHECK(logging() == 3);
  REQUIRE(log->stop().has_value());
  CHECK(logging() == 0);
  REQUIRE(log->start().has_value());
  std::optional<KvmDirtyLog> moved(std::move(*log));
  log.reset();
  CHECK(logging() == 3);
  moved.reset();
  CHECK(logging() == 0);
}

TEST_CASE("KvmDirtyLog that cannot start leaves no slot logging, and says which slot it was") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  auto slots = vm.slots();
  slots[2].region.guest_phys_addr |= 512;
  auto log = KvmDirtyLog::create(vm.fd(), ram.map, slots);
  REQUIRE(log.has_value());
  const auto started = log->start();
  CHECK(code_of(started) == std::error_code(EINVAL, std::system_category()));
  CHECK_MESSAGE(text(started).find("KVM_SET_USER_MEMORY_REGION") != std::string::npos, text(started));
  CHECK_MESSAGE(text(started).find("vga.vram, slot 2") != std::string::npos, text(started));
  CHECK(vm.logs(0) + vm.logs(1) + vm.logs(2) == 0);
  auto bitmap = bitmap_of(ram.map, ram_block);
  CHECK(code_of(log->fetch(ram_block, bitmap)) == Errc::already_closed);
  CHECK(log->stop().has_value());
}

TEST_CASE("KvmDirtyLog says which call failed when the VM's descriptor is closed under it") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  const int fd = ::dup(vm.fd());
  auto log = KvmDirtyLog::create(fd, ram.map, vm.slots());
  REQUIRE(log.has_value());
  REQUIRE(log->start().has_value());
  ::close(fd);
  auto bitmap = bitmap_of(ram.map, ram_block);
  const std::error_code closed{EBADF, std::system_category()};
  const auto fetch = log->fetch(ram_block, bitmap);
  CHECK(code_of(fetch) == closed);
  CHECK_MESSAGE(text(fetch) == "KVM_GET_DIRTY_LOG: Bad file descriptor (pc.ram, slot 0)", text(fetch));
  bitmap[0] = 1;
  if (log->needs_rearm()) CHECK(code_of(log->rearm(ram_block, 0, bitmap)) == closed);
  CHECK(code_of(log->stop()) == closed);
  CHECK(code_of(log->start()) == closed);
}

TEST_CASE("With manual protect a page that is dirtied twice before its turn is sent once") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  for (const WriteProtect manner : manners(vm)) {
    KvmDirtyLog log = make_log(vm, ram, {.write_protect = manner});
    REQUIRE(log.start().has_value());
    rearm_all(log, ram.map);
    vm.write(ram_block, 100 * page, 1);
    auto bitmap = bitmap_of(ram.map, ram_block);
    REQUIRE(log.fetch(ram_block, bitmap).has_value());
    vm.write(ram_block, 100 * page, 2);  // while others are sent
    REQUIRE(log.rearm(ram_block, 64, std::span(bitmap).subspan(1, 1)).has_value());
    CHECK(fetched(log, ram.map, ram_block).size() == (manner == WriteProtect::at_rearm ? 0 : 1));
  }
}

TEST_CASE("A page that the guest sees at two places is reported and re-armed for both") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  vm.add_slot(3, ram_block, 60 * page, 20 * page, std::uint64_t{12} << 24);
  for (const WriteProtect manner : manners(vm)) {
    CAPTURE(static_cast<int>(manner));
    KvmDirtyLog log = make_log(vm, ram, {.write_protect = manner});
    REQUIRE(log.start().has_value());
    rearm_all(log, ram.map);
    vm.vcpu().write(vm.physical(ram_block, 61 * page, 1), 1);
    vm.vcpu().write(vm.physical(ram_block, 79 * page, 1), 1);
    vm.vcpu().write(vm.physical(ram_block, 61 * page, 0), 2);
    CHECK(vm.vcpu().failure() == "");
    CHECK(fetched(log, ram.map, ram_block) == Numbers{61, 79});
    rearm_all(log, ram.map);
    CHECK(fetched(log, ram.map, ram_block).empty());
  }
}

TEST_CASE("A slot whose log the VMM had on starts empty, and keeps its log afterwards") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  vm.slots()[2].region.flags = KVM_MEM_LOG_DIRTY_PAGES;  // a display's memory
  REQUIRE(::ioctl(vm.fd(), KVM_SET_USER_MEMORY_REGION, &vm.slots()[2].region) == 0);
  vm.write(video_block, 7 * page, 1);
  for (const WriteProtect manner : manners(vm)) {
    CAPTURE(static_cast<int>(manner));
    KvmDirtyLog log = make_log(vm, ram, {.write_protect = manner});
    REQUIRE(log.start().has_value());
    rearm_all(log, ram.map);
    vm.write(video_block, 8 * page, 1);
    CHECK(fetched(log, ram.map, video_block) == Numbers{8});
    REQUIRE(log.stop().has_value());
    CHECK(vm.logs(2));
    CHECK(!vm.logs(0));
  }
}

TEST_CASE("What a device writes is in the union of KVM's log and the VMM's own marks") {
  if (const std::string why = test::why_no_kvm(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  KvmDirtyLog log = make_log(vm, ram);
  auto devices = DirtyPages::create(ram.map);
  REQUIRE(devices.has_value());
  DirtyUnion both(log, *devices);
  test::check(check_dirty_source_contract(both, {.ram = ram.map,
                                                 .write =
                                                     [&](BlockId block, std::uint64_t offset, std::uint64_t value) {
                                                       if (value % 2 == 0) return vm.write(block, offset, value);
                                                       ram.store(block, offset, value);
                                                       devices->mark(block, offset, 8);
                                                     },
                                                 .seed = test::seed()}));
  CHECK(vm.vcpu().failure() == "");
}

#else

TEST_CASE("KVM's dirty log") { test::skip(test::why_no_kvm()); }

#endif
