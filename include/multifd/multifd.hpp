// SPDX-License-Identifier: MIT
//
// Everything but the compressors that need a library (compress/zlib.hpp, igzip.hpp, zstd.hpp) and the testing headers.
#pragma once

#include "multifd/compress/nocomp.hpp"
#include "multifd/receiver.hpp"
#include "multifd/sender.hpp"
#include "multifd/stack.hpp"
#include "multifd/transport/fd.hpp"
#include "multifd/transport/socket.hpp"
#include "multifd/version.hpp"
#include "multifd/zero/policy.hpp"
#include "multifd/zero/residency.hpp"
