// SPDX-License-Identifier: MIT
//
// Counts this thread's heap allocations, those of C libraries included.
#pragma once

#include <cstddef>

/// Allocations by the calling thread since its start. Only differences mean something.
std::size_t allocations_of_this_thread() noexcept;
