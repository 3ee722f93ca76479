// SPDX-License-Identifier: MIT
//
// Beside Zlib, which has the same format.
#include "fuzz/decode.hpp"
#include "multifd/compress/igzip.hpp"
#include "multifd/compress/zlib.hpp"

namespace {

const fuzz::Register registered({.name = "decode_igzip", .test = fuzz::test_decoder<multifd::Igzip, multifd::Zlib>});

}  // namespace
