// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/gone.hpp"
#include "multifd/multifd.hpp"
