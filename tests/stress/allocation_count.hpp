// SPDX-License-Identifier: MIT
//
// How often anything in this test binary called operator new, by any thread.
#pragma once

#include <cstdint>

std::uint64_t allocations() noexcept;
