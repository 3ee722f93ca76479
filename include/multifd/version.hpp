// SPDX-License-Identifier: MIT
#pragma once

#define MULTIFD_VERSION_MAJOR 0
#define MULTIFD_VERSION_MINOR 1
#define MULTIFD_VERSION_PATCH 0
