// SPDX-License-Identifier: MIT
//
// The picture: time against the link's speed, one line per stack, drawn by gnuplot.
#pragma once

#include <string>
#include <vector>

#include "advise/output.hpp"
#include "common/part_file.hpp"

namespace advise {

struct Curve {
  std::string label;
  std::vector<double> seconds{};  ///< for each of Curves::bits_per_s, with the best number of channels
};

struct Curves {
  std::vector<double> bits_per_s;  ///< 100 Mbit/s to 400 Gbit/s
  std::vector<Curve> curves{};
};

/// At most so many lines: more cannot be told apart.
inline constexpr std::size_t most_curves = 8;

/// The stacks that are the quickest at some speed, and the uncompressed ones to compare with.
Curves curves_of(const Findings& findings);

/// Draws to a file whose name will end in .svg or .png. Throws program::Failure.
void draw(const Findings& findings, const program::PartFile& picture);

/// Writes the table behind the picture: Mbit/s, the seconds of each curve, and the least of them. Throws program::Failure.
void write_plot_data(const Findings& findings, const program::PartFile& table);

}  // namespace advise
