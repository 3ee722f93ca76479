// SPDX-License-Identifier: MIT
//
// What the KVM models of DirtySource refuse, on any machine: slots that do not fit the map, descriptors that are no VM.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "multifd/migrate/dirty/kvm_dirty_log.hpp"
#include "multifd/migrate/dirty/kvm_dirty_ring.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using namespace multifd::migrate;
using test::code_of;
using test::DirtyRam;
using test::text;

namespace {

constexpr BlockId ram_block{0}, video_block{1};
constexpr std::uint64_t page = 4096;

KvmMemorySlot slot_of(const DirtyRam& ram, std::uint32_t number, BlockId block, std::uint64_t offset,
                      std::uint64_t bytes) {
  KvmMemorySlot slot{};
  slot.block = block;
  slot.region.slot = number;
  slot.region.guest_phys_addr = (number + 1) * (std::uint64_t{1} << 30);
  slot.region.memory_size = bytes;
  slot.region.userspace_addr = reinterpret_cast<std::uintptr_t>(ram.memory[index(block)].data() + offset);
  return slot;
}

/// One slot a block.
std::vector<KvmMemorySlot> good_slots(const DirtyRam& ram) {
  return {slot_of(ram, 0, ram_block, 0, 304 * page), slot_of(ram, 1, video_block, 0, 80 * page)};
}

/// What both models say of these slots: they get as far as the descriptor, which is none, when the slots are good.
std::error_code verdict(const RamMap& map, std::span<const KvmMemorySlot> slots,
                        std::span<const KvmUnmappedRange> unmapped = {}) {
  const auto log = KvmDirtyLog::create(-1, map, slots, {.unmapped = unmapped});
  const auto ring = KvmDirtyRing::create(-1, {}, 4096, map, slots, unmapped);
  INFO(text(log));
  INFO(text(ring));
  CHECK(code_of(log) == code_of(ring));
  return code_of(log);
}

const std::error_code slots_are_good{EBADF, std::system_category()};

}  // namespace

TEST_CASE("Slots that map every byte of every block are accepted, in any number and order, and overlapping") {
  const DirtyRam ram;
  CHECK(verdict(ram.map, good_slots(ram)) == slots_are_good);
  CHECK(verdict(
            ram.map,
            std::array{slot_of(ram, 7, video_block, page, 79 * page), slot_of(ram, 3, ram_block, 70 * page, 234 * page),
                       slot_of(ram, 1 << 16, ram_block, 0, 70 * page), slot_of(ram, 4, video_block, 0, page),
                       slot_of(ram, 5, ram_block, 10 * page, 100 * page)}) == slots_are_good);
}

TEST_CASE("A block that is larger than its slots is refused, unless the rest is said to be unmapped") {
  const DirtyRam ram;
  const auto check_gap = [&](std::vector<KvmMemorySlot> slots, KvmUnmappedRange gap, const char* where) {
    CHECK(verdict(ram.map, slots) == Errc::bad_range);
    const auto refused = KvmDirtyLog::create(-1, ram.map, slots);
    CHECK_MESSAGE(text(refused).find("larger than its KvmMemorySlots") != std::string::npos, text(refused));
    CHECK_MESSAGE(text(refused).find(where) != std::string::npos, text(refused));
    CHECK(verdict(ram.map, slots, std::array{gap}) == slots_are_good);
    gap.bytes -= page;
    CHECK(verdict(ram.map, slots, std::array{gap}) == Errc::bad_range);
  };
  auto slots = good_slots(ram);
  slots[0].region.memory_size -= 2 * page;  // at the end
  check_gap(slots, {ram_block, 302 * page, 2 * page}, "pc.ram, at 1236992, of 1245184");
  slots = good_slots(ram);
  slots[0].region.userspace_addr += 2 * page;  // at the begin
  slots[0].region.memory_size -= 2 * page;
  check_gap(slots, {ram_block, 0, 2 * page}, "pc.ram, at 0, of 1245184");
  slots = {slot_of(ram, 0, ram_block, 0, 160 * page), slot_of(ram, 1, ram_block, 192 * page, 112 * page),  // a hole
           slot_of(ram, 2, video_block, 0, 80 * page)};
  check_gap(slots, {ram_block, 160 * page, 32 * page}, "pc.ram, at 655360, of 1245184");
  check_gap({good_slots(ram)[0]}, {video_block, 0, 80 * page}, "vga.vram");  // a block without any

  CHECK(verdict(ram.map, good_slots(ram), std::array{KvmUnmappedRange{video_block, 80 * page, page}}) ==
        Errc::bad_range);
  CHECK(verdict(ram.map, good_slots(ram), std::array{KvmUnmappedRange{video_block, page, ~std::uint64_t{0}}}) ==
        Errc::bad_range);
  CHECK(verdict(ram.map, good_slots(ram), std::array{KvmUnmappedRange{BlockId{2}, 0, page}}) == Errc::bad_range);
}

TEST_CASE("A slot that is not inside its block is refused") {
  const DirtyRam ram;
  const auto check_refused = [&](auto change) {
    auto slots = good_slots(ram);
    change(slots[1].region);
    CHECK(verdict(ram.map, slots) == Errc::bad_range);
  };
  check_refused([](auto& region) { region.memory_size += page; });
  check_refused([](auto& region) { region.userspace_addr += page; });
  check_refused([](auto& region) { region.userspace_addr -= page; });
  check_refused([](auto& region) { region.userspace_addr = 0; });
  check_refused([](auto& region) { region.memory_size = ~std::uint64_t{0} - page + 1; });
  check_refused([](auto& region) { region.memory_size = 0; });
  auto slots = good_slots(ram);
  slots[1].block = ram_block;
  CHECK(verdict(ram.map, slots) == Errc::bad_range);
  slots[1].block = BlockId{2};
  CHECK(verdict(ram.map, slots) == Errc::bad_range);
}

TEST_CASE("Slots and blocks that are not made of whole pages of the host are refused") {
  const DirtyRam ram;
  auto slots = good_slots(ram);
  slots[0].region.memory_size -= 512;
  CHECK(verdict(ram.map, slots) == Errc::bad_range);

  // A map of small pages may have blocks that KVM cannot map as they are.
  RamMap small(1024);
  REQUIRE(small.add("pc.ram", ram.memory[0].bytes().subspan(1024, 8 * page)).has_value());
  KvmMemorySlot slot = slot_of(ram, 0, ram_block, 1024, 8 * page);
  CHECK(verdict(small, std::array{slot}) == slots_are_good);  // KVM will say what it thinks of the address
  slot = slot_of(ram, 0, ram_block, page, 7 * page);          // aligned in memory, not in its block
  const std::array around{KvmUnmappedRange{ram_block, 0, page}, KvmUnmappedRange{ram_block, 7 * page, page}};
  CHECK(verdict(small, std::array{slot}, around) == Errc::bad_range);
  RamMap odd(1024);
  REQUIRE(odd.add("pc.ram", ram.memory[0].bytes().first(8 * page + 1024)).has_value());
  CHECK(verdict(odd, std::array{slot_of(ram, 0, ram_block, 0, 8 * page)}) == Errc::bad_range);
}

TEST_CASE("Two slots of one number, and slots of a block without memory, are refused") {
  const DirtyRam ram;
  auto slots = good_slots(ram);
  slots[1].region.slot = 0;
  CHECK(verdict(ram.map, slots) == Errc::bad_option);

  RamMap relay;
  REQUIRE(relay.add_elsewhere("pc.ram", 304 * page).has_value());
  CHECK(verdict(relay, std::array{slot_of(ram, 0, ram_block, 0, 304 * page)}) == Errc::block_without_memory);
}

TEST_CASE("A descriptor that is no VM is told by the call that it refused") {
  const DirtyRam ram;
  const auto slots = good_slots(ram);
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  REQUIRE(null >= 0);
  for (const auto& [fd, error] : {std::pair{-1, EBADF}, std::pair{null, ENOTTY}}) {
    CAPTURE(fd);
    const std::error_code expected{error, std::system_category()};
    CHECK(code_of(KvmDirtyLog::create(fd, ram.map, slots)) == expected);
    CHECK(code_of(KvmDirtyRing::create(fd, {}, 4096, ram.map, slots)) == expected);
    CHECK(code_of(KvmDirtyRing::enable(fd)) == expected);
    CHECK(text(KvmDirtyLog::create(fd, ram.map, slots)).find("KVM_CHECK_EXTENSION") != std::string::npos);
  }
  ::close(null);
  CHECK(code_of(KvmDirtyRing::create(-1, {}, 1000, ram.map, slots)) == Errc::bad_option);
  CHECK(code_of(KvmDirtyRing::create(-1, {}, 0, ram.map, slots)) == Errc::bad_option);
}
