// SPDX-License-Identifier: MIT
//
// How much a source may announce in its main stream. Each length and count from the wire is compared with one of these
// limits before it is used (format/hardening.md section 16, row 19). They alone determine the parser's memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "multifd/format/extension.hpp"
#include "multifd/format/main_stream.hpp"
#include "multifd/result.hpp"

namespace multifd::qemu {

/// Options of MainStreamParser::create().
struct MainStreamLimits {
  std::size_t page_bytes = 4096;  ///< the guest's page size; not in the stream on x86 (section 9.11)
  std::size_t max_blocks = 1024;  ///< 1 to 65536; 280 bytes of memory each, touched when used
  std::uint64_t max_ram_bytes = std::uint64_t{1} << 44;  ///< of all blocks together
  std::size_t max_machine_type_bytes = 256;              ///< at most 4096
  std::size_t max_capabilities = 32;                     ///< that change the stream; at most 64
  /// Whether the messages of an own source are taken (format/extension.md section 19). Default: off, and they are
  /// refused as unknown commands. A destination that sets this answers a source's question (Commands::answer()).
  bool extension = false;
  /// Whether a stream with the capability mapped-ram is taken (format/mapped_ram.md section 12): one that lies in a file.
  /// The caller then reads on where the list of blocks says (MainStreamParser::seek()). Default: off, and it is refused.
  bool mapped_ram = false;
  /// Whether XBZRLE records are taken, which only a source without multifd sends. The caller then needs the page that came
  /// before (xbzrle.hpp). Default: off, and they are refused.
  bool xbzrle = false;
  /// Of one device's state from an own source. The state comes in pieces and takes no memory.
  std::uint64_t max_section_bytes = std::uint64_t{1} << 40;
  std::uint32_t max_description_bytes = 16 * 1024 * 1024;  ///< of an own source; in pieces, too
};

/// The longest configuration section within `limits`, and one byte to know that it ends there.
constexpr std::size_t max_configuration_bytes(const MainStreamLimits& limits) noexcept {
  constexpr std::size_t subsection_header = 1 + 1 + 255 + 4;
  return 5 + limits.max_machine_type_bytes + 3 * subsection_header + 4 + (4 + limits.max_capabilities * 256) + 16 + 1;
}

/// The longest element within `limits`.
constexpr std::size_t max_element_bytes(const MainStreamLimits& limits) noexcept {
  const std::size_t message = limits.extension ? command_header_bytes + wire::max_extension_bytes : 0;
  return std::max({max_configuration_bytes(limits),
                   max_ram_record_header_bytes + xbzrle_header_bytes + limits.page_bytes, message});
}

/// Errors: Errc::bad_page_size, bad_option (detail: the value).
[[nodiscard]] inline Result<void> check_limits(const MainStreamLimits& limits) noexcept {
  const auto bad = [](std::uint64_t value, const char* what) {
    return fail(Errc::bad_option, Stage::setup, what, value);
  };
  if (!valid_page_bytes(limits.page_bytes))
    return fail(Errc::bad_page_size, Stage::setup, "main stream", limits.page_bytes);
  if (limits.max_blocks < 1 || limits.max_blocks > 65536) return bad(limits.max_blocks, "max_blocks");
  if (limits.max_machine_type_bytes > 4096) return bad(limits.max_machine_type_bytes, "max_machine_type_bytes");
  if (limits.max_capabilities > 64) return bad(limits.max_capabilities, "max_capabilities");
  return {};
}

}  // namespace multifd::qemu
