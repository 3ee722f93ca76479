// SPDX-License-Identifier: MIT
//
// Where a PC's memory lies. The tables are what QEMU 7.2 and 10.0 print for `info mtree -f`; tests/interop/analysis.py asks
// them again.
#include "multifd/image/guest_physical.hpp"

#include <string>
#include <string_view>
#include <vector>

#include "support/basics.hpp"

using namespace multifd;
using namespace test;
using image::MemorySizes;
using image::PhysicalLayout;
using image::PhysicalOptions;
using image::PhysicalRange;

namespace {

constexpr std::uint64_t kib = 1024, mib = 1024 * kib, gib = 1024 * mib;

using Blocks = std::vector<qemu::BlockInfo>;

Blocks blocks_of(std::uint64_t ram, std::string_view name = "pc.ram", std::uint64_t bios = 256 * kib) {
  return {{.idstr = name, .used_length = ram},
          {.idstr = "vga.vram", .used_length = 16 * mib},
          {.idstr = "pc.bios", .used_length = bios},
          {.idstr = "pc.rom", .used_length = 128 * kib}};
}

/// "0-a0000 pc.ram@0, ..."
std::string text(const PhysicalLayout& layout, const Blocks& blocks) {
  const auto hex = [](std::uint64_t value) {
    char digits[20];
    std::snprintf(digits, sizeof digits, "%llx", static_cast<unsigned long long>(value));
    return std::string(digits);
  };
  std::string all;
  for (const PhysicalRange& range : layout.ranges)
    all += (all.empty() ? "" : ", ") + hex(range.address) + "-" + hex(range.end()) + " " +
           std::string(blocks[range.block].idstr) + "@" + hex(range.offset);
  return all;
}

std::string laid_out(const Blocks& blocks, std::string_view machine, const PhysicalOptions& options = {}) {
  const auto layout = image::lay_out_pc(blocks, 4096, machine, options);
  return layout ? text(*layout, blocks) : describe(layout.error());
}

}  // namespace

TEST_CASE("lay_out_pc() knows how much RAM each machine type has below 4 GiB") {
  struct Row {
    std::string_view machine;
    std::uint64_t ram_mib, below_mib;
  };
  for (const Row& row : {
           Row{"pc-i440fx-10.0", 1024, 1024},
           {"pc-i440fx-10.0", 3072, 3072},
           {"pc-i440fx-10.0", 3583, 3583},
           {"pc-i440fx-10.0", 3584, 3072},
           {"pc-i440fx-7.2", 5120, 3072},
           {"pc-i440fx-2.0", 3584, 3072},
           {"pc-i440fx-1.7", 3583, 3583},
           {"pc-i440fx-1.7", 3584, 3584},
           {"pc-i440fx-1.7", 5120, 3584},
           {"isapc", 4096, 3584},
           {"pc-q35-10.0", 2048, 2048},
           {"pc-q35-10.0", 2815, 2815},
           {"pc-q35-10.0", 2816, 2048},
           {"pc-q35-2.4", 5120, 2048},
           {"microvm", 3071, 3071},
           {"microvm", 3073, 3072},
       }) {
    CAPTURE(row.machine);
    CAPTURE(row.ram_mib);
    const Blocks blocks = blocks_of(row.ram_mib * mib);
    const auto layout = image::lay_out_pc(blocks, 4096, row.machine);
    REQUIRE(layout.has_value());
    CHECK(layout->below_4g == row.below_mib * mib);
    CHECK(layout->ram_bytes == row.ram_mib * mib);
    REQUIRE(layout->ranges.size() == (row.below_mib == row.ram_mib ? 2 : 3));
    CHECK(layout->ranges[0] == PhysicalRange{0, 0xa0000, 0, 0});
    CHECK(layout->ranges[1] == PhysicalRange{mib, row.below_mib * mib - mib, 0, mib});
    if (row.below_mib == row.ram_mib) continue;
    CHECK(layout->ranges[2] == PhysicalRange{4 * gib, (row.ram_mib - row.below_mib) * mib, 0, row.below_mib * mib});
    CHECK(layout->end() == 4 * gib + (row.ram_mib - row.below_mib) * mib);
  }
}

TEST_CASE("What the guest's CMOS tells comes before the machine type's rule") {
  const Blocks blocks = blocks_of(2 * gib, "ram0");
  // max-ram-below-4g=1G
  CHECK(laid_out(blocks, "pc-q35-10.0", {.told = MemorySizes{gib, gib}}) ==
        "0-a0000 ram0@0, 100000-40000000 ram0@100000, 100000000-140000000 ram0@40000000");
  // A machine type without a rule.
  CHECK(laid_out(blocks, "pc-next-1.0", {.told = MemorySizes{2 * gib, 0}}) ==
        "0-a0000 ram0@0, 100000-80000000 ram0@100000");
  // The field for what is above 4 GiB ends at 1 TiB.
  const Blocks large = blocks_of(1030 * gib, "ram0");
  CHECK(laid_out(large, "pc-q35-10.0", {.above_4g_at = 1024 * gib, .told = MemorySizes{2 * gib, 4 * gib}}) ==
        "0-a0000 ram0@0, 100000-80000000 ram0@100000, 10000000000-20100000000 ram0@80000000");
  // Asked for by the user, it is not checked.
  CHECK(laid_out(blocks, "pc-q35-10.0", {.below_4g = gib, .told = MemorySizes{2 * gib, 0}}) ==
        "0-a0000 ram0@0, 100000-40000000 ram0@100000, 100000000-140000000 ram0@40000000");
}

TEST_CASE("RAM is the block of the usual name, of the told size, or the largest") {
  Blocks blocks = blocks_of(64 * mib, "ram0");
  blocks.insert(blocks.begin(), {.idstr = "nvdimm", .used_length = 128 * mib});
  CHECK(laid_out(blocks, "pc-q35-10.0", {.told = MemorySizes{64 * mib, 0}}) ==
        "0-a0000 ram0@0, 100000-4000000 ram0@100000");
  CHECK(laid_out(blocks, "pc-q35-10.0") == "0-a0000 nvdimm@0, 100000-8000000 nvdimm@100000");
  blocks[1].idstr = "pc.ram";
  CHECK(laid_out(blocks, "pc-q35-10.0") == "0-a0000 pc.ram@0, 100000-4000000 pc.ram@100000");
}

TEST_CASE("RAM of several NUMA nodes is laid out in the order that is asked for") {
  const Blocks blocks = {{.idstr = "m2", .used_length = 3 * gib}, {.idstr = "m1", .used_length = gib}};
  const std::string_view names[] = {"m1", "m2"};
  const MemorySizes told{2 * gib, 2 * gib};
  CHECK(laid_out(blocks, "pc-q35-10.0", {.ram_blocks = names, .told = told}) ==
        "0-a0000 m1@0, 100000-40000000 m1@100000, 40000000-80000000 m2@0, 100000000-180000000 m2@40000000");
  // Nobody has said, and the largest is not all.
  CHECK(code_of(image::lay_out_pc(blocks, 4096, "pc-q35-10.0", {.told = told})) == Errc::unclear_addresses);
}

TEST_CASE("Below 1 MiB is what the chipset's registers say") {
  const Blocks blocks = blocks_of(64 * mib);
  constexpr std::string_view rest = ", 100000-4000000 pc.ram@100000";
  CHECK(laid_out(blocks, "pc-q35-10.0", {.shadow = image::ShadowRegisters{}}) ==
        "0-a0000 pc.ram@0, c0000-e0000 pc.rom@0, e0000-100000 pc.bios@20000" + std::string(rest));
  CHECK(laid_out(blocks, "pc-q35-10.0", {.shadow = image::ShadowRegisters{0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33}}) ==
        "0-a0000 pc.ram@0, c0000-4000000 pc.ram@c0000");
  // Only writes go to RAM: bit 1.
  CHECK(laid_out(blocks, "pc-q35-10.0", {.shadow = image::ShadowRegisters{0x20, 0x22, 0, 0, 0, 0, 0}}) ==
        "0-a0000 pc.ram@0, c0000-e0000 pc.rom@0, e0000-100000 pc.bios@20000" + std::string(rest));
  // 0xc4000 to 0xc8000, 0xe8000 to 0xec000.
  CHECK(laid_out(blocks, "pc-q35-10.0", {.shadow = image::ShadowRegisters{0, 0x10, 0, 0, 0, 0, 0x01}}) ==
        "0-a0000 pc.ram@0, c0000-c4000 pc.rom@0, c4000-c8000 pc.ram@c4000, c8000-e0000 pc.rom@8000, "
        "e0000-e8000 pc.bios@20000, e8000-ec000 pc.ram@e8000, ec000-100000 pc.bios@2c000" +
            std::string(rest));
  // A firmware of 64 KiB.
  CHECK(laid_out(blocks_of(64 * mib, "pc.ram", 64 * kib), "pc-q35-10.0", {.shadow = image::ShadowRegisters{}}) ==
        "0-a0000 pc.ram@0, c0000-e0000 pc.rom@0, e0000-f0000 pc.ram@e0000, f0000-100000 pc.bios@0" + std::string(rest));
}

TEST_CASE("A guest that has less than 1 MiB has what there is") {
  CHECK(laid_out(blocks_of(512 * kib), "isapc", {.shadow = image::ShadowRegisters{}}) == "0-80000 pc.ram@0");
  CHECK(laid_out(blocks_of(mib), "isapc") == "0-a0000 pc.ram@0");
}

TEST_CASE("lay_out_pc() refuses what it cannot lay out") {
  const Blocks usual = blocks_of(4 * gib);
  const std::string_view unknown[] = {"pc.ram", "pc.rim"}, twice[] = {"pc.ram", "pc.ram"};
  struct Row {
    const char* what;
    Blocks blocks;
    std::string_view machine;
    PhysicalOptions options;
    Errc code;
    std::size_t page_bytes = 4096;
  };
  for (const Row& row : std::vector<Row>{
           {"no block", {}, "pc-q35-10.0", {}, Errc::unclear_addresses},
           {"another machine", usual, "virt-10.0", {}, Errc::unclear_addresses},
           {"no machine type", usual, "", {}, Errc::unclear_addresses},
           {"told more", usual, "pc-q35-10.0", {.told = MemorySizes{2 * gib, 3 * gib}}, Errc::unclear_addresses},
           {"told less", usual, "pc-q35-10.0", {.told = MemorySizes{2 * gib, gib}}, Errc::unclear_addresses},
           {"told nothing", usual, "pc-q35-10.0", {.told = MemorySizes{}}, Errc::unclear_addresses},
           {"told more than there is",
            usual,
            "pc-q35-10.0",
            {.told = MemorySizes{8 * gib, 0}},
            Errc::unclear_addresses},
           {"unknown block", usual, "pc-q35-10.0", {.ram_blocks = unknown}, Errc::unknown_block},
           {"block twice", usual, "pc-q35-10.0", {.ram_blocks = twice}, Errc::bad_option},
           {"below_4g unaligned", usual, "pc-q35-10.0", {.below_4g = gib + 1}, Errc::bad_option},
           {"below_4g over 4 GiB", usual, "pc-q35-10.0", {.below_4g = 5 * gib}, Errc::bad_option},
           {"above_4g_at below", usual, "pc-q35-10.0", {.above_4g_at = gib}, Errc::bad_option},
           {"above_4g_at unaligned", usual, "pc-q35-10.0", {.above_4g_at = 4 * gib + 1}, Errc::bad_option},
           {"above_4g_at wraps", usual, "pc-q35-10.0", {.above_4g_at = ~std::uint64_t{4095}}, Errc::bad_option},
           {"size wraps", blocks_of(~std::uint64_t{4095}), "pc-q35-10.0", {}, Errc::unclear_addresses},
           {"empty block", blocks_of(0), "pc-q35-10.0", {}, Errc::unclear_addresses},
           {"large pages", usual, "pc-q35-10.0", {}, Errc::not_supported, 65536},
           {"no page size", usual, "pc-q35-10.0", {}, Errc::not_supported, 0},
       }) {
    CAPTURE(row.what);
    CHECK(code_of(image::lay_out_pc(row.blocks, row.page_bytes, row.machine, row.options)) == row.code);
  }
}
