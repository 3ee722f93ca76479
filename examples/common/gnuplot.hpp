// SPDX-License-Identifier: MIT
//
// Pictures by gnuplot, which is started as a program of its own.
#pragma once

#include <string>

#include "common/part_file.hpp"

namespace program {

/// Throws Failure, which says what to install, unless gnuplot can be started.
void need_gnuplot();

/// A text in gnuplot's single quotes.
std::string quoted(const std::string& text);

/// The lines that a script begins with: a terminal by the picture's name, which ends in .svg or .png, and its output.
std::string gnuplot_terminal(const PartFile& picture);

/// Runs a script that draws `picture`; at most 30 seconds. Throws Failure with gnuplot's own words.
void draw_by_gnuplot(const std::string& script, const PartFile& picture);

}  // namespace program
