// SPDX-License-Identifier: MIT
//
// The version of the library. CMakeLists.txt reads it here.
#pragma once

#define MULTIFD_VERSION_MAJOR 0
#define MULTIFD_VERSION_MINOR 1
#define MULTIFD_VERSION_PATCH 0
