// SPDX-License-Identifier: MIT
#include "fuzz/decode.hpp"
#include "multifd/compress/zstd.hpp"

namespace {

const fuzz::Register registered({.name = "decode_zstd", .test = fuzz::test_decoder<multifd::Zstd>});

}  // namespace
