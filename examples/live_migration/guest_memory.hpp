// SPDX-License-Identifier: MIT
//
// The RAM of the guest: where it comes from, how it is laid out and what boot() puts there. guest_code.hpp has
// the program and its mailbox.
//
//   0x0000  unused          0x3000  mailbox            0x100000  end of the low area
//   0x1000  PML4 (kvm)      0x4000  program (kvm)      ...       pages of all kinds
//   0x2000  PDPT (kvm)      0x10000 one PD a GiB (kvm) middle    working set
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "guest.hpp"

namespace live {

namespace layout {
inline constexpr std::size_t pml4 = 0x1000;
inline constexpr std::size_t pdpt = 0x2000;
inline constexpr std::size_t mailbox = 0x3000;
inline constexpr std::size_t program = 0x4000;
inline constexpr std::size_t page_directories = 0x10000;
inline constexpr std::size_t low_end = 0x100000;
}  // namespace layout

/// Where the working set lies.
struct WorkingSet {
  std::size_t first_byte = 0;
  std::size_t pages = 0;
};

/// Errors: throws when the configuration is impossible, with the option to change.
void check_config(const GuestConfig& config);

WorkingSet working_set(const GuestConfig& config);

/// Anonymous private memory, untouched until its first write.
class GuestMemory {
 public:
  explicit GuestMemory(std::size_t bytes);
  ~GuestMemory();
  GuestMemory(const GuestMemory&) = delete;
  GuestMemory& operator=(const GuestMemory&) = delete;

  std::span<std::byte> bytes() const { return {data_, size_}; }

 private:
  std::byte* data_;
  std::size_t size_;
};

/// Fills everything above the low area with runs of zero, text-like and random pages, as `config` shares them
/// out. Zero pages are left untouched, as in a guest that never used them. Same configuration, same bytes.
void fill_memory(std::span<std::byte> memory, const GuestConfig& config);

}  // namespace live
