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
/// names is zero; the image has `size` bytes. "OFFSET: N x hex bytes" gives the bytes N times over.
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
    std::string_view digits = line.substr(colon + 1);
    std::size_t times = 1;
    if (const std::size_t x = digits.find('x'); x != digits.npos) {
      times = 0;
      for (const char c : digits.substr(0, x))
        if (c >= '0' && c <= '9') times = times * 10 + static_cast<std::size_t>(c - '0');
      digits.remove_prefix(x + 1);
    }
    const std::size_t first = at;
    int high = -1;
    for (const char c : digits) {
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
    for (const std::size_t once = at - first; times > 1; --times, at += once)
      for (std::size_t i = 0; i < once; ++i) bytes.at(at + i) = bytes[first + i];
  }
  return bytes;
}
