// SPDX-License-Identifier: MIT
//
// What the benchmarks move: memory filled page by page with a named pattern, the same for the same seed. Nothing is
// downloaded. "library" is the one pattern that depends on the machine: the bytes of its own shared libraries.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace corpus {

inline constexpr std::size_t page_bytes = 4096;

/// The patterns, by name. Shares are of pages; zero pages and others come in runs of 16 on average.
///   zero     nothing else
///   half     half zero, half random
///   random   cannot be compressed
///   text     words, numbers and punctuation
///   guest    what a small server holds: tables of records with pointers, text, code-like bytes, half-empty pages
///   library  the bytes of this machine's shared libraries (seed: where to begin)
///   mixed    40 % zero, 40 % guest, 20 % random: the pattern of the tables in the README
inline constexpr std::array<std::string_view, 7> patterns = {"zero",  "half",    "random", "text",
                                                             "guest", "library", "mixed"};

/// Small and quick; good enough that no compressor finds a pattern.
class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  std::uint64_t operator()() noexcept {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// 0 to bound - 1.
  std::uint64_t below(std::uint64_t bound) noexcept { return (*this)() % bound; }

 private:
  std::uint64_t state_;
};

using Page = std::span<std::byte, page_bytes>;

inline void fill_random(Page page, Random& random) {
  for (std::size_t at = 0; at < page.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(page.data() + at, &word, 8);
  }
}

/// Words drawn with falling frequency, now and then a number.
inline void fill_text(Page page, Random& random) {
  static const std::vector<std::string> words = [] {
    Random letters(42);
    std::vector<std::string> made(2000);
    for (std::string& word : made) {
      for (std::uint64_t n = 2 + letters.below(8); n > 0; --n)
        word.push_back("etaoinshrdlucmfwypvbgk"[std::min(letters.below(22), letters.below(22))]);
      word.push_back(' ');
    }
    return made;
  }();
  for (std::size_t at = 0; at < page.size();) {
    const std::uint64_t kind = random.below(32);
    char number[24] = "";
    if (kind == 0) std::snprintf(number, sizeof number, "%u\n", static_cast<unsigned>(random.below(100000)));
    if (kind == 1) std::strcpy(number, ".\n");
    const std::uint64_t rank = std::min({random.below(2000), random.below(2000), random.below(2000)});
    const std::string_view piece = *number != 0 ? std::string_view(number) : words[rank];
    const std::size_t size = std::min(piece.size(), page.size() - at);
    std::memcpy(page.data() + at, piece.data(), size);
    at += size;
  }
}

/// Records of 64 bytes as a heap holds them: pointers into one region, small counters, flags, padding.
inline void fill_records(Page page, Random& random) {
  const std::uint64_t heap = 0x0000'7f00'0000'0000u + (random.below(64) << 24);
  const std::uint64_t type = heap + random.below(1024) * 64;
  for (std::size_t at = 0; at < page.size(); at += 64) {
    const std::array<std::uint64_t, 8> record = {type,
                                                 heap + random.below(1 << 18) * 16,
                                                 heap + random.below(1 << 18) * 16,
                                                 random.below(200),
                                                 0,
                                                 random.below(4),
                                                 random.below(1 << 20),
                                                 0};
    std::memcpy(page.data() + at, record.data(), 64);
  }
}

/// Bytes with the statistics of machine code: few opcodes, many small operands, repeats from nearby.
inline void fill_code(Page page, Random& random) {
  for (std::size_t at = 0; at < page.size();) {
    if (at > 64 && random.below(3) == 0) {
      const std::size_t size = std::min<std::size_t>(4 + random.below(12), page.size() - at);
      std::memmove(page.data() + at, page.data() + at - 16 - random.below(48), size);
      at += size;
    } else {
      page[at++] = static_cast<std::byte>(0x40 + std::min(random.below(0x90), random.below(0x90)));
      if (at < page.size()) page[at++] = static_cast<std::byte>(random.below(random.below(2) ? 16 : 256));
    }
  }
}

inline void fill_guest(Page page, Random& random) {
  switch (random.below(10)) {
    case 0:
    case 1:
    case 2: return fill_records(page, random);
    case 3:
    case 4: return fill_text(page, random);
    case 5:
    case 6: return fill_code(page, random);
    default:
      // Half empty: a stack, or the end of a file in the page cache.
      fill_records(page, random);
      std::memset(page.data() + 512 + random.below(3072), 0, 512);
      const std::size_t used = 256 + random.below(2048);
      std::memset(page.data() + used, 0, page.size() - used);
  }
}

/// Up to 256 MiB of shared libraries, largest first so that every machine has much of the same kind.
inline const std::vector<std::byte>& library_bytes() {
  static const std::vector<std::byte> bytes = [] {
    namespace fs = std::filesystem;
    std::vector<std::pair<std::uintmax_t, fs::path>> files;
    std::error_code ignored;
    for (const char* const folder : {"/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"})
      for (fs::directory_iterator at(folder, ignored), end; at != end; at.increment(ignored))
        if (at->is_regular_file(ignored) && !at->is_symlink(ignored) &&
            at->path().filename().string().find(".so") != std::string::npos)
          files.emplace_back(at->file_size(ignored), at->path());
    std::sort(files.rbegin(), files.rend());
    std::vector<std::byte> all;
    for (const auto& [size, path] : files) {
      if (all.size() + size > (std::size_t{256} << 20)) continue;
      const std::size_t at = all.size();
      all.resize(at + size);
      std::ifstream file(path, std::ios::binary);
      file.read(reinterpret_cast<char*>(all.data() + at), static_cast<std::streamsize>(size));
      all.resize(at + static_cast<std::size_t>(std::max<std::streamsize>(file.gcount(), 0)));
    }
    all.resize(all.size() / page_bytes * page_bytes);
    if (all.empty()) throw std::runtime_error("pattern library: no shared libraries on this machine");
    return all;
  }();
  return bytes;
}

/// Fills memory, a whole number of pages. Throws for an unknown pattern. Zero pages are not written to, so that fresh
/// memory stays untouched there: give memory that is zero.
inline void fill(std::span<std::byte> memory, std::string_view pattern, std::uint64_t seed) {
  if (std::ranges::find(patterns, pattern) == patterns.end())
    throw std::runtime_error("unknown pattern " + std::string(pattern));
  if (pattern == "zero") return;
  Random random(seed);
  std::size_t in_library = pattern == "library" ? seed * 977 * page_bytes % library_bytes().size() : 0;
  std::uint64_t run = 0;
  std::uint64_t kind = 0;  // of a hundred
  for (std::size_t at = 0; at + page_bytes <= memory.size(); at += page_bytes) {
    const Page page = memory.subspan(at).first<page_bytes>();
    if (run-- == 0) {
      run = random.below(31);
      kind = random.below(100);
    }
    if (pattern == "random") {
      fill_random(page, random);
    } else if (pattern == "text") {
      fill_text(page, random);
    } else if (pattern == "guest") {
      fill_guest(page, random);
    } else if (pattern == "library") {
      std::memcpy(page.data(), library_bytes().data() + in_library, page_bytes);
      in_library = (in_library + page_bytes) % library_bytes().size();
    } else if (pattern == "half") {
      if (kind < 50) fill_random(page, random);
    } else if (kind < 40) {
      fill_guest(page, random);
    } else if (kind < 60) {
      fill_random(page, random);
    }
  }
}

}  // namespace corpus
