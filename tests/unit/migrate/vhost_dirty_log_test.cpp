// SPDX-License-Identifier: MIT
//
// A vhost log without vhost: the test marks as a device does.
#include "multifd/migrate/dirty/vhost_dirty_log.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "multifd/testing/dirty_source_contract.hpp"
#include "support/basics.hpp"
#include "support/dirty_ram.hpp"

using namespace multifd;
using namespace multifd::migrate;
using test::code_of;
using test::DirtyRam;
using test::fetched;
using Numbers = std::vector<std::uint64_t>;

namespace {

constexpr BlockId ram_block{0}, video_block{1};
constexpr std::uint64_t page = 4096;

/// Slots that meet within a word of the log: 70 pages of the first block, the second block, the rest of the first.
struct Devices {
  explicit Devices(const DirtyRam& ram_of) : ram(ram_of) {
    add(0, ram_block, 0, 70 * page, 16 * page);
    add(1, video_block, 0, 80 * page, 86 * page);
    add(2, ram_block, 70 * page, 234 * page, 166 * page);
    log.resize(VhostDirtyLog::log_words(slots));
  }
  void add(std::uint32_t number, BlockId block, std::uint64_t offset, std::uint64_t bytes, std::uint64_t physical) {
    KvmMemorySlot& slot = slots.emplace_back();
    slot.block = block;
    slot.region.slot = number;
    slot.region.guest_phys_addr = physical;
    slot.region.memory_size = bytes;
    slot.region.userspace_addr = reinterpret_cast<std::uintptr_t>(ram.memory[index(block)].data() + offset);
  }
  /// As a device: first the bytes, then the mark, in bytes of eight pages each.
  void write(BlockId block, std::uint64_t offset, std::uint64_t value) {
    ram.store(block, offset, value);
    const std::uint64_t at = block == video_block ? 86 * page + offset
                             : offset < 70 * page ? 16 * page + offset
                                                  : 96 * page + offset;
    auto* const bytes = reinterpret_cast<std::uint8_t*>(log.data());
    __atomic_fetch_or(&bytes[at / page / 8], static_cast<std::uint8_t>(1u << at / page % 8), __ATOMIC_RELEASE);
  }

  const DirtyRam& ram;
  std::vector<KvmMemorySlot> slots;
  std::vector<std::uint64_t> log;
};

}  // namespace

TEST_CASE("VhostDirtyLog keeps the DirtySource contract, with all page sizes") {
  for (const std::size_t page_bytes : {std::size_t{1024}, std::size_t{4096}, std::size_t{65536}}) {
    CAPTURE(page_bytes);
    const DirtyRam ram(page_bytes);
    Devices devices(ram);
    CHECK(devices.log.size() == 7);  // 400 pages
    auto log = VhostDirtyLog::create(devices.log, ram.map, devices.slots);
    REQUIRE(log.has_value());
    CHECK(log->page_bytes() == 4096);
    test::check(
        check_dirty_source_contract(*log, {.ram = ram.map,
                                           .write = [&](BlockId block, std::uint64_t offset,
                                                        std::uint64_t value) { devices.write(block, offset, value); },
                                           .seed = test::seed()}));
  }
}

TEST_CASE("VhostDirtyLog takes the marks of one block, and leaves its neighbours' in the same word") {
  const DirtyRam ram;
  Devices devices(ram);
  auto log = VhostDirtyLog::create(devices.log, ram.map, devices.slots);
  REQUIRE(log.has_value());
  devices.log[0] = devices.log[6] = ~std::uint64_t{0};  // pages that are in no slot are nobody's
  REQUIRE(log->start().has_value());
  CHECK(devices.log[0] == 0xffff);
  for (const std::uint64_t at : {std::uint64_t{0}, 69 * page, 70 * page, 303 * page}) devices.write(ram_block, at, 1);
  for (const std::uint64_t at : {std::uint64_t{0}, 79 * page}) devices.write(video_block, at, 1);
  CHECK(fetched(*log, ram.map, ram_block) == Numbers{0, 69, 70, 303});
  CHECK(fetched(*log, ram.map, video_block) == Numbers{0, 79});
  CHECK(fetched(*log, ram.map, ram_block).empty());
  CHECK(devices.log[0] == 0xffff);
}

TEST_CASE("A vhost log that does not reach the last slot is refused, and so are slots that do not fit") {
  const DirtyRam ram;
  Devices devices(ram);
  CHECK(code_of(VhostDirtyLog::create(std::span(devices.log).first(6), ram.map, devices.slots)) == Errc::bad_option);
  CHECK(code_of(VhostDirtyLog::create(devices.log, ram.map, std::span(devices.slots).first(2))) == Errc::bad_range);
  const std::array rest{KvmUnmappedRange{ram_block, 70 * page, 234 * page}};
  CHECK(VhostDirtyLog::create(devices.log, ram.map, std::span(devices.slots).first(2), rest).has_value());
}
