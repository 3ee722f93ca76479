// SPDX-License-Identifier: MIT
//
// Sockets, both sides: includes connect.hpp and listen.hpp and adds nothing.
#pragma once

#include "multifd/transport/connect.hpp"  // IWYU pragma: export
#include "multifd/transport/listen.hpp"   // IWYU pragma: export
