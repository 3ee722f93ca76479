// SPDX-License-Identifier: MIT
//
// MULTIFD_PRECOMPILE: headers that are compiled once for all programs. Nothing includes this file.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "multifd/multifd.hpp"
