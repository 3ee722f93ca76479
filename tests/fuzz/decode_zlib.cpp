// SPDX-License-Identifier: MIT
#include "fuzz/decode.hpp"
#include "multifd/compress/zlib.hpp"

namespace {

const fuzz::Register registered({.name = "decode_zlib", .test = fuzz::test_decoder<multifd::Zlib>});

}  // namespace
