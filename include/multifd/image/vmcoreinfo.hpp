// SPDX-License-Identifier: MIT
//
// Finds the text by which a Linux guest tells analysis tools how to read it. The kernel keeps it in memory as an ELF note,
// so it is there without QEMU's vmcoreinfo device:
//
//   0 be 4: 11   4 be 4: size of the text   8 be 4: 0   12: "VMCOREINFO" and two NULs   24: "OSRELEASE=...\n...PAGESIZE=..."
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "multifd/engine/monitor.hpp"
#include "multifd/format/byte_order.hpp"
#include "multifd/image/detail/copy_ranges.hpp"

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

/// Reads bytes of a range; pages that the image does not hold are zeros.
[[nodiscard]] inline Result<void> read_range(const MappedRamReader& image, const PhysicalRange& range, std::uint64_t at,
                                             std::span<std::byte> to) {
  std::ranges::fill(to, std::byte{0});
  const std::uint64_t page = image.page_bytes();
  const std::uint64_t begin = range.offset + at;
  const std::uint64_t end = begin + to.size();
  const std::uint64_t first = begin / page;
  return image.for_each_run(range.block, first, (end + page - 1) / page - first,
                            [&](std::uint64_t offset, std::uint64_t bytes) -> Result<void> {
                              const std::uint64_t from = std::max(offset, begin);
                              const std::uint64_t until = std::min(offset + bytes, end);
                              return image.file().read(image.blocks()[range.block].pages_offset + from,
                                                       to.subspan(static_cast<std::size_t>(from - begin),
                                                                  static_cast<std::size_t>(until - from)));
                            });
}

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

}  // namespace detail

/// Looks through all pages that the image holds. Of several (a crash kernel has its own) the one at the lowest address.
///
/// Returns: none where there is no well-formed one: its text is 11 bytes to 64 KiB, inside one range, printable.
/// Errors: as write_raw_memory().
/// Threads: the caller's waits for options.threads others.
/// Cost: reads each page once; 1 MiB a thread.
[[nodiscard]] inline Result<std::optional<Vmcoreinfo>> find_vmcoreinfo(const MappedRamReader& image,
                                                                       const PhysicalLayout& layout,
                                                                       const WorkOptions& options = {}) {
  using detail::RangePieces;
  return catch_bad_alloc(Stage::setup, "vmcoreinfo", [&]() -> Result<std::optional<Vmcoreinfo>> {
    MULTIFD_TRY(detail::check_ranges(image, layout.ranges));
    const auto buffers = detail::WorkBuffers::create(options);
    if (!buffers) return std::unexpected(buffers.error());
    const RangePieces pieces(layout.ranges);
    const std::uint64_t page = image.page_bytes();
    engine::Monitor guard;
    std::optional<Vmcoreinfo> found;
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
      const auto held = guard.lock();
      if (!found || range.address + at < found->address) found = Vmcoreinfo{range.address + at, *std::move(*text)};
      return {};
    };
    auto done = in_threads(options, pieces.count(), [&](std::uint64_t number, unsigned worker) -> Result<void> {
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
      if (options.on_progress) options.on_progress(piece.bytes);
      return {};
    });
    if (!done) return std::unexpected(done.error());
    return found;
  });
}

}  // namespace multifd::image
