// SPDX-License-Identifier: MIT
#include "advise/rate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>

namespace advise {

std::optional<Rate> parse_rate(std::string_view text) {
  std::string word(text);
  std::ranges::transform(word, word.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  // strtod also takes hexadecimal numbers, "inf" and blanks in front: a speed begins with a digit and is decimal.
  if (word.empty() || std::isdigit(static_cast<unsigned char>(word[0])) == 0 || word.starts_with("0x")) return {};
  char* end = nullptr;
  const double number = std::strtod(word.c_str(), &end);
  std::string unit(end);
  std::erase(unit, ' ');
  if (unit.ends_with("/s")) unit.resize(unit.size() - 2);

  struct Unit {
    std::string_view name;
    double bits;
    bool of_the_line;
  };
  static constexpr Unit units[] = {{"kbit", 1e3, true},
                                   {"mbit", 1e6, true},
                                   {"gbit", 1e9, true},
                                   {"tbit", 1e12, true},
                                   {"kib", 8.0 * 1024, false},
                                   {"mib", 8.0 * 1024 * 1024, false},
                                   {"gib", 8.0 * 1024 * 1024 * 1024, false}};
  const auto* const found = std::ranges::find(units, std::string_view(unit), &Unit::name);
  if (found == std::end(units)) return {};
  const double bits = number * found->bits;
  if (!(bits >= 1e3) || bits > 1e14) return {};
  return Rate{.nominal_bits_per_s = bits, .bytes_per_s = bits / 8 * (found->of_the_line ? ethernet_share : 1)};
}

std::string format_bits(double bits_per_s) {
  if (bits_per_s >= 1e9) return fmt::format("{:.4g} Gbit/s", bits_per_s / 1e9);
  return fmt::format("{:.4g} Mbit/s", bits_per_s / 1e6);
}

}  // namespace advise
