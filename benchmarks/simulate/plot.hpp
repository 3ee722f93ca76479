// SPDX-License-Identifier: MIT
//
// The picture: downtime against total time, a dot per trace and rule, the medians marked. Drawn by gnuplot.
#pragma once

#include "common/part_file.hpp"
#include "simulate/compare.hpp"

namespace simulate {

/// Draws to a file whose name will end in .svg or .png. Throws program::Failure.
void draw(const Comparison& comparison, const program::PartFile& picture);

/// Writes the table behind the picture: rule, trace, total seconds, downtime seconds. Throws program::Failure.
void write_plot_data(const Comparison& comparison, const program::PartFile& table);

}  // namespace simulate
