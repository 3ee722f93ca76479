// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/multifd.hpp"
#include "multifd/gone.hpp"
