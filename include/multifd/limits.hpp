// SPDX-License-Identifier: MIT
//
// Limits that every layer shares. Each has its one home here; other headers use these names. QEMU set the values,
// except that of max_waiting_connections.
#pragma once

#include <cstddef>

namespace multifd {

/// Channels of one migration: a channel's id has one byte, and QEMU's option stops at 255.
inline constexpr unsigned max_channels = 255;

/// Connections that may wait at once to be recognised: more than all channels and the main connection of one source.
inline constexpr std::size_t max_waiting_connections = 512;

/// Page bytes of one full batch, which is also one full packet of the multifd format.
inline constexpr std::size_t batch_bytes = 512 * 1024;

/// Page sizes. The lower bound: record flags of QEMU's main stream take the ten bits below a page's offset. The upper
/// bound: no QEMU target has larger pages.
inline constexpr std::size_t min_page_bytes = 1024;
inline constexpr std::size_t max_page_bytes = 65536;
constexpr bool valid_page_bytes(std::size_t page_bytes) noexcept {
  return page_bytes >= min_page_bytes && page_bytes <= max_page_bytes && (page_bytes & (page_bytes - 1)) == 0;
}

/// Bytes of a RAM block's name.
inline constexpr std::size_t max_idstr_length = 255;

}  // namespace multifd
