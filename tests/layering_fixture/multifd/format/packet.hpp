// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/error.hpp"
#include "multifd/sender.hpp"
