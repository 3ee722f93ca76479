// SPDX-License-Identifier: MIT
//
// Limits that every layer shares. QEMU set them; formats hold their own numbers against these.
#pragma once

#include <cstddef>

namespace multifd {

/// Channels of one migration: a channel's id has one byte, and QEMU's option stops at 255.
inline constexpr unsigned max_channels = 255;

/// Page bytes of one full batch, which is also one full packet of the multifd format.
inline constexpr std::size_t batch_bytes = 512 * 1024;

/// Page sizes: record flags of QEMU's main stream need ten bits below the page size; no target has larger pages.
inline constexpr std::size_t min_page_bytes = 1024;
inline constexpr std::size_t max_page_bytes = 65536;
constexpr bool valid_page_bytes(std::size_t page_bytes) noexcept {
  return page_bytes >= min_page_bytes && page_bytes <= max_page_bytes && (page_bytes & (page_bytes - 1)) == 0;
}

/// Bytes of a RAM block's name.
inline constexpr std::size_t max_idstr_length = 255;

}  // namespace multifd
