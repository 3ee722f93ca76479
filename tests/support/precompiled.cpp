// SPDX-License-Identifier: MIT
//
// For CMake, which precompiles headers with a source.
