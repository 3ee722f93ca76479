// SPDX-License-Identifier: MIT
#pragma once
#include <boost/lockfree/spsc_queue.hpp>
#include "multifd/compress/zlib.hpp"
#include "worker_detail.hpp"
