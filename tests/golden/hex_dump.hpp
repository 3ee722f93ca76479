// SPDX-License-Identifier: MIT
//
// Byte images written as text, so that a golden file can be held against format/packets.md by eye.
#pragma once

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string_view>
#include <vector>

/// Reads lines of "OFFSET: hex bytes", offsets decimal as in the tables; '#' starts a comment. What no line
/// names is zero; the image has `size` bytes.
inline std::vector<std::byte> from_hex(std::size_t size, std::string_view text) {
  std::vector<std::byte> bytes(size);
  std::size_t at = 0;
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    line = line.substr(0, line.find('#'));
    const std::size_t colon = line.find(':');
    if (colon == line.npos) continue;
    at = 0;
    for (const char c : line.substr(0, colon))
      if (c >= '0' && c <= '9') at = at * 10 + static_cast<std::size_t>(c - '0');
    int high = -1;
    for (const char c : line.substr(colon + 1)) {
      if (c == ' ') continue;
      const std::size_t digit = std::string_view("0123456789abcdef").find(c);
      if (digit == std::string_view::npos) throw std::invalid_argument("golden image: no hex digit");
      if (high < 0) {
        high = static_cast<int>(digit);
      } else {
        bytes.at(at++) = static_cast<std::byte>(static_cast<std::size_t>(high) * 16 + digit);
        high = -1;
      }
    }
    if (high >= 0) throw std::invalid_argument("golden image: half a byte");
  }
  return bytes;
}
