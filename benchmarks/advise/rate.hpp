// SPDX-License-Identifier: MIT
//
// Speeds of links as people write them, and what of a nominal speed a stream of bytes can use.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace advise {

/// What TCP over Ethernet leaves of the line's bits at 1500 bytes per frame: 1448 of 1538.
inline constexpr double ethernet_share = 1448.0 / 1538.0;

/// A link's speed.
struct Rate {
  double nominal_bits_per_s = 0;
  double bytes_per_s = 0;  ///< what a stream gets
};

/// Reads "10Gbit", "2.5 Gbit/s", "100Mbit" (of the line: ethernet_share of it is usable), "1.2GiB/s", "500MiB" (what a
/// stream gets). Case does not matter. Nothing for anything else, and for less than 1 kbit or more than 100 Tbit.
std::optional<Rate> parse_rate(std::string_view text);

/// "10 Gbit/s".
std::string format_bits(double bits_per_s);

}  // namespace advise
