// SPDX-License-Identifier: MIT
//
// Where a PC's memory lies in the guest's address space. An image holds RAM blocks; tools that analyse a guest want
// addresses. Found by asking QEMU 7.2 and 10.0 (`info mtree -f`) for machine types from 1.7 to 10.0:
//
//   0          640 KiB            1 MiB            below_4g     4 GiB
//   |   RAM    | VGA | ROM or RAM |       RAM      |  PCI hole  |  the rest of RAM
//
//   machine type            all RAM lies below 4 GiB   else below_4g is
//   pc-i440fx-2.0 and later     under 3.5 GiB             3 GiB
//   pc-i440fx-1.*, isapc        up to 3.5 GiB             3.5 GiB
//   pc-q35-*                    under 2.75 GiB            2 GiB
//   microvm                     up to 3 GiB               3 GiB
//
// `max-ram-below-4g` makes it less; then only the guest's CMOS says so, which is in the stream. A vCPU of AMD's with
// more than 1012 GiB has "the rest" at 1 TiB (machine types from 7.1 on); nothing in the stream says so.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "multifd/qemu/element.hpp"
#include "multifd/result.hpp"

namespace multifd::image {

/// A piece of a RAM block, and where the guest sees it.
struct PhysicalRange {
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;   ///< a whole number of pages
  std::size_t block = 0;     ///< index into the image's blocks
  std::uint64_t offset = 0;  ///< in the block, page aligned

  std::uint64_t end() const noexcept { return address + bytes; }
  friend bool operator==(const PhysicalRange&, const PhysicalRange&) = default;
};

/// How much RAM the machine has told its firmware of, in its CMOS: bytes 0x34 and 0x35 (above 16 MiB), 0x5b to 0x5d (above
/// 4 GiB), in units of 64 KiB. The guest may have overwritten them.
struct MemorySizes {
  std::uint64_t below_4g = 0;
  std::uint64_t above_4g = 0;  ///< without its multiples of 1 TiB, where the field ends
};

/// The chipset's seven PAM registers (i440fx: from 0x59 of its PCI configuration; q35: from 0x90), which say for each
/// 16 KiB between 768 KiB and 1 MiB whether the guest reads RAM or ROM there.
using ShadowRegisters = std::array<std::uint8_t, 7>;

/// Options of lay_out_pc().
struct PhysicalOptions {
  /// Overrules what machine type and stream say: a multiple of the page size, at most 4 GiB. Default: none.
  std::optional<std::uint64_t> below_4g{};
  std::uint64_t above_4g_at = std::uint64_t{1} << 32;  ///< 1 TiB for an AMD guest with more than 1012 GiB
  /// The blocks that RAM consists of, in order of their addresses: with several NUMA nodes, one each. Default: "pc.ram" or
  /// "microvm.ram"; else (a memory backend has its own name) the one block of the told size, or the largest.
  std::span<const std::string_view> ram_blocks{};
  std::optional<MemorySizes> told{};        ///< what the stream says; checked, and preferred to the machine type's rule
  std::optional<ShadowRegisters> shadow{};  ///< none: what lies from 768 KiB to 1 MiB is left out
};

/// A guest's memory by address.
struct PhysicalLayout {
  std::vector<PhysicalRange> ranges;  ///< in order of addresses, none empty, none overlaps
  std::uint64_t below_4g = 0;
  std::uint64_t ram_bytes = 0;

  /// Behind the last byte.
  std::uint64_t end() const noexcept { return ranges.empty() ? 0 : ranges.back().end(); }
};

namespace detail {

inline constexpr std::uint64_t mebibyte = std::uint64_t{1} << 20;
inline constexpr std::uint64_t four_gib = std::uint64_t{1} << 32;

/// The rule for a machine type, or none.
inline std::optional<std::uint64_t> ram_below_4g(std::string_view machine, std::uint64_t ram_bytes) noexcept {
  const auto at_most = [&](std::uint64_t mib) { return std::min(ram_bytes, mib * mebibyte); };
  constexpr std::string_view i440fx = "pc-i440fx-";
  if (machine.starts_with("pc-q35-")) return ram_bytes < 2816 * mebibyte ? ram_bytes : 2048 * mebibyte;
  if (machine == "microvm") return at_most(3072);
  if (machine == "isapc") return at_most(3584);
  if (!machine.starts_with(i440fx)) return std::nullopt;
  const std::string_view version = machine.substr(i440fx.size());
  if (version.starts_with("1.") || version.starts_with("0.")) return at_most(3584);
  return ram_bytes < 3584 * mebibyte ? ram_bytes : 3072 * mebibyte;
}

/// Appends a range, or lets the last one grow.
inline void append_range(std::vector<PhysicalRange>& ranges, const PhysicalRange& range) {
  if (range.bytes == 0) return;
  if (!ranges.empty() && ranges.back().block == range.block && ranges.back().end() == range.address &&
      ranges.back().offset + ranges.back().bytes == range.offset)
    ranges.back().bytes += range.bytes;
  else
    ranges.push_back(range);
}

/// RAM as one row of bytes, in the order of addresses, out of one or several blocks.
struct RamRow {
  struct Part {
    std::size_t block;
    std::uint64_t bytes;
  };
  std::vector<Part> parts;
  std::uint64_t bytes = 0;

  /// Appends what lies at [from, from + count) of the row, as seen at `address`.
  void append(std::vector<PhysicalRange>& ranges, std::uint64_t from, std::uint64_t count,
              std::uint64_t address) const {
    std::uint64_t begin = 0;
    for (const Part& part : parts) {
      const std::uint64_t first = std::max(from, begin);
      const std::uint64_t last = std::min(from + count, begin + part.bytes);
      if (first < last) append_range(ranges, {address + (first - from), last - first, part.block, first - begin});
      begin += part.bytes;
    }
  }
};

inline std::optional<std::size_t> find_block(std::span<const qemu::BlockInfo> blocks, std::string_view name) noexcept {
  for (std::size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].idstr == name) return i;
  return std::nullopt;
}

/// The one block that RAM consists of, where nobody has said.
inline std::optional<std::size_t> main_block(std::span<const qemu::BlockInfo> blocks,
                                             const std::optional<MemorySizes>& told) noexcept {
  for (const std::string_view name : {"pc.ram", "microvm.ram"})
    if (const auto found = find_block(blocks, name)) return found;
  if (told) {
    const std::uint64_t wanted = told->below_4g + told->above_4g;
    const auto fits = [&](const qemu::BlockInfo& block) { return block.used_length == wanted; };
    if (std::ranges::count_if(blocks, fits) == 1)
      return static_cast<std::size_t>(std::ranges::find_if(blocks, fits) - blocks.begin());
  }
  const auto largest = std::ranges::max_element(blocks, {}, &qemu::BlockInfo::used_length);
  if (largest == blocks.end()) return std::nullopt;
  return static_cast<std::size_t>(largest - blocks.begin());
}

/// What the guest reads between 768 KiB and 1 MiB.
inline void append_shadow(std::vector<PhysicalRange>& ranges, std::span<const qemu::BlockInfo> blocks,
                          const RamRow& ram, const ShadowRegisters& pam) {
  constexpr std::uint64_t begin = 0xc0000, step = 0x4000, bios_end = 0x100000;
  const auto rom = find_block(blocks, "pc.rom");
  const auto bios = find_block(blocks, "pc.bios");
  // Of the firmware the last 128 KiB are here, or all of it.
  const std::uint64_t bios_bytes = bios ? std::min<std::uint64_t>(blocks[*bios].used_length, 0x20000) : 0;
  for (std::uint64_t at = begin; at < bios_end; at += step) {
    // PAM1 to PAM6 have two pieces each, from 768 KiB on; PAM0 the last 64 KiB. Bit 0 of a half: reads go to RAM.
    const auto piece = static_cast<unsigned>((at - begin) / step);
    const unsigned half = piece < 12 ? pam[1 + piece / 2] >> (piece % 2 * 4) : pam[0] >> 4;
    if ((half & 1) != 0)
      ram.append(ranges, at, step, at);
    else if (at >= bios_end - bios_bytes)
      append_range(ranges, {at, step, *bios, blocks[*bios].used_length - (bios_end - at)});
    else if (rom && at - begin < blocks[*rom].used_length && at < 0xe0000)
      append_range(ranges, {at, step, *rom, at - begin});
    else if (at >= 0xe0000)  // a firmware of 64 KiB leaves RAM in front of it
      ram.append(ranges, at, step, at);
  }
}

}  // namespace detail

/// Lays out the memory of a PC. Blocks that are not its RAM (a graphics card's, firmware, NVDIMM) have no address that the
/// stream would tell, and are in no range, but for the firmware below 1 MiB; neither are hot-plugged DIMMs.
///
/// Params: `machine_type`: as the stream has it ("pc-q35-10.0").
/// Errors: Errc::unclear_addresses: a machine type without a rule, and nothing that replaces the rule; RAM has another size
///   than the stream tells (detail: what the blocks have; expected: what is told): several blocks? unknown_block (one of
///   options.ram_blocks); bad_option (below_4g or above_4g_at); not_supported (pages over 16 KiB); ENOMEM.
/// Threads: as a plain function.
[[nodiscard]] inline Result<PhysicalLayout> lay_out_pc(std::span<const qemu::BlockInfo> blocks, std::size_t page_bytes,
                                                       std::string_view machine_type,
                                                       const PhysicalOptions& options = {}) {
  constexpr const char* op = "guest-physical addresses";
  constexpr std::uint64_t vga = 0xa0000, legacy_end = 0x100000, tebibyte = std::uint64_t{1} << 40;
  constexpr std::uint64_t most = std::uint64_t{1} << 62;  // no sum of two wraps
  if (page_bytes == 0 || 0x4000 % page_bytes != 0) return fail(Errc::not_supported, Stage::setup, op, page_bytes);
  return catch_bad_alloc(Stage::setup, op, [&]() -> Result<PhysicalLayout> {
    detail::RamRow ram;
    const auto add = [&](std::size_t block) {
      ram.parts.push_back({block, blocks[block].used_length});
      ram.bytes += std::min(blocks[block].used_length, most - ram.bytes);
    };
    for (const std::string_view name : options.ram_blocks) {
      const auto found = detail::find_block(blocks, name);
      if (!found) return fail(Errc::unknown_block, Stage::setup, op, 0, 0, name);
      for (const detail::RamRow::Part& part : ram.parts)
        if (part.block == *found) return fail(Errc::bad_option, Stage::setup, op, 0, 0, name);
      add(*found);
    }
    if (options.ram_blocks.empty()) {
      const auto found = detail::main_block(blocks, options.told);
      if (!found) return fail(Errc::unclear_addresses, Stage::setup, op);
      add(*found);
    }
    if (ram.bytes == 0 || ram.bytes == most) return fail(Errc::unclear_addresses, Stage::setup, op, ram.bytes);
    std::optional<std::uint64_t> below = options.below_4g;
    if (!below && options.told) {
      const std::uint64_t above = ram.bytes - std::min(ram.bytes, options.told->below_4g);
      if (options.told->below_4g > ram.bytes || above % tebibyte != options.told->above_4g)
        return fail(Errc::unclear_addresses, Stage::setup, op, ram.bytes,
                    options.told->below_4g + options.told->above_4g, blocks[ram.parts.front().block].idstr);
      below = options.told->below_4g;
    }
    if (!below) below = detail::ram_below_4g(machine_type, ram.bytes);
    if (!below) return fail(Errc::unclear_addresses, Stage::setup, op, 0, 0, machine_type);
    const std::uint64_t below_4g = std::min(*below, ram.bytes);
    const std::uint64_t above_4g = ram.bytes - below_4g;
    if (*below > detail::four_gib || *below % page_bytes != 0)
      return fail(Errc::bad_option, Stage::setup, op, *below, detail::four_gib, "below_4g");
    if (options.above_4g_at < detail::four_gib || options.above_4g_at > most || options.above_4g_at % page_bytes != 0)
      return fail(Errc::bad_option, Stage::setup, op, options.above_4g_at, detail::four_gib, "above_4g_at");
    PhysicalLayout layout{.ranges = {}, .below_4g = below_4g, .ram_bytes = ram.bytes};
    ram.append(layout.ranges, 0, std::min(below_4g, vga), 0);
    if (options.shadow && below_4g >= legacy_end) detail::append_shadow(layout.ranges, blocks, ram, *options.shadow);
    if (below_4g > legacy_end) ram.append(layout.ranges, legacy_end, below_4g - legacy_end, legacy_end);
    ram.append(layout.ranges, below_4g, above_4g, options.above_4g_at);
    return layout;
  });
}

}  // namespace multifd::image
