// SPDX-License-Identifier: MIT
//
// The memory that is asked about: a file (a guest's memory, a process's dump, anything) or generated patterns. Of a
// large one several windows, spread evenly, are looked at; they lie one behind the other in memory of our own.
#pragma once

#include <multifd/transport/interrupt.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "advise/model.hpp"
#include "common/mapping.hpp"

namespace advise {

inline constexpr std::size_t page_bytes = 4096;
inline constexpr std::uint64_t window_bytes = std::uint64_t{8} << 20;

struct Image {
  std::string name;         ///< the file, or the patterns
  std::uint64_t bytes = 0;  ///< of the whole, in whole pages
  std::uint64_t windows = 1;
  program::Mapping memory;     ///< the sample
  ImageFacts facts{};          ///< of the whole; see look_at()
  std::size_t zero_pages = 0;  ///< of the sample
  std::vector<bool> zero{};    ///< per page of the sample

  std::span<std::byte> sample() const noexcept { return memory.bytes(); }
};

/// Reads a file, at most `sample_bytes` of it. A last page that is not whole is filled up with zeros.
/// Throws program::Failure: missing, empty, no regular file, unreadable.
Image read_image(const std::string& path, std::uint64_t sample_bytes);

/// Generates patterns of corpus.hpp, the same share of each. `bytes`: of the whole; the sample is made, the rest assumed
/// to be like it. Throws program::Usage for less than a page per pattern.
Image make_image(const std::vector<std::string>& patterns, std::uint64_t bytes, std::uint64_t sample_bytes,
                 std::uint64_t seed);

/// Finds the zero pages of the sample and fills in `facts` and `zero`.
void look_at(Image& image, const multifd::Interrupt& interrupt);

}  // namespace advise
