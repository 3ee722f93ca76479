// SPDX-License-Identifier: MIT
//
// Test cases that cannot run on this machine. A binary of which nothing could run ends with status 77, which ctest knows
// as skipped; doctest_main.cpp counts.
#pragma once

#include <string>

namespace test {

/// Prints why this test case does not run here. The case returns then.
void skip(const std::string& why);

}  // namespace test
