// SPDX-License-Identifier: MIT
#pragma once
#include "multifd/sender.hpp"
