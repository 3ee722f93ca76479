// SPDX-License-Identifier: MIT
//
// MULTIFD_PRECOMPILE_TESTS: headers that are compiled once for all tests. Nothing includes this file.
#pragma once

#include <doctest/doctest.h>

#include "multifd/multifd.hpp"

#if defined(MULTIFD_HAS_TLS)
#include "multifd/transport/tls.hpp"
#endif
#if defined(MULTIFD_HAS_OPENSSL)
#include "multifd/transport/openssl.hpp"
#endif
#if __has_include(<zlib.h>)
#include "multifd/compress/zlib.hpp"
#endif
#if __has_include(<zstd.h>)
#include "multifd/compress/zstd.hpp"
#endif
