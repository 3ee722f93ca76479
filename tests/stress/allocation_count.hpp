// SPDX-License-Identifier: MIT
//
// How often anything in this test binary asked for memory, by any thread: malloc, and so operator new too.
#pragma once

#include <cstdint>

std::uint64_t allocations() noexcept;
