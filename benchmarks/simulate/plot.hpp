// SPDX-License-Identifier: MIT
//
// The picture: how long the guests stood still under each rule, and what the migrations cost against the oracle, as shares of
// all migrations. Drawn by gnuplot.
#pragma once

#include "common/part_file.hpp"
#include "simulate/compare.hpp"

namespace simulate {

/// Draws to a file whose name will end in .svg or .png. Throws program::Failure.
void draw(const Comparison& comparison, const program::PartFile& picture);

/// Writes the table behind the picture: rule, trace, total seconds, downtime seconds, cost in times the oracle's. Throws
/// program::Failure.
void write_plot_data(const Comparison& comparison, const program::PartFile& table);

}  // namespace simulate
