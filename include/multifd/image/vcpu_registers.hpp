// SPDX-License-Identifier: MIT
//
// A vCPU's registers, as far as whoever analyses a guest's memory needs them.
#pragma once

#include <array>
#include <cstdint>

namespace multifd::image {

/// A segment register, with what is behind it, or a descriptor table, with base and limit.
struct SegmentRegister {
  std::uint32_t selector = 0;
  std::uint32_t limit = 0;
  std::uint32_t flags = 0;  ///< the descriptor's second word, as QEMU has it
  std::uint64_t base = 0;

  friend bool operator==(const SegmentRegister&, const SegmentRegister&) = default;
};

/// A vCPU's registers, in the order of their numbers in x86 instructions.
struct VcpuRegisters {
  std::array<std::uint64_t, 16> general{};  ///< rax rcx rdx rbx rsp rbp rsi rdi r8 to r15
  std::uint64_t rip = 0;
  std::uint64_t rflags = 0;
  std::array<SegmentRegister, 6> segments{};  ///< es cs ss ds fs gs
  SegmentRegister ldt{}, tr{}, gdt{}, idt{};
  std::array<std::uint64_t, 5> cr{};  ///< cr1 does not exist
  std::uint64_t kernel_gs_base = 0;
};

}  // namespace multifd::image
