// SPDX-License-Identifier: MIT
#pragma once
#include <zlib.h>
#include "multifd/memory/ram_map.hpp"
