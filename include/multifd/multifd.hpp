// SPDX-License-Identifier: MIT
//
// Includes what most users need. What needs another library or not every user wants is included by its own name:
// compress/zlib.hpp, igzip.hpp and zstd.hpp, transport/tls.hpp, qemu/ and testing/.
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
