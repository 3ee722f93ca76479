// SPDX-License-Identifier: MIT
//
// Prefetch lists as text: the pages that a guest needed in an earlier run, in that order.
//
//   multifd-prefetch-list 1 4096 2 2155872256     version, page size, number of RAM blocks, bytes of all of them
//   pc.ram 1048576 4096                           idstr, offset, bytes: whole pages
//   pc.ram 69632 131072
//
// In an idstr each blank, control character and % is written as % and two hexadecimal digits. Nothing in a list is trusted.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "multifd/limits.hpp"
#include "multifd/postcopy/page_store.hpp"
#include "multifd/result.hpp"

namespace multifd::postcopy {

namespace detail {

inline constexpr std::string_view prefetch_magic = "multifd-prefetch-list";

/// Takes the text up to the next `end` away.
inline std::string_view take_until(std::string_view& text, char end) noexcept {
  const std::size_t at = text.find(end);
  const std::string_view taken = text.substr(0, at);
  text.remove_prefix(at == text.npos ? text.size() : at + 1);
  return taken;
}

inline std::optional<std::uint64_t> take_number(std::string_view& text) noexcept {
  const std::string_view digits = take_until(text, ' ');
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error != std::errc{} || end != digits.data() + digits.size()) return std::nullopt;
  return number;
}

inline std::string escaped_idstr(std::string_view idstr) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string text;
  for (const char c : idstr) {
    const auto value = static_cast<unsigned char>(c);
    if (value > ' ' && value != 0x7f && c != '%') {
      text += c;
      continue;
    }
    text += {'%', digits[value >> 4], digits[value & 15]};
  }
  return text;
}

inline std::uint64_t bytes_of_all(std::span<const StoreBlock> blocks) noexcept {
  std::uint64_t sum = 0;
  for (const StoreBlock& block : blocks) sum += block.bytes;
  return sum;
}

}  // namespace detail

/// Reads a list for the guest with these blocks.
///
/// Params: `text`: all of it. `page_bytes`: the guest's.
/// Returns: the pages in the list's order, in ranges of up to batch_bytes.
/// Errors: Errc::bad_prefetch_list (detail: the line, counted from 1): no list, of another version or another guest; a
///   range of no block, outside of it, or not of whole pages; more pages than the guest has; ENOMEM.
/// Threads: a plain function. Cost: time with the text, memory with the pages that the guest has.
[[nodiscard]] inline Result<std::vector<PageRange>> parse_prefetch_list(std::string_view text,
                                                                        std::span<const StoreBlock> blocks,
                                                                        std::uint64_t page_bytes) {
  constexpr const char* op = "prefetch list";
  return catch_bad_alloc(Stage::setup, op, [&]() -> Result<std::vector<PageRange>> {
    std::uint64_t line_number = 1;
    const auto bad = [&] { return fail(Errc::bad_prefetch_list, Stage::setup, op, line_number); };
    std::uint64_t left = detail::bytes_of_all(blocks);
    std::string_view head = detail::take_until(text, '\n');
    if (detail::take_until(head, ' ') != detail::prefetch_magic || detail::take_number(head) != 1 ||
        detail::take_number(head) != page_bytes || detail::take_number(head) != blocks.size() ||
        detail::take_number(head) != left || !head.empty())
      return bad();
    std::vector<std::string> idstrs;
    for (const StoreBlock& block : blocks) idstrs.push_back(detail::escaped_idstr(block.idstr));
    std::vector<PageRange> ranges;
    std::size_t last = 0;  // lines of one block follow each other
    while (!text.empty()) {
      ++line_number;
      std::string_view line = detail::take_until(text, '\n');
      const std::string_view idstr = detail::take_until(line, ' ');
      if (last >= idstrs.size() || idstrs[last] != idstr)
        last = static_cast<std::size_t>(std::ranges::find(idstrs, idstr) - idstrs.begin());
      const auto offset = detail::take_number(line);
      const auto bytes = detail::take_number(line);
      if (last == idstrs.size() || !offset || !bytes || !line.empty()) return bad();
      const std::uint64_t size = blocks[last].bytes;
      if (*bytes == 0 || *bytes % page_bytes != 0 || *offset % page_bytes != 0 || *offset > size ||
          *bytes > size - *offset || *bytes > left)
        return bad();
      left -= *bytes;
      for (std::uint64_t at = 0; at < *bytes; at += batch_bytes)
        ranges.push_back({.block = static_cast<BlockId>(last),
                          .offset = *offset + at,
                          .bytes = std::min<std::uint64_t>(batch_bytes, *bytes - at)});
    }
    return ranges;
  });
}

/// Writes a list. Params `ranges`: of these blocks; ranges that follow each other become one line.
/// Errors: none but std::bad_alloc. Threads: a plain function. Cost: as the text is long.
inline std::string prefetch_list_text(std::span<const PageRange> ranges, std::span<const StoreBlock> blocks,
                                      std::uint64_t page_bytes) {
  std::string text(detail::prefetch_magic);
  for (const std::uint64_t number :
       {std::uint64_t{1}, page_bytes, static_cast<std::uint64_t>(blocks.size()), detail::bytes_of_all(blocks)})
    text += ' ' + std::to_string(number);
  text += '\n';
  for (std::size_t i = 0; i < ranges.size();) {
    PageRange range = ranges[i++];
    for (; i < ranges.size() && ranges[i].block == range.block && ranges[i].offset == range.end(); ++i)
      range.bytes += ranges[i].bytes;
    text += detail::escaped_idstr(blocks[index(range.block)].idstr) + ' ' + std::to_string(range.offset) + ' ' +
            std::to_string(range.bytes) + '\n';
  }
  return text;
}

}  // namespace multifd::postcopy
