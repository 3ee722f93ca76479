// SPDX-License-Identifier: MIT
//
// looks_random(): tells an encoder, from a few bytes, that a page holds what nobody can compress: encrypted data, or
// data that is compressed already. A wrong answer costs some size or some time, nothing else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace multifd::detail {

/// Returns whether 256 bytes, drawn from all over the page, are spread over their values as evenly as random ones.
///
/// Counted are the pairs of equal bytes among them: 128 +- 11 in random data, 150 to 170 in what a compressor left,
/// 500 and more in text, code, numbers or anything with a few zeros. Repeats of random pages are not seen.
///
/// Params: `page_bytes`: a power of two; pages under 256 bytes never look random.
/// Cost: reads 32 words of 8 bytes, about 0.2 us. The page may change meanwhile.
inline bool looks_random(const void* page, std::size_t page_bytes) noexcept {
  constexpr std::size_t words = 32, word_bytes = 8;
  constexpr unsigned most_pairs = 180;  // random pages are above once in 20,000
  const std::size_t stride = page_bytes / words;
  if (stride < word_bytes) return false;
  std::array<std::uint8_t, 256> seen{};
  unsigned pairs = 0;
  for (std::size_t w = 0; w < words; ++w) {
    // The offset within the stride moves, so that every field of a page full of records has its turn.
    std::array<std::uint8_t, word_bytes> word;
    std::memcpy(word.data(), static_cast<const std::byte*>(page) + w * stride + w * 5 * word_bytes % stride,
                word_bytes);
    for (const std::uint8_t byte : word) pairs += seen[byte]++;
    if (pairs > most_pairs) return false;
  }
  return true;
}

}  // namespace multifd::detail
