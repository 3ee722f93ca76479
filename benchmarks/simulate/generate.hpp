// SPDX-License-Identifier: MIT
//
// Traces made from a seed: the same ones on every machine, up to the last digit of exp() and log().
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "simulate/trace.hpp"

namespace simulate {

/// What the kinds differ in; README.md has the ranges.
inline constexpr std::array<std::string_view, 8> kinds = {"working_set", "hot_cold", "phases",       "dips",
                                                          "sync",        "vcpus",    "compressible", "steps"};

/// How many of each kind make the set that is tested, from this seed on: 200 traces.
inline constexpr std::uint64_t tested_seed = 1;
inline constexpr unsigned tested_traces = 25;

/// `kind`: one of kinds.
Trace generate(std::string_view kind, std::uint64_t seed);

}  // namespace simulate
