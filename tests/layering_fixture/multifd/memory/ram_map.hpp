// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/memory/detail/inner.hpp"
