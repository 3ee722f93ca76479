// SPDX-License-Identifier: MIT
//
// Guest memory as an ELF core, as crash, drgn, gdb and volatility3 open it: 64-bit, little-endian, x86-64, whatever mode
// the guest is in. The notes are those that a core of `dump-guest-memory` has:
//
//   owner        type          content
//   CORE         NT_PRSTATUS   per vCPU: registers as Linux has them (linux/elfcore.h), 336 bytes
//   QEMU         0             per vCPU: segments and control registers as well, 440 bytes, see below
//   VMCOREINFO   0             Linux's own text, which says how to read its structures
//
// QEMU's note, as found in its files: 4: version 1; 4: size; 8 each: rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags; 24
// each: cs ds es fs gs ss ldt tr gdt idt, as 4: selector, 4: limit, 4: flags, 4: 0, 8: base; 8 each: cr0..cr4, kernel_gs_base.
#pragma once

#include <elf.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "multifd/image/detail/copy_ranges.hpp"
#include "multifd/image/detail/elf_notes.hpp"
#include "multifd/image/vcpu_registers.hpp"

namespace multifd::image {

/// Options of write_elf_core().
struct ElfOptions {
  std::span<const VcpuRegisters> vcpus{};  ///< in order; at most 65536. Default: none, and the core has no registers
  std::string_view vmcoreinfo{};           ///< the text; at most 1 MiB. Default: no such note
  WorkOptions work{};                      ///< threads, progress
};

/// Writes an ELF core: a PT_LOAD for each range, by guest-physical address, and the notes.
///
/// Params: `out`, `layout`: as write_raw_memory().
/// Errors: as write_raw_memory(); Errc::bad_option (more vCPUs or text than ElfOptions allows, over 65000 ranges).
/// Threads, Cost: as write_raw_memory(); the notes are in memory.
/// Wire: the ELF gABI; the notes in this header's first lines.
[[nodiscard]] inline Result<WrittenMemory> write_elf_core(const MappedRamReader& image, const PhysicalLayout& layout,
                                                          File& out, const ElfOptions& options = {}) {
  constexpr std::uint64_t align = 4096;  // a range's holes can be the file's
  if (options.vcpus.size() > 65536)
    return fail(Errc::bad_option, Stage::setup, "ELF core: vCPUs", options.vcpus.size());
  if (options.vmcoreinfo.size() > 1024 * 1024)
    return fail(Errc::bad_option, Stage::setup, "ELF core: vmcoreinfo", options.vmcoreinfo.size());
  if (layout.ranges.size() > 65000)
    return fail(Errc::bad_option, Stage::setup, "ELF core: ranges", layout.ranges.size());
  return catch_bad_alloc(Stage::setup, "ELF core", [&]() -> Result<WrittenMemory> {
    MULTIFD_TRY(detail::check_ranges(image, layout.ranges));
    detail::ElfNotes notes;
    for (std::size_t i = 0; i < options.vcpus.size(); ++i)
      detail::add_prstatus(notes, options.vcpus[i], static_cast<std::uint32_t>(i));
    for (const VcpuRegisters& vcpu : options.vcpus) detail::add_qemu_note(notes, vcpu);
    if (!options.vmcoreinfo.empty()) {
      const std::span<std::byte> text = notes.add("VMCOREINFO", 0, options.vmcoreinfo.size());
      std::memcpy(text.data(), options.vmcoreinfo.data(), options.vmcoreinfo.size());
    }
    std::vector<detail::ElfSegment> segments;
    const std::uint64_t notes_at = sizeof(Elf64_Ehdr) + (1 + layout.ranges.size()) * sizeof(Elf64_Phdr);
    segments.push_back({PT_NOTE, 0, notes_at, 0, notes.bytes().size(), 4});
    std::uint64_t at = notes_at + notes.bytes().size();
    std::vector<std::uint64_t> places;
    for (const PhysicalRange& range : layout.ranges) {
      at = (at + align - 1) / align * align;
      // No alignment: by that, crash tells a core of whole memory from a netdump, where it looks for no KASLR.
      segments.push_back({PT_LOAD, PF_R | PF_W | PF_X, at, range.address, range.bytes, 0});
      places.push_back(at);
      at += range.bytes;
    }
    MULTIFD_TRY(out.resize(at));
    MULTIFD_TRY(out.write(0, detail::elf_headers(segments)));
    MULTIFD_TRY(out.write(notes_at, notes.bytes()));
    return detail::copy_ranges(image, layout.ranges, places, out, options.work);
  });
}

}  // namespace multifd::image
