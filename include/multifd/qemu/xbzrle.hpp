// SPDX-License-Identifier: MIT
//
// Applies the contents of an XBZRLE record (format/main_stream.md section 9.6) to the page that came before.
//
//   repeated: ULEB128 count of bytes that stay, ULEB128 count n of bytes that change, n bytes
//
// A count has seven bits per byte, the lowest first; all bytes but the last have 0x80.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "multifd/result.hpp"

namespace multifd::qemu {

namespace detail {

/// Reads a count, and takes it away from `from`. None: it is cut off, or longer than a count of page bytes can be.
inline std::optional<std::size_t> take_uleb128(std::span<const std::byte>& from) noexcept {
  constexpr std::size_t longest = 3;  // 21 bits: more than the largest page
  std::size_t value = 0;
  for (std::size_t i = 0; i < longest && i < from.size(); ++i) {
    const auto byte = std::to_integer<std::size_t>(from[i]);
    value |= (byte & 0x7f) << (7 * i);
    if ((byte & 0x80) != 0) continue;
    from = from.subspan(i + 1);
    return value;
  }
  return std::nullopt;
}

}  // namespace detail

/// Changes a page as an XBZRLE record says.
///
/// Params `changes`: Element::data of an xbzrle_page; without a byte nothing changes. `page`: as the source sent it before.
/// Errors: Errc::bad_xbzrle (stage parse; detail: the bytes of `changes` that were in order): a count that is cut off or
///   longer than three bytes, runs that end past the page or past `changes`, a run of no byte to change. The page has
///   changed in part then.
/// Threads: any. Cost: reads `changes` once, and copies what changes.
[[nodiscard]] inline Result<void> apply_xbzrle(std::span<const std::byte> changes, std::span<std::byte> page) noexcept {
  const std::size_t bytes = changes.size();
  std::span<std::byte> left = page;
  while (!changes.empty()) {
    const auto refuse = [&, at = bytes - changes.size()](const char* what) {
      return fail(Errc::bad_xbzrle, Stage::parse, what, at);
    };
    const auto same = detail::take_uleb128(changes);
    if (!same) return refuse("XBZRLE: count of bytes that stay");
    if (*same > left.size()) return refuse("XBZRLE: bytes that stay end past the page");
    left = left.subspan(*same);
    const auto changed = detail::take_uleb128(changes);
    if (!changed || *changed == 0) return refuse("XBZRLE: count of bytes that change");
    if (*changed > left.size()) return refuse("XBZRLE: bytes that change end past the page");
    if (*changed > changes.size()) return refuse("XBZRLE: bytes that change are cut off");
    std::memcpy(left.data(), changes.data(), *changed);
    left = left.subspan(*changed);
    changes = changes.subspan(*changed);
  }
  return {};
}

}  // namespace multifd::qemu
