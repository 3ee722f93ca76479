// SPDX-License-Identifier: MIT
//
// KvmDirtyRing on a real KVM.
#include "multifd/migrate/dirty/kvm_dirty_ring.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "multifd/testing/dirty_source_contract.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"
#include "support/kvm_vm.hpp"
#include "support/skip.hpp"

#if defined(__x86_64__)

using namespace multifd;
using namespace multifd::migrate;
using test::code_of;
using test::DirtyRam;
using test::fetched;
using test::KvmVm;
using test::text;

namespace {

constexpr BlockId ram_block{0}, video_block{1};

/// Why there is no dirty ring here.
std::string why_no_ring() {
  std::string why = test::why_no_kvm();
  if (!why.empty()) return why;
  const DirtyRam ram;
  const KvmVm vm(ram, 0);
  const int most = ::ioctl(vm.fd(), KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING);
  const int ordered = ::ioctl(vm.fd(), KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
  return most > 0 || ordered > 0 ? "" : "this KVM has no dirty ring";
}

/// A machine with rings, and the source of them.
struct RingVm {
  /// Params: `pages`: of the first block; `wanted`: entries, of which KVM may want more; 0: the most.
  explicit RingVm(std::size_t pages = 304, unsigned vcpus = 1, std::uint32_t wanted = 0, std::size_t page_bytes = 4096)
      : ram(page_bytes, pages), vm(ram, vcpus, [&](int fd) {
          for (auto enabled = KvmDirtyRing::enable(fd, wanted);; enabled = KvmDirtyRing::enable(fd, wanted)) {
            if (enabled) entries = *enabled;
            if (enabled || wanted == 0 || wanted > 65536) break;
            wanted *= 2;
          }
        }) {
    REQUIRE(entries > 0);
    auto made = KvmDirtyRing::create(vm.fd(), vm.vcpu_fds(), entries, ram.map, vm.slots());
    REQUIRE_MESSAGE(made.has_value(), text(made));
    ring = std::make_unique<KvmDirtyRing>(std::move(*made));
    for (unsigned i = 0; i < vcpus; ++i)
      vm.vcpu(i).on_ring_full = [this] {
        ++full_exits;
        return harvests && ring->harvest().has_value();
      };
  }

  std::uint32_t entries = 0;
  DirtyRam ram;
  KvmVm vm;
  std::unique_ptr<KvmDirtyRing> ring;
  std::atomic<bool> harvests{true};
  std::atomic<unsigned> full_exits{0};
};

/// Enough to fill any ring that fits in it.
constexpr std::size_t many_pages = 4096;
constexpr std::uint32_t few_entries = 256;

/// All pages of the part of the first block that is one slot.
constexpr std::uint64_t first_page = 70;
constexpr std::uint32_t slot_pages = many_pages - first_page;

void begin(RingVm& machine, std::uint32_t value, std::size_t vcpu = 0) {
  machine.vm.vcpu(vcpu).begin_pages(machine.vm.physical(ram_block, first_page * 4096), slot_pages, value);
}

}  // namespace

TEST_CASE("KvmDirtyRing keeps the DirtySource contract, with all page sizes") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("KVM's dirty ring");
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}})
    for (const std::uint32_t entries : {0u, few_entries}) {
      CAPTURE(page_bytes);
      CAPTURE(entries);
      RingVm machine(304, 1, entries, page_bytes);
      CHECK(machine.ring->page_bytes() == 4096);
      CHECK(!machine.ring->needs_rearm());
      test::check(check_dirty_source_contract(
          *machine.ring, {.ram = machine.ram.map,
                          .write = [&](BlockId block, std::uint64_t offset,
                                       std::uint64_t value) { machine.vm.write(block, offset, value); },
                          .faults = machine.vm.vcpu().faults(),
                          .seed = test::seed()}));
      CHECK(machine.vm.vcpu().failure() == "");
    }
}

TEST_CASE("A vCPU whose ring is full goes on when it has been harvested, and no page is lost") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("a full ring");
  RingVm machine(many_pages, 1, few_entries);
  REQUIRE(machine.entries < slot_pages);
  REQUIRE(machine.ring->start().has_value());
  machine.harvests = false;
  begin(machine, 1);
  CHECK(!machine.vm.vcpu().go_on());
  CHECK(!machine.vm.vcpu().go_on());  // it stays full
  CHECK(machine.full_exits == 2);
  machine.harvests = true;
  CHECK(machine.vm.vcpu().go_on());
  CHECK(machine.full_exits > 2);
  CHECK(machine.vm.vcpu().failure() == "");
  const auto dirty = fetched(*machine.ring, machine.ram.map, ram_block);
  REQUIRE(dirty.size() == slot_pages);
  CHECK(dirty.front() == first_page);
  CHECK(fetched(*machine.ring, machine.ram.map, ram_block).empty());
}

TEST_CASE("fetch() makes room in a full ring, and stop() leaves none behind") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("a full ring");
  RingVm machine(many_pages, 1, few_entries);
  REQUIRE(machine.entries < slot_pages);
  machine.harvests = false;
  REQUIRE(machine.ring->start().has_value());
  begin(machine, 1);
  CHECK(!machine.vm.vcpu().go_on());
  const auto dirty = fetched(*machine.ring, machine.ram.map, ram_block);
  CHECK(!dirty.empty());
  CHECK(dirty.size() < slot_pages);
  CHECK(!machine.vm.vcpu().go_on());  // it ran on, to the next full ring
  CHECK(!fetched(*machine.ring, machine.ram.map, ram_block).empty());
  CHECK(!machine.vm.vcpu().go_on());
  REQUIRE(machine.ring->stop().has_value());
  const unsigned before = machine.full_exits;
  CHECK(machine.vm.vcpu().go_on());
  CHECK(machine.full_exits == before);
  CHECK(machine.ring->harvest().has_value());
  // What the log before had left does not come into the next.
  REQUIRE(machine.ring->start().has_value());
  CHECK(fetched(*machine.ring, machine.ram.map, ram_block).empty());
}

TEST_CASE("Two vCPUs write, and harvest their full rings, while the migration fetches: no write is lost") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("two vCPUs");
  RingVm machine(many_pages, 2, few_entries);
  const auto copy = [&](std::uint64_t page) {
    auto* const word = reinterpret_cast<std::uint32_t*>(machine.ram.memory[0].data() + page * 4096);
    return std::atomic_ref(*word).load(std::memory_order_relaxed);
  };
  std::vector<std::uint32_t> sent(many_pages);
  REQUIRE(machine.ring->start().has_value());
  for (std::uint64_t page = 0; page < many_pages; ++page) sent[page] = copy(page);
  const auto round = [&] {
    for (const std::uint64_t page : fetched(*machine.ring, machine.ram.map, ram_block)) sent[page] = copy(page);
  };
  std::atomic<unsigned> running{2};
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 0; i < 2; ++i)
      threads.emplace_back([&, i] {
        for (std::uint32_t value = 1; value <= 5; ++value) {
          begin(machine, value * 2 + static_cast<std::uint32_t>(i), i);
          if (!machine.vm.vcpu(i).go_on()) break;
        }
        --running;
      });
    while (running != 0) round();
  }
  round();
  std::size_t stale = 0;
  for (std::uint64_t page = 0; page < many_pages; ++page) stale += sent[page] != copy(page);
  CHECK(stale == 0);
  CHECK(machine.full_exits > 0);
  CHECK(copy(many_pages - 1) >= 10);
  CHECK(machine.vm.vcpu(0).failure() == "");
  CHECK(machine.vm.vcpu(1).failure() == "");
}

TEST_CASE("A KVM that lets a vCPU run over its ring is found out: all pages are reported, or an error") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const test::Watchdog watchdog("a ring that is run over");
  for (const std::uint32_t entries : {few_entries, 1024u}) {
    RingVm machine(many_pages, 1, entries);
    REQUIRE(machine.ring->start().has_value());
    machine.vm.vcpu().begin_pages(machine.vm.physical(ram_block, first_page * 4096), slot_pages, 1,
                                  test::KvmVcpu::burst_of_pages);
    const bool whole = machine.vm.vcpu().go_on();  // its harvest() succeeded each time
    auto bitmap = test::bitmap_of(machine.ram.map, ram_block);
    const auto done = machine.ring->fetch(ram_block, bitmap);
    CHECK(whole == done.has_value());
    if (done) {
      CHECK(count_dirty(bitmap) == slot_pages);
      continue;
    }
    CHECK_MESSAGE(text(done).find("ran over") != std::string::npos, text(done));
    std::printf("skipped in part: this KVM runs over a dirty ring of %u entries\n", machine.entries);
    CHECK(!machine.ring->fetch(ram_block, bitmap).has_value());  // where the next entry will be is not known
    CHECK(!machine.ring->start().has_value());
  }
}

TEST_CASE("A dirty ring that was not enabled, or too late, or of a wrong size, is refused") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  const DirtyRam ram;
  KvmVm vm(ram);
  const std::error_code refused{EINVAL, std::system_category()};
  CHECK(code_of(KvmDirtyRing::enable(vm.fd())) == refused);
  CHECK(code_of(KvmDirtyRing::create(vm.fd(), vm.vcpu_fds(), 4096, ram.map, vm.slots())) == refused);
  KvmVm without_vcpu(ram, 0);
  CHECK(code_of(KvmDirtyRing::enable(without_vcpu.fd(), 1000)) == Errc::bad_option);
  CHECK(code_of(KvmDirtyRing::enable(without_vcpu.fd(), 1u << 31)) == Errc::bad_option);
  CHECK(code_of(KvmDirtyRing::enable(without_vcpu.fd(), 1)) == refused);
  CHECK(KvmDirtyRing::enable(without_vcpu.fd(), 4096) == 4096u);
  const int not_a_vcpu = without_vcpu.fd();
  CHECK(!KvmDirtyRing::create(without_vcpu.fd(), std::span(&not_a_vcpu, 1), 4096, ram.map, without_vcpu.slots()));
}

// Where KVM uses the page tables of the CPU. Others watch all memory anyhow.
TEST_CASE("KvmDirtyRing works in a VM that has manual protect on already") {
  if (const std::string why = why_no_ring(); !why.empty()) return test::skip(why);
  RingVm machine;
  kvm_enable_cap enable{};
  enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
  const int flags = ::ioctl(machine.vm.fd(), KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
  if (flags <= 0) return test::skip("this KVM has no manual protect");
  enable.args[0] = static_cast<unsigned>(flags);
  REQUIRE(::ioctl(machine.vm.fd(), KVM_ENABLE_CAP, &enable) == 0);
  machine.vm.write(ram_block, 0, 1);  // so that it is mapped, writable, before the log is on
  REQUIRE(machine.ring->start().has_value());
  machine.vm.write(ram_block, 0, 2);
  machine.vm.write(video_block, 79 * 4096, 2);
  CHECK(fetched(*machine.ring, machine.ram.map, ram_block) == std::vector<std::uint64_t>{0});
  CHECK(fetched(*machine.ring, machine.ram.map, video_block) == std::vector<std::uint64_t>{79});
}

#else

TEST_CASE("KVM's dirty ring") { test::skip(test::why_no_kvm()); }

#endif
