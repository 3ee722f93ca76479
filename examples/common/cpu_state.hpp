// SPDX-License-Identifier: MIT
//
// What a guest's device sections tell an analysis: the vCPUs' registers, how much RAM the firmware was told of, and
// whether the guest reads ROM or RAM below 1 MiB. Read by the VM description's field lists (format/main_stream.md section 9.10), so that
// no device has to be known. The field names are those of QEMU for x86; 7.2, 10.0 and 11.1 have the same ones:
//
//   "cpu"           env.regs env.eip env.eflags env.segs env.ldt env.tr env.gdt env.idt env.cr[0,2,3,4] env.kernelgsbase
//   "mc146818rtc"   cmos_data
//   ".../I440FX", ".../mch"   parent_obj: config[0], the PCI configuration
#pragma once

#include <multifd/image/elf_core.hpp>
#include <multifd/image/mapped_ram_reader.hpp>

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace program {

struct MachineState {
  std::vector<multifd::image::VcpuRegisters> vcpus;       ///< in order; empty: no "cpu" section of x86
  std::optional<multifd::image::MemorySizes> told;        ///< none: no CMOS
  std::optional<multifd::image::ShadowRegisters> shadow;  ///< none: neither i440fx nor q35
};

/// Params: `devices`: what stands behind RAM, from the first device's section to the stream's end.
/// Throws Failure: no VM description, or it contradicts the sections, or does not tell how long a device's is; the text
/// names the device. Nothing in `devices` is trusted.
MachineState read_machine_state(std::span<const std::byte> devices);
/// The same of an image. Throws Failure also when the sections cannot be read, or are over 256 MiB.
MachineState read_machine_state(const multifd::image::MappedRamReader& image);

}  // namespace program
