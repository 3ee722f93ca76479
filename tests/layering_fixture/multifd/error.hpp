// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/version.hpp"
