// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/format/ring_a.hpp"
