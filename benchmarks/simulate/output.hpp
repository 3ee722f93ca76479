// SPDX-License-Identifier: MIT
//
// What was found, for people (tables on stdout) and for programs (one JSON object).
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "simulate/compare.hpp"

namespace simulate {

/// `every_trial`: a line per trace and rule, too.
void print_tables(const Comparison& comparison, bool every_trial);
nlohmann::json to_json(const Comparison& comparison, double seconds);

}  // namespace simulate
