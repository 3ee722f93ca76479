// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/format/ring_b.hpp"
