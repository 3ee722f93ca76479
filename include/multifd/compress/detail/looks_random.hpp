// SPDX-License-Identifier: MIT
//
// looks_random(): guesses from a few bytes that a page cannot be compressed, because its data is encrypted or
// compressed already. A wrong answer costs some size or some time, nothing else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace multifd::detail {

/// Whether bytes sampled from all over the page are spread over their values as evenly as random bytes.
///
/// Counts the pairs of equal bytes among 128: 32 +- 6 in random data, 37 to 43 in compressed data, 125 and more in text,
/// code, numbers or anything with a few zeros. Repetitions of random pages are not detected.
///
/// Params: `page_bytes`: a power of two; pages under 128 bytes never look random.
/// Cost: reads 16 words of 8 bytes of a random page, about 0.1 us, and 8 words of most others. The page may change
///   meanwhile.
inline bool looks_random(const void* page, std::size_t page_bytes) noexcept {
  constexpr std::size_t words = 16, word_bytes = 8;
  constexpr unsigned most_pairs_of_half = 26;  // random bytes have 8 +- 3
  constexpr unsigned most_pairs = 60;          // a random page exceeds this less than once in 100,000
  const std::size_t stride = page_bytes / words;
  if (stride < word_bytes) return false;
  std::array<std::uint8_t, 256> seen{};
  unsigned pairs = 0;
  // The even strides first, which is all that has to be read of most pages that are not random.
  for (std::size_t i = 0; i < words; ++i) {
    if (i == words / 2 && pairs > most_pairs_of_half) return false;
    const std::size_t w = i < words / 2 ? 2 * i : 2 * i - words + 1;
    // The offset within the stride moves, so that every field of a page full of records is sampled.
    std::array<std::uint8_t, word_bytes> word;
    std::memcpy(word.data(), static_cast<const std::byte*>(page) + w * stride + w * 5 * word_bytes % stride,
                word_bytes);
    for (const std::uint8_t byte : word) pairs += seen[byte]++;
  }
  return pairs <= most_pairs;
}

}  // namespace multifd::detail
