// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/memory/ram_map.hpp"
  #  include <zlib.h>
