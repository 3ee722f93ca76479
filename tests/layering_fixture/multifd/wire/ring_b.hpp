// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/wire/ring_a.hpp"
