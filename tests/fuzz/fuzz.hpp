// SPDX-License-Identifier: MIT
//
// What every fuzz target is made of: a name, a function that tries one input, and perhaps a mutator that knows what the
// bytes mean. A target registers itself; libfuzzer.cpp or replay.cpp is the main program around it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <source_location>
#include <span>
#include <string_view>
#include <vector>

namespace fuzz {

using Span = std::span<const std::byte>;
using Bytes = std::vector<std::byte>;
using Rng = std::minstd_rand;

struct Target {
  std::string_view name;
  void (*test)(Span input);
  /// Changes `input`, which may grow up to `most_bytes`. Null: the bytes are all there is to know.
  void (*mutate)(Bytes& input, std::size_t most_bytes, Rng& rng) = nullptr;
};

inline std::vector<Target>& targets() {
  static std::vector<Target> all;
  return all;
}

struct Register {
  explicit Register(const Target& target) { targets().push_back(target); }
};

/// Ends the program where something does not hold: that is what a finding looks like.
inline void require(bool holds, const char* what, std::source_location where = std::source_location::current()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%u: does not hold: %s\n", where.file_name(), static_cast<unsigned>(where.line()), what);
  std::abort();
}

/// Takes an input apart from the front; numbers that are not there any more are 0.
class Reader {
 public:
  explicit Reader(Span input) : left_(input) {}

  std::uint32_t number(std::size_t bytes) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < bytes; ++i) value = value << 8 | (i < left_.size() ? std::uint32_t(left_[i]) : 0);
    take(bytes);
    return value;
  }
  std::uint8_t u8() { return static_cast<std::uint8_t>(number(1)); }
  /// The next `bytes`, or as many as there are.
  Span take(std::size_t bytes) {
    const Span taken = left_.first(std::min(bytes, left_.size()));
    left_ = left_.subspan(taken.size());
    return taken;
  }
  Span rest() { return take(left_.size()); }
  bool empty() const { return left_.empty(); }

 private:
  Span left_;
};

inline void append(Bytes& to, Span bytes) { to.insert(to.end(), bytes.begin(), bytes.end()); }
inline void append(Bytes& to, std::uint64_t value, std::size_t bytes) {
  for (std::size_t i = bytes; i-- > 0;) to.push_back(std::byte(value >> (8 * i)));
}

/// Page sizes, by a number from the input.
inline std::size_t page_bytes_of(unsigned choice) {
  constexpr std::size_t sizes[] = {4096, 16384, 65536, 1024};
  return sizes[choice % std::size(sizes)];
}

inline std::size_t below(Rng& rng, std::size_t end) { return rng() % end; }

}  // namespace fuzz
