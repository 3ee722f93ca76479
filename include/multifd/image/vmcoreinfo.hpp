// SPDX-License-Identifier: MIT
//
// Finds the text by which a Linux guest tells analysis tools how to read it. The kernel keeps it in memory as an ELF note,
// so it is there without QEMU's vmcoreinfo device:
//
//   0 be 4: 11   4 be 4: size of the text   8 be 4: 0   12: "VMCOREINFO" and two NULs   24: "OSRELEASE=...\n...PAGESIZE=..."
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/image/detail/copy_ranges.hpp"
#include "multifd/image/detail/page_walk.hpp"
#include "multifd/image/vcpu_registers.hpp"

namespace multifd::image {

/// A guest kernel's own description.
struct Vmcoreinfo {
  std::uint64_t address = 0;  ///< of the note, guest-physical
  std::string text;
};

namespace detail {

inline constexpr std::size_t vmcoreinfo_header = 24;
inline constexpr std::string_view vmcoreinfo_name{"VMCOREINFO\0\0", 12};
inline constexpr std::string_view vmcoreinfo_begin = "OSRELEASE=";
inline constexpr std::size_t most_vmcoreinfo = 64 * 1024;  ///< Linux has one page

/// The text of a note whose header is at `at`, or none: it is no such text. Reads twice as much each time as there was
/// text, so that a file full of headers costs little more than one without.
[[nodiscard]] inline Result<std::optional<std::string>> read_vmcoreinfo(const MappedRamReader& image,
                                                                        const PhysicalRange& range, std::uint64_t at,
                                                                        std::size_t bytes) {
  const auto is_text = [](char c) { return c == '\n' || c == '\t' || (c >= ' ' && c <= '~'); };
  std::string text;
  while (text.size() < bytes) {
    const std::size_t have = text.size();
    text.resize(std::min(bytes, std::max<std::size_t>(64, have * 2)));
    const auto more = std::as_writable_bytes(std::span(text)).subspan(have);
    MULTIFD_TRY(read_range(image, range, at + vmcoreinfo_header + have, more));
    if (!text.starts_with(vmcoreinfo_begin.substr(0, text.size())) ||
        !std::ranges::all_of(text.begin() + static_cast<std::ptrdiff_t>(have), text.end(), is_text))
      return std::optional<std::string>{};
  }
  if (text.find("\nPAGESIZE=") == text.npos) return std::optional<std::string>{};
  return std::optional(std::move(text));
}

/// A line's value, in hexadecimal or, with a sign, decimal; none where there is no such line.
template <class T>
std::optional<T> number_in(std::string_view text, std::string_view line, int base) {
  const auto at = text.find(line);
  if (at == text.npos) return std::nullopt;
  T value = 0;
  const std::string_view rest = text.substr(at + line.size());
  if (std::from_chars(rest.data(), rest.data() + rest.size(), value, base).ec != std::errc()) return std::nullopt;
  return value;
}

/// Whether a vCPU has the kernel where the text says that it is: by its page tables.
[[nodiscard]] inline Result<bool> is_running(const MappedRamReader& image, const PhysicalLayout& layout,
                                             std::span<const VcpuRegisters> vcpus, std::string_view text) {
  constexpr std::uint64_t kernel_map = 0xffffffff80000000;  // Linux's, for x86-64
  constexpr std::uint64_t user_tables = 1
                                        << 12;  // where programs run by tables of their own, the kernel's are in front
  constexpr std::size_t most_vcpus = 16;        // one would do; a text that lies must not cost much
  const auto symbol = number_in<std::uint64_t>(text, "\nSYMBOL(init_uts_ns)=", 16);
  const auto base = number_in<std::int64_t>(text, "\nNUMBER(phys_base)=", 10);
  if (!symbol || !base || *symbol < kernel_map) return false;
  const std::uint64_t wanted = *symbol - kernel_map + static_cast<std::uint64_t>(*base);
  for (const VcpuRegisters& vcpu : vcpus.first(std::min(vcpus.size(), most_vcpus))) {
    for (const std::uint64_t cr3 : {vcpu.cr[3], vcpu.cr[3] & ~user_tables}) {
      const auto found = walk_pages(image, layout.ranges, vcpu, cr3, *symbol);
      if (!found) return std::unexpected(found.error());
      if (*found == wanted) return true;
    }
  }
  return false;
}

}  // namespace detail

/// Options of find_vmcoreinfo().
struct VmcoreinfoOptions {
  std::span<const VcpuRegisters> vcpus{};  ///< by their page tables the kernel that runs is known. Default: none
  WorkOptions work{};                      ///< threads, progress
};

/// Looks through all pages that the image holds. Of several (the kernel before a reboot left one, a program has read it) one
/// of the kernel that runs by a vCPU's page tables; of those, or where none is known to run, the one at the lowest address.
///
/// Returns: none where there is no well-formed one: its text is 11 bytes to 64 KiB, inside one range, printable.
/// Errors: as write_raw_memory().
/// Threads: the caller's waits for options.work.threads others.
/// Cost: reads each page once; 1 MiB a thread.
[[nodiscard]] inline Result<std::optional<Vmcoreinfo>> find_vmcoreinfo(const MappedRamReader& image,
                                                                       const PhysicalLayout& layout,
                                                                       const VmcoreinfoOptions& options = {}) {
  using detail::RangePieces;
  return catch_bad_alloc(Stage::setup, "vmcoreinfo", [&]() -> Result<std::optional<Vmcoreinfo>> {
    MULTIFD_TRY(detail::check_ranges(image, layout.ranges));
    const auto buffers = detail::WorkBuffers::create(options.work);
    if (!buffers) return std::unexpected(buffers.error());
    const RangePieces pieces(layout.ranges);
    const std::uint64_t page = image.page_bytes();
    engine::Monitor guard;
    std::optional<Vmcoreinfo> found;
    bool found_runs = false;
    const auto look = [&](const PhysicalRange& range, std::uint64_t at, const std::byte* header) -> Result<void> {
      const std::uint64_t bytes = wire::load_le<std::uint32_t>(header + 4);
      if (wire::load_le<std::uint32_t>(header) != 11 || wire::load_le<std::uint32_t>(header + 8) != 0) return {};
      if (bytes <= detail::vmcoreinfo_begin.size() || bytes > detail::most_vmcoreinfo ||
          bytes > range.bytes - at - detail::vmcoreinfo_header)
        return {};
      // A thread's work must not throw.
      auto text = catch_bad_alloc(Stage::setup, "vmcoreinfo", [&] {
        return detail::read_vmcoreinfo(image, range, at, static_cast<std::size_t>(bytes));
      });
      if (!text) return std::unexpected(text.error());
      if (!*text) return {};
      const auto runs = detail::is_running(image, layout, options.vcpus, **text);
      if (!runs) return std::unexpected(runs.error());
      const auto held = guard.lock();
      if (found && (found_runs != *runs ? found_runs : found->address < range.address + at)) return {};
      found_runs = *runs;
      found = Vmcoreinfo{range.address + at, *std::move(*text)};
      return {};
    };
    auto done = in_threads(options.work, pieces.count(), [&](std::uint64_t number, unsigned worker) -> Result<void> {
      const RangePieces::Piece piece = pieces.at(number);
      const PhysicalRange& range = layout.ranges[piece.range];
      const std::span<std::byte> buffer = buffers->of(worker);
      // A header may begin in this piece's last page and end in the next one's first.
      const std::uint64_t last = std::min(piece.first + piece.bytes + page, range.bytes);
      const auto scan = [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
        while (bytes >= detail::vmcoreinfo_header) {
          const std::uint64_t part = std::min<std::uint64_t>(bytes, buffer.size());
          const std::span<std::byte> some = buffer.first(static_cast<std::size_t>(part));
          MULTIFD_TRY(image.file().read(image.blocks()[range.block].pages_offset + offset, some));
          const std::string_view text(reinterpret_cast<const char*>(some.data()), some.size());
          for (auto at = text.find(detail::vmcoreinfo_name); at != text.npos;
               at = text.find(detail::vmcoreinfo_name, at + 1))
            if (at >= 12 && at % 4 == 0 && text.size() - at >= 12)
              MULTIFD_TRY(look(range, offset - range.offset + at - 12, &some[at - 12]));
          if (part == bytes) break;
          // The next part begins with what may be the beginning of a header.
          offset += part - detail::vmcoreinfo_header;
          bytes -= part - detail::vmcoreinfo_header;
        }
        return {};
      };
      MULTIFD_TRY(
          image.for_each_run(range.block, (range.offset + piece.first) / page, (last - piece.first) / page, scan));
      if (options.work.on_progress) options.work.on_progress(piece.bytes);
      return {};
    });
    if (!done) return std::unexpected(done.error());
    return found;
  });
}

}  // namespace multifd::image
