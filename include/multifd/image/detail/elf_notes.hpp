// SPDX-License-Identifier: MIT
//
// The bytes of an ELF core ahead of memory: headers and notes (elf_core.hpp says which).
#pragma once

#include <elf.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "multifd/format/byte_order.hpp"
#include "multifd/image/vcpu_registers.hpp"

namespace multifd::image {

namespace detail {

/// Notes as they are written one behind the other.
class ElfNotes {
 public:
  /// Params: `name`: without its NUL.
  std::span<std::byte> add(std::string_view name, std::uint32_t type, std::size_t bytes) {
    const auto padded = [](std::size_t size) { return (size + 3) / 4 * 4; };
    const std::size_t at = bytes_.size();
    bytes_.resize(at + 12 + padded(name.size() + 1) + padded(bytes));
    wire::store_le(&bytes_[at], static_cast<std::uint32_t>(name.size() + 1));
    wire::store_le(&bytes_[at + 4], static_cast<std::uint32_t>(bytes));
    wire::store_le(&bytes_[at + 8], type);
    std::memcpy(&bytes_[at + 12], name.data(), name.size());
    return std::span(bytes_).subspan(at + 12 + padded(name.size() + 1), bytes);
  }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

/// Integers one behind the other.
class LittleEndian {
 public:
  explicit LittleEndian(std::byte* to) noexcept : to_(to) {}
  template <std::unsigned_integral T>
  LittleEndian& put(T value) noexcept {
    wire::store_le(to_, value);
    to_ += sizeof value;
    return *this;
  }

 private:
  std::byte* to_;
};

enum Gpr : std::size_t { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi };
enum Segment : std::size_t { es, cs, ss, ds, fs, gs };

inline void add_prstatus(ElfNotes& notes, const VcpuRegisters& vcpu, std::uint32_t number) {
  constexpr std::size_t bytes = 336, pid_at = 32, registers_at = 112;
  const std::span<std::byte> note = notes.add("CORE", NT_PRSTATUS, bytes);
  wire::store_le(&note[pid_at], number + 1);
  LittleEndian out(&note[registers_at]);
  const auto& r = vcpu.general;
  for (const std::size_t i : {15u, 14u, 13u, 12u}) out.put(r[i]);
  out.put(r[rbp]).put(r[rbx]);
  for (const std::size_t i : {11u, 10u, 9u, 8u}) out.put(r[i]);
  for (const Gpr i : {rax, rcx, rdx, rsi, rdi}) out.put(r[i]);
  out.put(~std::uint64_t{0}).put(vcpu.rip);  // in no system call
  const auto selector = [&](Segment of) { return std::uint64_t{vcpu.segments[of].selector}; };
  out.put(selector(cs)).put(vcpu.rflags).put(r[rsp]).put(selector(ss));
  out.put(vcpu.segments[fs].base).put(vcpu.segments[gs].base);
  for (const Segment of : {ds, es, fs, gs}) out.put(selector(of));
}

inline void add_qemu_note(ElfNotes& notes, const VcpuRegisters& vcpu) {
  constexpr std::uint32_t bytes = 440;
  LittleEndian out(notes.add("QEMU", 0, bytes).data());
  out.put(std::uint32_t{1}).put(bytes);
  for (const Gpr i : {rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp}) out.put(vcpu.general[i]);
  for (std::size_t i = 8; i < 16; ++i) out.put(vcpu.general[i]);
  out.put(vcpu.rip).put(vcpu.rflags);
  const auto put = [&](const SegmentRegister& of) {
    out.put(of.selector).put(of.limit).put(of.flags).put(std::uint32_t{0}).put(of.base);
  };
  for (const Segment of : {cs, ds, es, fs, gs, ss}) put(vcpu.segments[of]);
  for (const SegmentRegister* of : {&vcpu.ldt, &vcpu.tr, &vcpu.gdt, &vcpu.idt}) put(*of);
  for (const std::uint64_t each : vcpu.cr) out.put(each);
  out.put(vcpu.kernel_gs_base);
}

struct ElfSegment {
  std::uint32_t type;
  std::uint32_t flags;
  std::uint64_t offset;
  std::uint64_t address;
  std::uint64_t bytes;
  std::uint64_t align;
};

/// ELF header and program headers.
inline std::vector<std::byte> elf_headers(std::span<const ElfSegment> segments) {
  std::vector<std::byte> head(sizeof(Elf64_Ehdr) + segments.size() * sizeof(Elf64_Phdr));
  constexpr unsigned char ident[EI_NIDENT] = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT};
  std::memcpy(head.data(), ident, sizeof ident);
  LittleEndian out(&head[EI_NIDENT]);
  out.put(std::uint16_t{ET_CORE}).put(std::uint16_t{EM_X86_64}).put(std::uint32_t{EV_CURRENT});
  out.put(std::uint64_t{0}).put(std::uint64_t{sizeof(Elf64_Ehdr)}).put(std::uint64_t{0}).put(std::uint32_t{0});
  out.put(std::uint16_t{sizeof(Elf64_Ehdr)}).put(std::uint16_t{sizeof(Elf64_Phdr)});
  out.put(static_cast<std::uint16_t>(segments.size()));  // no sections: three zeros
  LittleEndian rows(&head[sizeof(Elf64_Ehdr)]);
  for (const ElfSegment& each : segments) {
    rows.put(each.type).put(each.flags).put(each.offset);
    rows.put(each.address).put(each.address);  // without page tables an address is both
    rows.put(each.bytes).put(each.bytes).put(each.align);
  }
  return head;
}

}  // namespace detail

}  // namespace multifd::image
